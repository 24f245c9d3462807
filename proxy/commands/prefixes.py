"""Commands that show the prefix caches of a running nearhit's upstreams, add to them, and take out of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.commands.options import EXIT_CONFIG, load_settings, stop, url_option, with_settings
from proxy.settings import Settings

_ROOT = "/v1/cache"
_SEED_S = 90_000.0
"""Longest silence that a seeding is waited for: more than prefixes.seed_timeout_s can be."""
_COLUMNS = ("name", "model", "source", "tokens", "size", "state", "restores", "tokens saved", "last used", "reason")
_STYLES = {"seeded": "green", "warm": "green", "seeding": "yellow", "wanted": "yellow"}
_STATE = _COLUMNS.index("state")
_NARROWEST = 12
_WIDE = 100_000
_MIB = 1024 * 1024
_OWN = "cache_name"


@click.group(invoke_without_command=True)
@click.option("--model", help="Those of this model.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def prefixes(
    context: click.Context,
    /,
    model: str | None,
    config_file: Path | None,
    url: str | None,
    *,
    as_json: bool,
    **flags: Any,
) -> None:
    """List the system prompts that the LLM server has computed already, or shall compute; add some, or remove some.

    Example: nearhit prefixes --port 8090
    """
    if context.invoked_subcommand is not None:
        # Flags may stand before the name of the command as well as after it.
        given = {"model": model, "config_file": config_file, "url": url, "as_json": as_json or None, **flags}
        context.default_map = {
            context.invoked_subcommand: {name: value for name, value in given.items() if value is not None}
        }
        return
    told = _ask(load_settings(config_file, flags).settings, url, _path(model))
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    rows = told["data"] if model is not None else [row for rows in told["data"].values() for row in rows]
    if not rows:
        click.echo("no prefix is known")
        return
    screen = Console()
    # Whoever reads it from a pipe gets all that there is.
    width = screen.width if screen.is_terminal else None
    _print(Console(soft_wrap=True, width=_WIDE), rows, width)


@prefixes.command("add")
@click.argument("name")
@click.argument("file", type=click.File("rb"))
@click.option("--model", help="The model to compute it for; whatever the first upstream runs, if it is not given.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def add(
    name: str, file: Any, model: str | None, config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any
) -> None:
    """Have a system prompt computed and kept under NAME, and wait for it.

    FILE holds the system prompt, or the body of a request in JSON as a client sends it, whose system messages and tools
    count; - reads it from standard input. What was known under NAME is replaced.

    Example: nearhit prefixes add assistant system.txt
    """
    from proxy.commands.progress import progress_line

    settings = load_settings(config_file, flags).settings
    body = {"cache_name": name, **_asked(file)}
    with progress_line(f"computing {ascii(name)[1:-1]}", None):
        told = _ask(settings, url, _path(model), body, timeout_s=_SEED_S)
    click.echo(
        json.dumps(told, indent=2) if as_json else f"{told[_OWN]} for {_clean(told['model'])}: {told['message']}"
    )


@prefixes.command("remove")
@click.argument("name")
@click.option("--model", help="The model that it was computed for; needed where several have one of this name.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def remove(
    name: str, model: str | None, config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any
) -> None:
    """Delete what is kept under NAME, with its files.

    Example: nearhit prefixes remove assistant
    """
    settings = load_settings(config_file, flags).settings
    if model is None:
        model = _only_model(_ask(settings, url, _ROOT), name)
    told = _ask(settings, url, _path(model, name), method="DELETE")
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"removed {told[_OWN]} of {_clean(told['model'])}")
    if told.get("message"):
        click.echo(f"nearhit: {told['message']}", err=True)


def _asked(file: Any) -> dict[str, Any]:
    """The fields that say what to compute."""
    try:
        text = file.read().decode().strip()
    except UnicodeDecodeError:
        stop(f"{file.name}: is not UTF-8", EXIT_CONFIG)
    except OSError as error:
        stop(f"{file.name}: cannot be read: {error.strerror}", EXIT_CONFIG)
    if not text:
        stop(f"{file.name}: is empty", EXIT_CONFIG)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict) or "messages" not in body:
        return {"prompt": text}
    return {field: value for field, value in body.items() if field not in (_OWN, "prompt")}


def _only_model(told: Mapping[str, Any], name: str) -> str:
    models = sorted(str(model) for model, rows in told["data"].items() if any(row[_OWN] == name for row in rows))
    if not models:
        stop(f"no prefix is called {name!a}")
    if len(models) > 1:
        stop(
            f"several models have a prefix of this name: give --model, one of {_clean(', '.join(models))}", EXIT_CONFIG
        )
    return models[0]


def _path(model: str | None, name: str | None = None) -> str:
    try:
        return "/".join([_ROOT, *(quote(part, safe="") for part in (model, name) if part is not None)])
    except UnicodeEncodeError:
        stop("an argument is not valid UTF-8", EXIT_CONFIG)


def _print(console: Console, rows: Sequence[Mapping[str, Any]], width: int | None) -> None:
    """A line for each prefix, cut to `width` characters where that is given."""
    now = time.time()
    cells = [_cells(row, now) for row in rows]
    table = Table(*_COLUMNS, box=None, header_style="bold", pad_edge=False)
    taken = sum(_widest(column) + 2 for column in zip(_COLUMNS[:-1], *(row[:-1] for row in cells), strict=True))
    for row in cells:
        shown = [
            Text(cell, _STYLES.get(cell, "red") if at == _STATE else "", no_wrap=True) for at, cell in enumerate(row)
        ]
        if width is not None:
            shown[-1].truncate(max(width - taken, _NARROWEST), overflow="ellipsis")
        table.add_row(*shown)
    console.print(table)


def _cells(row: Mapping[str, Any], now: float) -> list[str]:
    from proxy.telling import span

    used = row["used_at"]
    return [
        _clean(row[_OWN]),
        _clean(row["model_name"] or "-"),
        row["source"],
        str(row["tokens"] or "-"),
        _size(row["bytes"]),
        row["state"],
        str(row["restores"]),
        str(row["tokens_reused"]),
        "-" if used is None else f"{span(max(now - used, 0))} ago",
        _clean(row["reason"] or "-"),
    ]


def _widest(column: Iterable[str]) -> int:
    return max(map(cell_len, column))


def _size(count: int) -> str:
    return "-" if not count else f"{count / _MIB:.1f} MB" if count >= _MIB else f"{count / 1024:.1f} KB"


def _clean(text: str) -> str:
    from proxy.telling import clean

    return clean(str(text))


def _ask(settings: Settings, url: str | None, path: str, body: Any = None, **more: Any) -> dict[str, Any]:
    from proxy.ask import AskError, ask

    try:
        return ask(settings, url, path, body, **more)
    except AskError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("stopped; what was to be computed is computed when the server is idle", 130)
