"""nearhit doctor."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from proxy.commands.options import EXIT_CONFIG, EXIT_FAILED, asked, stop, url_option, with_settings
from proxy.config import Loaded, load
from proxy.finding import Examined, Finding, Severity, worst_first
from proxy.settings import SettingsError


@click.command()
@with_settings
@url_option
@click.option("--quick", is_flag=True, help="Do not check every page and rule of the database.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(config_file: Path | None, url: str | None, *, quick: bool, as_json: bool, **flags: Any) -> None:
    """Tell what is wrong, or what would make nearhit save more. Exits with 1 if there is a problem.

    Configuration, files, database, upstream and clock are looked at whether or not nearhit runs; nothing is changed.
    With --url, only the nearhit there is asked.

    Example: nearhit doctor
    """
    if url is not None:
        told = asked(config_file, flags, url, "/-/doctor")["findings"]
        _tell([], told, as_json=as_json)
        return
    loaded = _loaded(config_file, flags)
    examined = list(_examined(loaded, config_file, is_quick=quick))
    # The data directory is usually that of the database, too.
    findings = worst_first(dict.fromkeys(finding for one in examined for finding in one.findings))
    _tell(examined, [asdict(finding) for finding in findings], as_json=as_json)


def _loaded(config_file: Path | None, flags: Mapping[str, Any]) -> Loaded:
    # As every command does, but its warnings are findings here.
    try:
        return load(config_file, os.environ, {name.replace("__", "."): value for name, value in flags.items()})
    except SettingsError as error:
        stop(str(error), EXIT_CONFIG)


def _examined(loaded: Loaded, config_file: Path | None, *, is_quick: bool) -> Iterator[Examined]:
    # Imported here: other commands do without.
    from proxy.diagnosis import files, servers
    from proxy.diagnosis.clock import TOLERATED_MS, clock, date_ms
    from proxy.diagnosis.prefixes import prefixes

    settings, path = loaded.settings, loaded.settings.database
    warnings = tuple(Finding(Severity.ADVICE, warning) for warning in loaded.warnings)
    yield Examined("configuration", str(config_file or "no file: environment, flags and defaults"), warnings)
    yield files.data_directory(settings.data)
    database, is_readable = files.database(path, settings.cache.max_bytes)
    yield from database
    ahead = None
    if path is not None and is_readable:
        with _telling(f"checking {path} ..."):
            if not is_quick:
                yield files.contents(path)
            ahead = files.ahead(path, _now_ms() + TOLERATED_MS, is_quick=is_quick)
    running = servers.running(settings)
    yield running.examined if running is not None else servers.not_running()
    if running is None:
        answering = servers.upstream(settings.upstream)
        yield answering.examined
        yield from (servers.upstream(more).examined for more in settings.upstreams)
        yield from prefixes(settings)
        date = answering.date
    else:
        # That one looks at its upstream all the time, and has told already.
        date = servers.date_of(running.upstream) if running.upstream else None
    yield clock(_now_ms(), ahead, date_ms(date))


def _telling(what: str) -> AbstractContextManager[object]:
    """A line on stderr while something takes long; nothing where there is no terminal."""
    from proxy.telling import clean

    console = Console(stderr=True)
    return console.status(Text(clean(what))) if console.is_terminal else nullcontext()


def _tell(examined: list[Examined], findings: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(findings, indent=2))
    else:
        from proxy.telling import tell_examined, tell_findings

        console = Console(soft_wrap=True)
        tell_findings(console, findings)
        if examined:
            tell_examined(console, examined)
        if all(finding["severity"] == Severity.NOTE for finding in findings):
            click.echo("all is well")
    if any(finding["severity"] == Severity.PROBLEM for finding in findings):
        sys.exit(EXIT_FAILED)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
