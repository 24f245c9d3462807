"""Commands that carry entries from one store to another: export and import."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import click

from proxy.commands.entries import shown_value, split_conditions, with_conditions
from proxy.commands.options import EXIT_CONFIG, EXIT_FAILED, load_settings, stop, url_option, with_settings
from proxy.commands.progress import progress_line
from proxy.settings import Settings

_EXPORT_S = 600.0
"""Longest silence: a text that is rare is searched for in all entries before the first is sent."""
_CHUNK = 1 << 18
_INTERRUPTED = 130


@click.command("export")
@click.argument("file", metavar="[FILE|-]", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@with_conditions
@click.option("--resume", is_flag=True, help="Go on with an export to FILE that was interrupted.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="Sum up for programs.")
def export_(file: str, config_file: Path | None, url: str | None, *, resume: bool, as_json: bool, **flags: Any) -> None:
    """Write what is stored as JSON Lines: to FILE, which only its owner may read, or to standard output.

    Until all is there, it is in FILE.part. docs/transfer.md tells what the lines hold.

    Example: nearhit export answers.jsonl --model tiny
    """
    filters = {name: shown_value(value) for name, value in split_conditions(flags).items()}
    settings = load_settings(config_file, flags).settings
    if file == "-" and resume:
        stop("--resume goes on with a FILE", EXIT_CONFIG)
    try:
        if file == "-":
            _export_to_stdout(settings, url, filters)
            return
        told = _export_to_file(settings, url, Path(file), filters, resume=resume)
    except BrokenPipeError:
        # Whoever read it has had enough; Python would complain once more at its end.
        sys.stdout = None
        sys.exit(EXIT_FAILED)
    except OSError as error:
        begun = file != "-" and Path(f"{file}.part").exists()
        hint = f"; {_resume_hint(file)}" if begun else ""
        stop(f"{file}: {error.strerror or type(error).__name__}{hint}")
    click.echo(json.dumps(told, indent=2) if as_json else f"{told['entries']} entries are in {file}")


def _export_to_stdout(settings: Settings, url: str | None, filters: Mapping[str, str]) -> None:
    last = b""
    try:
        with _response(settings, url, filters) as response:
            while chunk := response.read1(_CHUNK):
                sys.stdout.buffer.write(chunk)
                last = (last + chunk)[-100:]
        sys.stdout.buffer.flush()
    except HTTPException:
        last = b""
    except KeyboardInterrupt:
        stop("stopped", _INTERRUPTED)
    if b'\n{"end":' not in last:
        stop("the export broke off: it is not whole; export to a FILE, and --resume can go on with it")


def _export_to_file(
    settings: Settings, url: str | None, path: Path, filters: Mapping[str, str], *, resume: bool
) -> dict[str, Any]:
    from proxy.cache.transfer import LineSplitter
    from proxy.transfer_files import TransferError, begin, go_on

    try:
        part = go_on(path) if resume else begin(path)
    except TransferError as error:
        stop(str(error), EXIT_CONFIG)
    with part.file, progress_line("exporting", None) as progress:
        if filters and filters != part.filters and part.mark:
            stop(f"{path}.part was begun with {_told_filters(part.filters)}: give these, or none", EXIT_CONFIG)
        query = {**(part.filters if part.mark else filters), **({"after": str(part.mark)} if part.mark else {})}
        splitter = LineSplitter(sys.maxsize)
        try:
            with _response(settings, url, query) as response:
                while chunk := response.read1(_CHUNK):
                    part.write([line for line in splitter.feed(chunk) if line])
                    progress.say(f"exporting: {part.entries} entries")
        except HTTPException:
            pass
        except KeyboardInterrupt:
            stop(f"stopped after {part.entries} entries; {_resume_hint(str(path))}", _INTERRUPTED)
        if not part.complete:
            stop(f"the export broke off after {part.entries} entries; {_resume_hint(str(path))}")
        part.finish()
    return {"file": str(path), "entries": part.entries}


def _response(settings: Settings, url: str | None, query: Mapping[str, str]) -> HTTPResponse:
    from proxy.ask import AskError, opened

    try:
        return opened(settings, url, "/-/export", query=query, timeout_s=_EXPORT_S)
    except AskError as error:
        stop(str(error))


def _resume_hint(file: str) -> str:
    return f"go on with: nearhit export {shlex.quote(file)} --resume"


def _told_filters(filters: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value!a}" for name, value in filters.items()) or "no conditions"


@click.command("import")
@click.argument("file", metavar="FILE|-", type=click.Path(dir_okay=False, allow_dash=True))
@click.option(
    "--bad",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="What to do about a bad line: import nothing, or all but it.",
)
@click.option(
    "--from-line",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Begin here: to go on after an interruption.",
)
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def import_(
    file: str, bad: str, from_line: int, config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any
) -> None:
    """Take over the entries of an export. What is stored already, the same or newer, is left alone.

    Exits with 1 if a line was bad, or the file has no end.

    Example: nearhit import answers.jsonl --bad skip
    """
    settings = load_settings(config_file, flags).settings
    # Imported here: other commands need not read answers.
    from proxy.commands.sending import import_lines, readable

    with readable(file, spooled=bad == "refuse") as lines:
        import_lines(settings, url, file, lines, skip=bad == "skip", from_line=from_line, as_json=as_json)
