"""Commands that ask a running nearhit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console

from proxy.commands.options import (
    EXIT_CONFIG,
    asked,
    load_settings,
    print_table,
    stop,
    url_option,
    with_settings,
)


@click.command()
@with_settings
@url_option
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option("--every", "every_s", type=click.FloatRange(0.1, 86_400), help="Seconds between two looks; 2 by default.")
@click.option("--json", "as_json", is_flag=True, help="For programs; with --watch, a line for each look.")
def stats(
    config_file: Path | None, url: str | None, *, watch: bool, every_s: float | None, as_json: bool, **flags: Any
) -> None:
    """Show what a running nearhit has done, or with --watch what it is doing.

    Example: nearhit stats --port 8090
    """
    if every_s is not None and not watch:
        stop("--every goes with --watch", EXIT_CONFIG)
    if watch:
        if not as_json and not Console().is_terminal:
            stop("--watch wants a terminal, or --json for a line for each look", EXIT_CONFIG)
        from proxy.commands.watching import watch as look_again

        look_again(load_settings(config_file, flags).settings, url, every_s or 2.0, as_json=as_json)
        return
    answer = asked(config_file, flags, url, "/-/stats")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    warnings = answer.pop("warnings", ())
    # One upstream is told of once.
    answer.pop("upstreams" if len(answer.get("upstreams", ())) < 2 else "upstream", None)
    print_table(("what", "value"), ((name, str(value)) for name, value in _flattened(answer)))
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option(
    "--endpoint",
    default="",
    metavar="NAME",
    help="What FILE is for, where it does not tell: chat, completions, responses, messages, embeddings, or a path, "
    "with the query that clients send.",
)
@click.option("--ask", "words", help="Explain this question, with temperature 0 and nothing else, instead of a FILE.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(
    file: Any,
    words: str | None,
    endpoint: str,
    config_file: Path | None,
    url: str | None,
    *,
    as_json: bool,
    **flags: Any,
) -> None:
    """Say why a request would or would not be answered from the cache.

    FILE holds the body of a request as a client sends it; - reads it from standard input.

    Example: nearhit explain request.json
    """
    if (file is None) == (words is None):
        stop("give a FILE with a request's body, or --ask 'a question'", EXIT_CONFIG)
    body: Any = {"messages": [{"role": "user", "content": words}], "temperature": 0}
    if file is not None:
        try:
            body = json.load(file)
        except (ValueError, RecursionError):
            stop(f"{file.name}: is not JSON", EXIT_CONFIG)
    told = asked(config_file, flags, url, f"/-/explain?endpoint={quote(endpoint, safe='', errors='replace')}", body)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    from proxy.telling import tell_explanation

    tell_explanation(Console(soft_wrap=True), told)


@click.command()
@click.argument("entry_id", metavar="ID")
@click.argument("verdict", type=click.Choice(["wrong"]))
@with_settings
@url_option
def feedback(entry_id: str, verdict: str, config_file: Path | None, url: str | None, **flags: Any) -> None:
    """Say that an answer from the cache was wrong: it goes, and that pair of questions never matches again.

    ID is what the response had as X-Nearhit-Entry.

    Example: nearhit feedback 3fa2c41b9d0e8a77 wrong
    """
    told = asked(config_file, flags, url, "/-/feedback", {"id": entry_id, "verdict": verdict})
    click.echo(f"removed {told['id']}; {told['pairs_never_again']} pairings will not match again")


def _flattened(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in nested.items():
        if isinstance(value, dict):
            rows.extend(_flattened(value, f"{prefix}{name}."))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one in value:
                rows.extend(_flattened(one, f"{prefix}{name}.{one.get('name', '')}."))
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows
