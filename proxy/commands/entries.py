"""Commands that look at what a running nearhit stores, and take out of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from proxy.commands.options import EXIT_CONFIG, Command, load_settings, stop, url_option, with_settings
from proxy.settings import Settings

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PAGE = 1000
_PURGE_S = 3600.0
"""Longest silence that a purge is waited for: it answers when all has gone."""
_WIDE = 100_000


def _age(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """The seconds of an age like 90s, 10m, 2h or 3d."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is no age like 90s, 10m, 2h or 3d")
    return float(match[1]) * _UNITS[match[2]]


_CONDITIONS = (
    click.option("--model", help="Entries of this model."),
    click.option("--endpoint", help="Entries of this endpoint: chat, completions, responses, messages or embeddings."),
    click.option("--namespace", metavar="HEX", help="Entries of this namespace; '' is the shared one."),
    click.option("--fingerprint", metavar="HEX", help="Entries of an upstream with this fingerprint."),
    click.option("--id", "id_", metavar="HEX", help="Entries whose id begins so: 8 digits or more."),
    click.option("--text", help="Entries with this text in words or answer, whatever its case."),
    click.option("--older", "older_s", metavar="AGE", callback=_age, help="Entries at least so old: 90s, 10m, 2h, 3d."),
    click.option("--newer", "newer_s", metavar="AGE", callback=_age, help="Entries younger than that."),
)


def with_conditions(command: Command) -> Command:
    """Add the flags that say which entries are meant."""
    for option in reversed(_CONDITIONS):
        command = option(command)
    return command


def split_conditions(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the conditions that were given out of the flags, under their names in requests."""
    names = ("model", "endpoint", "namespace", "fingerprint", "id_", "text", "older_s", "newer_s")
    taken = {name.rstrip("_"): flags.pop(name) for name in names}
    return {name: value for name, value in taken.items() if value is not None}


@click.command()
@click.argument("entry_id", metavar="[ID]", required=False)
@with_conditions
@click.option("--oldest", is_flag=True, help="The oldest first, not the newest.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), help="Most entries to list; 20 by default.")
@click.option("--delete", is_flag=True, help="Remove the entry with this ID.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def entries(
    entry_id: str | None,
    config_file: Path | None,
    url: str | None,
    *,
    oldest: bool,
    limit: int | None,
    delete: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """List what is stored; with an ID show that entry and its answer, or remove it.

    ID is what a response had as X-Nearhit-Entry, or its first 8 digits and more.

    Example: nearhit entries --model tiny --older 2h
    """
    conditions = split_conditions(flags)
    settings = load_settings(config_file, flags).settings
    if entry_id is None:
        if delete:
            stop("--delete wants an ID; to remove many, use nearhit purge", EXIT_CONFIG)
        _list(settings, url, conditions, oldest=oldest, limit=limit or 20, as_json=as_json)
        return
    if conditions or oldest or limit:
        stop("give an ID or conditions, not both", EXIT_CONFIG)
    if not re.fullmatch("[0-9a-fA-F]{8,64}", entry_id):
        stop("an ID is the first 8 to 64 digits of an entry's, as in X-Nearhit-Entry", EXIT_CONFIG)
    told = _ask(settings, url, f"/-/entries/{entry_id}", method="DELETE" if delete else "GET")
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif delete:
        click.echo(f"removed {told['id']}")
    else:
        from proxy.telling import tell_entry

        tell_entry(Console(soft_wrap=True), told)


@click.command()
@with_conditions
@click.option("--all", "everything", is_flag=True, help="Every entry.")
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def purge(
    config_file: Path | None,
    url: str | None,
    *,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Remove all entries that meet every condition given. Tells first what would go, and asks.

    Example: nearhit purge --text 10.0.0.7 --dry-run
    """
    asked: dict[str, Any] = split_conditions(flags) | ({"all": True} if everything else {})
    settings = load_settings(config_file, flags).settings
    if not asked:
        stop("say which entries: give a condition, or --all", EXIT_CONFIG)
    if not (dry_run or yes or sys.stdin.isatty()):
        stop("there is no terminal to ask on: give --yes, or --dry-run", EXIT_CONFIG)
    if dry_run or not yes:
        doomed = _ask(settings, url, "/-/purge", {**asked, "dry_run": True}, timeout_s=_PURGE_S)
        _tell_doomed(doomed, as_json=as_json and dry_run, to_stderr=not dry_run)
        if dry_run:
            return
        if doomed["would_remove"] and not click.confirm("Remove them?", err=True):
            stop("nothing was removed")
    told = _ask(settings, url, "/-/purge", asked, timeout_s=_PURGE_S)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    from proxy.telling import counted

    click.echo(f"removed {counted(told['removed'])}")


def _list(
    settings: Settings, url: str | None, conditions: Mapping[str, Any], *, oldest: bool, limit: int, as_json: bool
) -> None:
    told = _pages(settings, url, conditions, oldest=oldest, limit=limit)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    from proxy.telling import tell_entries

    if not told["entries"]:
        click.echo("no entry is stored that meets this")
        return
    screen = Console()
    # Whoever reads it from a pipe gets all that there is.
    width = screen.width if screen.is_terminal else None
    tell_entries(Console(soft_wrap=True, width=_WIDE), told["entries"], width)
    if not told["complete"]:
        click.echo(f"there may be more; --limit {limit * 10} lists further", err=True)


def _pages(
    settings: Settings, url: str | None, conditions: Mapping[str, Any], *, oldest: bool, limit: int
) -> dict[str, Any]:
    """The parts of a list, put together."""
    query = {name: shown_value(value) for name, value in conditions.items()} | {
        "order": "oldest" if oldest else "newest"
    }
    found: list[Any] = []
    while True:
        told = _ask(settings, url, "/-/entries", query={**query, "limit": str(min(limit - len(found), _PAGE))})
        found += told["entries"]
        if told["complete"] or len(found) >= limit:
            return {**told, "entries": found}
        query["after"] = str(told["next"])


def shown_value(value: Any) -> str:
    """A condition's value as it stands in a query."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _tell_doomed(doomed: Mapping[str, Any], *, as_json: bool, to_stderr: bool) -> None:
    if as_json:
        click.echo(json.dumps(doomed, indent=2))
        return
    from proxy.telling import tell_doomed

    screen = Console(stderr=to_stderr)
    width = screen.width if screen.is_terminal else None
    tell_doomed(Console(stderr=to_stderr, soft_wrap=True, width=_WIDE), doomed, width)


def _ask(settings: Settings, url: str | None, path: str, body: Any = None, **more: Any) -> dict[str, Any]:
    from proxy.ask import AskError, ask

    try:
        return ask(settings, url, path, body, **more)
    except AskError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("stopped; a purge that has begun goes on", 130)
