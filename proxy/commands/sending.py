"""The lines of an export on their way into a running nearhit, and what became of them."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from proxy.ask import AskError, Refused, send_lines
from proxy.cache.importing import Bad
from proxy.cache.transfer import Terms
from proxy.commands.options import EXIT_CONFIG, EXIT_FAILED, stop
from proxy.commands.progress import progress_line
from proxy.settings import Settings
from proxy.transfer_files import Cutter, bad_lines

_INTERRUPTED = 130
_IMPORT_S = 120.0
_LEAST_ANSWER_BYTES = 64 * 1024 * 1024
"""What a nearhit elsewhere may be set to accept, a local look at a file does not refuse."""
_SHOWN_BAD = 10


def import_lines(
    settings: Settings, url: str | None, name: str, file: BinaryIO, *, skip: bool, from_line: int, as_json: bool
) -> None:
    """Send the lines of a file called `name`, tell what became of them, and exit with 1 if something was bad."""
    if not skip:
        _refuse_bad(settings, name, file, from_line)
    told = _send_all(settings, url, name, file, skip=skip, from_line=from_line)
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        _tell_import(told)
    if told["bad_count"] or not told["complete"]:
        sys.exit(EXIT_FAILED)


@contextmanager
def readable(file: str, *, spooled: bool) -> Iterator[BinaryIO]:
    """A file, or standard input, that can be read; `spooled`, it can be read more than once."""
    try:
        with ExitStack() as stack:
            source: BinaryIO = sys.stdin.buffer if file == "-" else stack.enter_context(Path(file).open("rb"))
            if spooled and not source.seekable():
                copy: BinaryIO = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(source, copy)
                copy.seek(0)
                source = copy
            yield source
    except OSError as error:
        stop(f"{file}: {error.strerror or type(error).__name__}", EXIT_CONFIG)
    except KeyboardInterrupt:
        stop("stopped", _INTERRUPTED)


def _size_of(file: BinaryIO) -> int | None:
    """How many bytes there are to read, where that can be known."""
    if not file.seekable():
        return None
    here = file.tell()
    size = file.seek(0, 2)
    file.seek(here)
    return size


def _refuse_bad(settings: Settings, name: str, file: BinaryIO, from_line: int) -> None:
    terms = Terms(time.time_ns() // 1_000_000, max(settings.cache.max_answer_bytes, _LEAST_ANSWER_BYTES))
    found, count = [], 0
    with progress_line("looking through it", _size_of(file)) as progress:
        for one in bad_lines(file, terms, from_line, progress.advance):
            count += 1
            found += [one] if count <= _SHOWN_BAD else []
    file.seek(0)
    if count:
        for one in found:
            click.echo(f"nearhit: {name}: line {one.line}: {one.why}", err=True)
        more = f" ({count} in all)" if count > len(found) else ""
        stop(f"{name} has bad lines{more}, so nothing was imported; --bad skip imports the others")


def _send_all(
    settings: Settings, url: str | None, name: str, file: BinaryIO, *, skip: bool, from_line: int
) -> dict[str, Any]:
    terms = Terms(0, max(settings.cache.max_answer_bytes, _LEAST_ANSWER_BYTES))
    cutter, total, line = Cutter(file, terms.max_line_bytes, from_line), _Total(), from_line
    with progress_line("importing", _size_of(file)) as progress:
        try:
            for piece in cutter.pieces():
                if isinstance(piece, Bad):
                    total.add_bad(piece.line, piece.why)
                    line = piece.line + 1
                    continue
                query = {"bad": "skip" if skip else "refuse", "first": str(piece.first)}
                told = send_lines(settings, url, "/-/import", piece.data, query=query, timeout_s=_IMPORT_S)
                total.add(told)
                line = piece.first + piece.lines
                progress.advance(len(piece.data))
        except Refused as refused:
            done = refused.told.get("import")
            if isinstance(done, dict):
                total.add(done)
                line += int(done["lines"])
            stop(f"{refused}; {total.imported} entries were imported; {_again(name, line, url, skip=skip)}")
        except AskError as error:
            stop(f"{error}; {total.imported} entries were imported; {_again(name, line, url, skip=skip)}")
        except KeyboardInterrupt:
            told_of = f"stopped; {total.imported} entries were imported; {_again(name, line, url, skip=skip)}"
            stop(told_of, _INTERRUPTED)
    return total.as_json(complete=cutter.ended)


def _again(name: str, line: int, url: str | None, *, skip: bool) -> str:
    if name == "-":
        return f"go on by sending what begins with line {line}"
    more = f"{' --bad skip' if skip else ''}{f' --url {shlex.quote(url)}' if url else ''}"
    return f"go on with: nearhit import {shlex.quote(name)} --from-line {line}{more}"


class _Total:
    """What became of the pieces of a file, put together."""

    _COUNTS = ("lines", "imported", "replaced", "known", "expired", "evicted", "other_upstream", "bad_count")

    def __init__(self) -> None:
        self._counts = dict.fromkeys(self._COUNTS, 0)
        self._bad: list[dict[str, Any]] = []

    def add(self, told: Mapping[str, Any]) -> None:
        for name in self._COUNTS:
            self._counts[name] += int(told[name])
        self._bad = [*self._bad, *told["bad"]][:100]

    def add_bad(self, line: int, why: str) -> None:
        self._counts["bad_count"] += 1
        self._counts["lines"] += 1
        self._bad = [*self._bad, {"line": line, "why": why}][:100]

    @property
    def imported(self) -> int:
        return self._counts["imported"] + self._counts["replaced"]

    def as_json(self, *, complete: bool) -> dict[str, Any]:
        return {**self._counts, "bad": self._bad, "complete": complete}


_MEANING = (
    ("imported", "new entries"),
    ("replaced", "took the place of older ones"),
    ("known", "were there already, the same or newer"),
    ("expired", "had expired"),
    ("bad_count", "bad lines"),
)


def _tell_import(told: Mapping[str, Any]) -> None:
    for name, meaning in _MEANING:
        if told[name] or name == "imported":
            click.echo(f"{told[name]:>9} {meaning}")
    for one in told["bad"][:_SHOWN_BAD]:
        click.echo(f"line {one['line']}: {one['why']}", err=True)
    if told["bad_count"] > _SHOWN_BAD:
        click.echo(f"and {told['bad_count'] - _SHOWN_BAD} more; --json lists a hundred", err=True)
    if told["other_upstream"]:
        click.echo(
            f"{told['other_upstream']} of them came from another upstream or model than the one here now: "
            "nothing will find them until that is back",
            err=True,
        )
    if told["evicted"]:
        click.echo(f"{told['evicted']} entries went: cache.max_entries or cache.max_bytes is reached", err=True)
    if not told["complete"]:
        click.echo("the file has no end line: it is a part of an export, and the rest is missing", err=True)
