"""The figures of a running nearhit again and again, with what happened between two looks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from proxy.ask import AskError, Refused, ask
from proxy.commands.options import stop
from proxy.settings import Settings
from proxy.telling import clean, span, took

_SILENCE_S = 5.0
_NO = "not answering, trying again"
_FROM_CACHE = ("HIT", "NEAR", "STALE")


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment; `stats` is None where nothing answered, for the reason in `trouble`."""

    at_s: float
    stats: Mapping[str, Any] | None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Between:
    """What happened between two looks at the same run of nearhit."""

    seconds: float
    outcomes: Mapping[str, int]
    saved_ms: int

    @property
    def requests(self) -> int:
        """Calls for answers."""
        return sum(self.outcomes.values())

    @property
    def hit_rate(self) -> float | None:
        """Part of the calls that the cache answered; None where there was none."""
        return sum(self.outcomes.get(name, 0) for name in _FROM_CACHE) / self.requests if self.requests else None


def between(before: Look | None, now: Look) -> Between | None:
    """What happened in between; None where one of both saw nothing, or nearhit was started anew."""
    if before is None or before.stats is None or now.stats is None or now.stats["uptime_s"] < before.stats["uptime_s"]:
        return None
    counts, earlier = now.stats["requests"], before.stats["requests"]
    outcomes = {name: count - earlier.get(name, 0) for name, count in counts.items()}
    saved_ms = now.stats["cache.saved_ms"] - before.stats["cache.saved_ms"]
    if min(saved_ms, *outcomes.values()) < 0:
        return None
    return Between(now.at_s - before.at_s, outcomes, saved_ms)


def watch(settings: Settings, url: str | None, every_s: float, *, as_json: bool) -> None:
    """Look every so many seconds until interrupted; a table on a terminal, or a line of JSON for each look."""
    try:
        looks = _looks(settings, url, every_s)
        if as_json:
            _watch_lines(looks)
        else:
            _watch_table(looks, every_s)
    except KeyboardInterrupt:
        return


def _looks(settings: Settings, url: str | None, every_s: float) -> Iterator[tuple[Look, Between | None]]:
    before: Look | None = None
    while True:
        look = _look(settings, url, first=before is None)
        yield look, between(before, look)
        before = look
        time.sleep(every_s)


def _look(settings: Settings, url: str | None, *, first: bool) -> Look:
    try:
        stats = ask(settings, url, "/-/stats", timeout_s=_SILENCE_S)
    except AskError as error:
        # A wrong token or address shows at once; later, what refuses may be about to stop or to start.
        if first and isinstance(error, Refused):
            stop(str(error))
        return Look(time.monotonic(), None, str(error))
    return Look(time.monotonic(), stats)


def _watch_lines(looks: Iterator[tuple[Look, Between | None]]) -> None:
    for look, change in looks:
        click.echo(json.dumps(_as_json(look, change)))


def _as_json(look: Look, change: Between | None) -> dict[str, Any]:
    told: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}
    if look.stats is None:
        return {**told, "answering": False, "trouble": look.trouble}
    told |= {
        "answering": True,
        "interval_s": None,
        "requests_per_s": None,
        "hit_rate": None,
        "saved_ms": None,
        "outcomes": None,
    }
    if change is not None:
        told |= {
            "interval_s": round(change.seconds, 3),
            "requests_per_s": round(change.requests / change.seconds, 3),
            "hit_rate": None if change.hit_rate is None else round(change.hit_rate, 4),
            "saved_ms": change.saved_ms,
            "outcomes": dict(change.outcomes),
        }
    return {**told, "stats": look.stats}


def _watch_table(looks: Iterator[tuple[Look, Between | None]], every_s: float) -> None:
    last: Look | None = None
    with Live(console=Console(), auto_refresh=False) as live:
        for look, change in looks:
            if look.stats is not None:
                last = look
            shown = [Text(f"{_NO}: {clean(look.trouble)}", "yellow")] if look.stats is None else []
            table = [_table(last.stats, change, every_s)] if last is not None and last.stats is not None else []
            live.update(Group(*shown, *table, Text("Ctrl-C ends", "dim")), refresh=True)


def _table(stats: Mapping[str, Any], change: Between | None, every_s: float) -> Table:
    table = Table("what", f"last {every_s:g} s", f"in {span(stats['uptime_s'])}", box=None, header_style="bold")
    whole = Between(max(stats["uptime_s"], 0.1), stats["requests"], stats["cache.saved_ms"])
    for name, read in _ROWS.items():
        table.add_row(name, "-" if change is None else read(change), read(whole))
    for outcome, count in stats["requests"].items():
        table.add_row(f"  {outcome}", "-" if change is None else str(change.outcomes[outcome]), str(count))
    table.add_row("entries", "", _known(stats["cache.size"]))
    table.add_row("bytes", "", _known(stats["cache.bytes"]))
    table.add_row("under way", "", str(stats["in_flight"]))
    for one in stats["upstreams"]:
        name = "upstream" if len(stats["upstreams"]) == 1 else f"upstream {one['name']}"
        table.add_row(name, "", clean(one["trouble"] or one["standing"]))
    return table


def _known(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _rate(change: Between) -> str:
    return "-" if change.hit_rate is None else f"{change.hit_rate:.1%}"


_ROWS: Mapping[str, Callable[[Between], str]] = {
    "requests/s": lambda change: f"{change.requests / change.seconds:.1f}",
    "from the cache": _rate,
    "time saved": lambda change: took(change.saved_ms),
}
