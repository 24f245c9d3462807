"""Latency of hits while nearhit removes 100,000 entries, gives space back and stores, beside that of quiet seconds.

Quiet and busy seconds take turns, so that whatever else the machine does falls on both alike. `python -m bench.upkeep
serve ...` is `nearhit serve ...` whose first sweep comes soon, and which does the work of a sweep in busy seconds only.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.bulk import HOUR_MS, Bulk, fill
from bench.lab import Lab
from bench.load import Invalid, drive
from bench.loop import loop_factory
from bench.measure import percentile
from bench.messages import question
from bench.peers import Peer, Server, nearhit, running
from bench.prompts import prompt
from bench.table import Row
from proxy import cli
from proxy.web import services
from storage.renewal import RenewableStore
from storage.sqlite_file import connect

_GOING = 100_000
_LIVE = 5_000
"""Twice what the hot tier holds: asked one after the other, each comes from SQLite."""
_BOUND = 2 * _LIVE
_TOP_K = 6_000
_PER_TOPIC = 20_000
_SWEEP_AFTER_S = 6.0
_OLD_MS = 40 * 24 * HOUR_MS
_DEAR_MS = 100_000
_TURN_S = 1.0
_AFTER_S = 0.3
"""What busy seconds leave behind, such as a last step or a batch that waits to be written, counts for neither."""
_STORING_S = 20.0
_HITS_PER_S = 500
_MISSES_PER_S = 100
_CONNECTIONS = 32
_TICK_S = 0.005
_LOOK_S = 0.1
_LONGEST_S = 240.0
_SETTLED_S = 3.0
_FEWEST_HITS = 100
_MOST = 2.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ROOMY = 1_000_000_000_000
_SEEN = "SELECT (SELECT sum(entries) FROM topic), page_count FROM pragma_page_count"


_Asked = tuple[float, bytes, bool | None]
"""When, what, and whether it is the hot question; None is a new one."""


@dataclass(frozen=True, slots=True)
class _Hit:
    at: float
    ms: float
    is_hot: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """The file at a moment."""

    at: float
    entries: int
    pages: int


@dataclass(slots=True)
class _Run:
    """What one server was asked, and what its file looked like meanwhile."""

    hits: list[_Hit] = field(default_factory=list)
    seen: list[_Seen] = field(default_factory=list)
    storing: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Figures:
    """Latencies in ms over a stretch of time."""

    seconds: float
    p50: float
    hot_p99: float
    stored_p99: float
    longest: float


def upkeep(lab: Lab) -> list[Row]:
    """Ask at a constant rate, in busy seconds and in quiet ones, for each kind of work."""
    template = _template(lab)
    now_ms = time.time_ns() // 1_000_000
    numbers = range(_GOING)
    files = {
        "expiry": Bulk(numbers, _PER_TOPIC, now_ms - _OLD_MS, now_ms - HOUR_MS),
        "trim": Bulk(numbers, _PER_TOPIC, now_ms - _OLD_MS, now_ms + 24 * HOUR_MS),
    }
    built = {name: _built(lab, template, name, bulk) for name, bulk in files.items()}
    found: dict[str, list[tuple[_Figures, _Figures]]] = {}
    for number in range(lab.rounds):
        for name, folder in built.items():
            lab.say(f"upkeep: round {number + 1} of {lab.rounds}, {name}")
            goal = _BOUND if name == "trim" else _LIVE
            for stretch, pair in _measured(lab, folder, goal, is_storing=name == "trim").items():
                found.setdefault(name if stretch == "removing" else stretch, []).append(pair)
    return [row for name, pairs in found.items() for row in _rows(name, pairs)]


def _template(lab: Lab) -> Path:
    """A folder of a nearhit that has stored the answers that are asked for."""
    folder = lab.new_folder("template")
    lab.say(f"upkeep: storing {_LIVE:,} answers")
    with running(nearhit(), lab.upstream.url, folder) as server:
        drive(server.port, _live(), connections=8).only("MISS")
    with closing(connect(str(folder / "nearhit.db"))) as connection:
        # The fake upstream is so quick that its answers would be the first to go.
        connection.execute("UPDATE entry SET cost_ms = ?, worth = ?", (_DEAR_MS, float(_DEAR_MS)))
    return folder


def _live() -> list[bytes]:
    return [question(f"What does page {number} of the handbook say?") for number in range(_LIVE)]


def _built(lab: Lab, template: Path, name: str, bulk: Bulk) -> Path:
    folder = lab.new_folder(name)
    shutil.copytree(template, folder, dirs_exist_ok=True)
    bound = _BOUND if name == "trim" else _ROOMY // 1000
    # Comparing words takes time of every miss, which is not upkeep's.
    config = f"cache:\n  mode: exact\n  max_entries: {bound}\n  max_bytes: {_ROOMY}\n  top_k: {_TOP_K}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    lab.say(f"upkeep: {_GOING:,} entries for {name} stored in {fill(folder / 'nearhit.db', bulk):.0f} s")
    return folder


def _measured(lab: Lab, built: Path, goal: int, *, is_storing: bool) -> dict[str, tuple[_Figures, _Figures]]:
    """For each stretch of a run: what hits took in its busy seconds, and in its quiet ones."""
    folder = lab.new_folder("upkeep")
    shutil.copytree(built, folder, dirs_exist_ok=True)
    with (
        running(_peer(folder), lab.upstream.url, folder) as server,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        try:
            run = runner.run(_ask(server, folder / "nearhit.db", goal, is_storing=is_storing))
        except ExceptionGroup as failed:
            raise Invalid(str(failed.exceptions[0])) from failed
    shutil.rmtree(folder)
    found: dict[str, tuple[_Figures, _Figures]] = {}
    for name, (begin, end) in _stretches(run, goal).items():
        hits = [hit for hit in run.hits if begin <= hit.at < end]
        busy = [hit for hit in hits if _is_busy(hit.at)]
        found[name] = _figures(busy, end - begin), _figures([hit for hit in hits if _is_quiet(hit.at)], end - begin)
    return found


def _is_busy(at: float) -> bool:
    return at % (2 * _TURN_S) >= _TURN_S


def _is_quiet(at: float) -> bool:
    return _AFTER_S <= at % (2 * _TURN_S) < _TURN_S


def _peer(folder: Path) -> Peer:
    usual = nearhit("--config", str(folder / "config.yaml"))

    def command(upstream: str, data: Path) -> Sequence[str]:
        return [sys.executable, "-m", "bench.upkeep", *usual.command(upstream, data)[3:]]

    return Peer("nearhit", command, usual.ready)


async def _ask(server: Server, path: Path, goal: int, *, is_storing: bool) -> _Run:
    """Ask until everything that goes is gone and the file shrinks no more."""
    run = _Run()
    asked: asyncio.Queue[_Asked] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        connection = stack.enter_context(closing(connect(f"{path.as_uri()}?mode=ro", uri=True)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answered(server, asked, run)) for _ in range(_CONNECTIONS)]
            tasks.append(group.create_task(_pace(asked, _hits(), _HITS_PER_S)))
            await _until_done(connection, goal, run)
            if is_storing:
                begun = time.monotonic()
                new = ((question(prompt(number)), None) for number in itertools.count())
                tasks.append(group.create_task(_pace(asked, new, _MISSES_PER_S, in_busy_seconds=True)))
                await asyncio.sleep(_STORING_S)
                run.storing = (begun, time.monotonic())
            for task in tasks:
                task.cancel()
    return run


def _hits() -> Iterator[tuple[bytes, bool | None]]:
    """The same question and another one by turns."""
    live = _live()
    hot = live.pop()
    for other in itertools.cycle(live):
        yield hot, True
        yield other, False


async def _pace(
    asked: asyncio.Queue[_Asked],
    requests: Iterator[tuple[bytes, bool | None]],
    per_s: float,
    *,
    in_busy_seconds: bool = False,
) -> None:
    due = time.monotonic()
    for request, is_hot in requests:
        while time.monotonic() < due or (in_busy_seconds and not _is_busy(time.monotonic())):  # noqa: ASYNC110
            await asyncio.sleep(max(due - time.monotonic(), _TICK_S / 5))
        # Of this moment, not of the one that was meant: a late turn here is not the server's fault.
        asked.put_nowait((time.monotonic(), request, is_hot))
        due = max(due, time.monotonic() - 1 / per_s) + 1 / per_s


async def _answered(server: Server, asked: asyncio.Queue[_Asked], run: _Run) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        while True:
            at, request, is_hot = await asked.get()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            if length is None or not head.startswith(b"HTTP/1.1 200"):
                raise Invalid(f"not an answer: {head[:200]!r}")
            await reader.readexactly(int(length[1]))
            if is_hot is None:
                continue
            if b"\r\nX-Cache: HIT" not in head:
                raise Invalid("a stored answer did not come from the cache")
            run.hits.append(_Hit(at, (time.monotonic() - at) * 1000, is_hot))
    finally:
        writer.close()


async def _until_done(connection: sqlite3.Connection, goal: int, run: _Run) -> None:
    """Watch the file until no more than `goal` entries are there and it shrinks no more."""
    changed = time.monotonic()
    deadline = changed + _LONGEST_S
    while time.monotonic() < deadline:
        ((entries, pages),) = connection.execute(_SEEN)
        seen = _Seen(time.monotonic(), entries, pages)
        if not run.seen or run.seen[-1].pages != pages or entries > goal:
            changed = time.monotonic()
        run.seen.append(seen)
        if time.monotonic() - changed > _SETTLED_S:
            return
        await asyncio.sleep(_LOOK_S)
    raise Invalid(f"upkeep was not done within {_LONGEST_S:g} s: {run.seen[-1].entries:,} entries are left")


def _stretches(run: _Run, goal: int) -> dict[str, tuple[float, float]]:
    """From when to when entries were removed, space was given back, and answers were stored."""
    full = [seen.at for seen in run.seen if seen.entries == run.seen[0].entries]
    removed = next(seen.at for seen in run.seen if seen.entries <= goal)
    shrunk = next(seen.at for seen in run.seen if seen.pages == run.seen[-1].pages and seen.at >= removed)
    found = {"removing": (full[-1], removed), "giving space back": (removed, shrunk)}
    if run.storing is not None:
        found[f"storing {_MISSES_PER_S}/s at the bound"] = run.storing
    return found


def _figures(hits: Sequence[_Hit], seconds: float) -> _Figures:
    if len(hits) < _FEWEST_HITS:
        raise Invalid(f"{len(hits)} hits in {seconds:.1f} s tell nothing")
    every = [hit.ms for hit in hits]
    return _Figures(
        seconds=seconds,
        p50=percentile(every, 0.5),
        hot_p99=percentile([hit.ms for hit in hits if hit.is_hot], 0.99),
        stored_p99=percentile([hit.ms for hit in hits if not hit.is_hot], 0.99),
        longest=max(every),
    )


def _rows(name: str, pairs: Sequence[tuple[_Figures, _Figures]]) -> list[Row]:
    def row(what: str, unit: str, figure: Callable[[_Figures], float], limit: float | None = None) -> Row:
        during, quiet = zip(*((figure(now), figure(before)) for now, before in pairs), strict=True)
        return Row(f"upkeep: {name}: {what}", unit, during, quiet, "quiet", limit=limit)

    return [
        row("hits from memory, p99", "ms", lambda figures: figures.hot_p99, _MOST),
        row("hits from the file, p99", "ms", lambda figures: figures.stored_p99, _MOST),
        row("all hits, p50", "ms", lambda figures: figures.p50),
        row("the slowest hit", "ms", lambda figures: figures.longest),
        Row(f"upkeep: {name}: in busy seconds of", "s", tuple(now.seconds for now, _ in pairs)),
    ]


def main() -> None:
    """Serve, with the first sweep after `_SWEEP_AFTER_S` seconds and a clock that is believed at once."""
    services._UPKEEP_S = _SWEEP_AFTER_S  # noqa: SLF001 - people wait longer, and figures must not
    services._SETTLE_S = 0.0  # noqa: SLF001
    for step in ("expire", "trim", "give_back"):
        setattr(RenewableStore, step, _by_turns(getattr(RenewableStore, step)))
    cli.main()


def _by_turns(step: Callable[..., Awaitable[int]]) -> Callable[..., Awaitable[int]]:
    """The step, begun in busy seconds only."""

    async def wait_and_do(*arguments: Any) -> int:
        while not _is_busy(time.monotonic()):  # noqa: ASYNC110 - a clock tells nobody
            await asyncio.sleep(_TICK_S)
        return await step(*arguments)

    return wait_and_do


if __name__ == "__main__":
    main()
