"""`python -m bench`: nearhit measured against references in the same run.

Exit code 1: a target does not hold; 2: not all could be measured.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from bench import acceptance, eviction, flight, memory, near, prefixes, scale, speed, upkeep
from bench.lab import NEAR_ENTRIES, Lab, lab
from bench.load import Invalid
from bench.peers import NotStarted
from bench.requests import generated, read
from bench.start import start
from bench.table import Row, as_json, table_of

Scenario = Callable[[Lab], list[Row]]

SCENARIOS: dict[str, Scenario] = {
    "hit": speed.hit,
    "miss": speed.miss,
    "stream": speed.stream,
    "start": start,
    "memory": memory.memory,
    "near": near.near,
    "flight": flight.flight,
}
EXIT_MISSED = 1
EXIT_INVALID = 2
_LINE = 110
"""Characters that the table takes; a pipe or a small terminal would have its figures cut off."""

_progress = Console(stderr=True, highlight=False)


def _names(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    return _chosen(value, SCENARIOS)


def _chosen(value: str, scenarios: Iterable[str]) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in scenarios]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(scenarios)}")
    return names


@click.group(invoke_without_command=True)
@click.option("--only", callback=_names, default=",".join(SCENARIOS), show_default=True, help="Which scenarios to run.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50), help="Rounds of each scenario.")
@click.option("--entries", default=NEAR_ENTRIES, show_default=True, type=click.IntRange(10_000), help="For near alone.")
@click.option("--json", "for_programs", is_flag=True, help="Print JSON, with the value of every round.")
@click.pass_context
def main(context: click.Context, *, only: list[str], rounds: int, entries: int, for_programs: bool) -> None:
    """Measure nearhit against references that run beside it, in turns."""
    # Servers are ended by leaving blocks, which a plain SIGTERM would not do.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if context.invoked_subcommand is None:
        _report({name: SCENARIOS[name] for name in only}, rounds, for_programs, entries)


@main.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.1, 24 * 60))
@click.option("--json", "for_programs", is_flag=True, help="Print JSON.")
def soak(*, minutes: float, for_programs: bool) -> None:
    """Keep a mixed load on nearhit and watch its memory."""
    _report({"soak": lambda place: memory.soak(place, minutes * 60, _progress.print)}, 1, for_programs)


@main.command("upkeep")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option("--json", "for_programs", is_flag=True, help="Print JSON, with the value of every round.")
def watch_upkeep(*, rounds: int, for_programs: bool) -> None:
    """Measure hits while very much is removed, space is given back, and answers are stored."""
    _report({"upkeep": upkeep.upkeep}, rounds, for_programs)


@main.command("scale")
@click.option("--entries", default=scale.ENTRIES, show_default=True, type=click.IntRange(10_000))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option("--json", "for_programs", is_flag=True, help="Print JSON, with the value of every round.")
def compare_sizes(*, entries: int, rounds: int, for_programs: bool) -> None:
    """Compare a file with very many entries with one of 10,000."""
    _report({"scale": lambda place: scale.scale(place, entries)}, rounds, for_programs)


@main.command("prefixes")
@click.option("--only", default=",".join(prefixes.SCENARIOS), show_default=True, help="Which scenarios to run.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 50))
@click.option("--json", "for_programs", is_flag=True, help="Print JSON, with the value of every round.")
def await_first_token(*, only: str, rounds: int, for_programs: bool) -> None:
    """Measure the time to the first token of a real llama.cpp, with its prefix cache seeded and without."""
    _report({name: prefixes.SCENARIOS[name] for name in _chosen(only, prefixes.SCENARIOS)}, rounds, for_programs)


@main.command("acceptance")
@click.option("--trace", envvar="ACCEPTANCE_TRACE", default="", help="A log of requests with labels, JSON Lines.")
@click.option("--requests", default=300, show_default=True, type=click.IntRange(min=1), help="How many of it.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 50))
def accept(*, trace: str, requests: int, rounds: int) -> None:
    """Send a log of requests to a real llama.cpp, directly and through nearhit."""
    try:
        log = read(Path(trace), requests) if trace else generated(requests)
        done = acceptance.accept(log, rounds, lambda text: _progress.print(text, style="dim", markup=False))
    except KeyboardInterrupt:
        _progress.print("stopped; nothing is left running")
        sys.exit(128 + signal.SIGINT)
    except (Invalid, acceptance.DemoError, OSError) as error:
        _progress.print(f"acceptance says nothing: {type(error).__name__}: {error}", style="red", markup=False)
        sys.exit(EXIT_INVALID)
    console = Console(highlight=False, width=max(_LINE, _progress.width))
    holds = acceptance.report(console, done, Path(trace).name if trace else "generated")
    sys.exit(0 if holds else EXIT_MISSED)


def _report(
    scenarios: Mapping[str, Scenario], rounds: int, for_programs: bool, near_entries: int = NEAR_ENTRIES
) -> NoReturn:
    rows: list[Row] = []
    invalid = False
    try:
        with lab(rounds, lambda text: _progress.print(f"[dim]{text}[/dim]"), near_entries) as place:
            for name, scenario in scenarios.items():
                try:
                    rows += scenario(place)
                except (Invalid, NotStarted, OSError) as error:
                    invalid = True
                    _progress.print(f"{name} says nothing: {type(error).__name__}: {error}", style="red", markup=False)
    except KeyboardInterrupt:
        _progress.print("stopped; nothing is left running")
        sys.exit(128 + signal.SIGINT)
    if for_programs:
        print(json.dumps(as_json(rows), indent=2))
    elif rows:
        console = Console(highlight=False, width=max(_LINE, _progress.width))
        console.print(table_of(rows))
        console.print(f"on {os.cpu_count()} cores, shared with whatever else runs here", style="dim")
    missed = any(row.holds is False for row in rows)
    sys.exit(EXIT_INVALID if invalid else EXIT_MISSED if missed else 0)


main.add_command(eviction.main)

if __name__ == "__main__":
    main(prog_name="python -m bench")
