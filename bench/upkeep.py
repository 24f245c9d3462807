"""Latency of hits while nearhit removes 100,000 entries, gives space back and stores, beside that of a minute before.

`python -m bench.upkeep serve ...` is `nearhit serve ...` whose first sweep comes soon: only these constants differ.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from bench.bulk import HOUR_MS, Bulk, fill
from bench.lab import Lab
from bench.load import Invalid, drive
from bench.loop import loop_factory
from bench.measure import percentile
from bench.messages import question
from bench.peers import Peer, Server, get, nearhit, running
from bench.prompts import prompt
from bench.table import Row
from proxy import cli
from proxy.web import services
from storage.sqlite_file import connect

_GOING = 100_000
_LIVE = 5_000
"""Twice what the hot tier holds: asked one after the other, each comes from SQLite."""
_BOUND = 2 * _LIVE
_TOP_K = 6_000
_PER_TOPIC = 20_000
_SWEEP_AFTER_S = 18.0
_OLD_MS = 40 * 24 * HOUR_MS
_DEAR_MS = 100_000
_WARM_UP_S = 2.0
_STORING_S = 15.0
_HITS_PER_S = 500
_MISSES_PER_S = 50
_CONNECTIONS = 32
_LOOK_S = 0.1
_LONGEST_S = 180.0
_SETTLED_S = 3.0
_FEWEST_HITS = 400
_MOST = 2.0
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ROOMY = 1_000_000_000_000
_SEEN = "SELECT (SELECT sum(entries) FROM topic), page_count FROM pragma_page_count"


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
    """Ask at a constant rate before and during each kind of work."""
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
    config = f"cache:\n  max_entries: {bound}\n  max_bytes: {_ROOMY}\n  top_k: {_TOP_K}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    lab.say(f"upkeep: {_GOING:,} entries for {name} stored in {fill(folder / 'nearhit.db', bulk):.0f} s")
    return folder


def _measured(lab: Lab, built: Path, goal: int, *, is_storing: bool) -> dict[str, tuple[_Figures, _Figures]]:
    """For each stretch of a run: what hits took in it, and in the quiet before."""
    folder = lab.new_folder("upkeep")
    shutil.copytree(built, folder, dirs_exist_ok=True)
    with running(_peer(folder), lab.upstream.url, folder) as server:
        _until_loaded(server)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            try:
                run = runner.run(_ask(lab, server, folder / "nearhit.db", goal, is_storing=is_storing))
            except ExceptionGroup as failed:
                raise Invalid(str(failed.exceptions[0])) from failed
    shutil.rmtree(folder)
    stretches = _stretches(run, goal)
    quiet = _figures(run, *stretches.pop("quiet"))
    return {name: (_figures(run, *stretch), quiet) for name, stretch in stretches.items()}


def _peer(folder: Path) -> Peer:
    usual = nearhit("--config", str(folder / "config.yaml"))

    def command(upstream: str, data: Path) -> Sequence[str]:
        return [sys.executable, "-m", "bench.upkeep", *usual.command(upstream, data)[3:]]

    return Peer("nearhit", command, usual.ready)


def _until_loaded(server: Server) -> None:
    deadline = time.monotonic() + _SWEEP_AFTER_S / 2
    while time.monotonic() < deadline:
        if get(server, "/-/stats")[1]["near"]["state"] == "on":
            return
        time.sleep(0.1)
    raise Invalid("nearhit took too long to load its lists: the machine is too busy")


async def _ask(lab: Lab, server: Server, path: Path, goal: int, *, is_storing: bool) -> _Run:
    """Ask until everything that goes is gone and the file shrinks no more."""
    run = _Run()
    asked: asyncio.Queue[tuple[float, bytes, bool | None]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        connection = stack.enter_context(closing(connect(f"{path.as_uri()}?mode=ro", uri=True)))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_answered(server, asked, run)) for _ in range(_CONNECTIONS)]
            tasks.append(group.create_task(_pace(asked, _hits(), _HITS_PER_S)))
            await _until_done(connection, goal, run)
            if is_storing:
                begun = time.perf_counter()
                new = ((question(prompt(number)), None) for number in itertools.count())
                tasks.append(group.create_task(_pace(asked, new, _MISSES_PER_S)))
                await asyncio.sleep(_STORING_S)
                run.storing = (begun, time.perf_counter())
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
    asked: asyncio.Queue[tuple[float, bytes, bool | None]], requests: Iterator[tuple[bytes, bool | None]], per_s: float
) -> None:
    begun = time.perf_counter()
    for number, (request, is_hot) in enumerate(requests):
        wait = begun + number / per_s - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        # Of this moment, not of the one that was meant: a late turn here is not the server's fault.
        asked.put_nowait((time.perf_counter(), request, is_hot))


async def _answered(server: Server, asked: asyncio.Queue[tuple[float, bytes, bool | None]], run: _Run) -> None:
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
            run.hits.append(_Hit(at, (time.perf_counter() - at) * 1000, is_hot))
    finally:
        writer.close()


async def _until_done(connection: sqlite3.Connection, goal: int, run: _Run) -> None:
    """Watch the file until no more than `goal` entries are there and it shrinks no more."""
    deadline = time.monotonic() + _LONGEST_S
    changed = time.monotonic()
    while time.monotonic() < deadline:
        ((entries, pages),) = connection.execute(_SEEN)
        seen = _Seen(time.perf_counter(), entries, pages)
        if not run.seen or run.seen[-1].pages != pages or entries > goal:
            changed = time.monotonic()
        run.seen.append(seen)
        if time.monotonic() - changed > _SETTLED_S:
            return
        await asyncio.sleep(_LOOK_S)
    raise Invalid(f"upkeep was not done within {_LONGEST_S:g} s: {run.seen[-1].entries:,} entries are left")


def _stretches(run: _Run, goal: int) -> dict[str, tuple[float, float]]:
    """From when to when nothing was done, entries were removed, space was given back, and answers were stored."""
    full = [seen.at for seen in run.seen if seen.entries == run.seen[0].entries]
    removed = next(seen.at for seen in run.seen if seen.entries <= goal)
    shrunk = next(seen.at for seen in run.seen if seen.pages == run.seen[-1].pages and seen.at >= removed)
    found = {"quiet": (full[0] + _WARM_UP_S, full[-1] - _LOOK_S), "removing": (full[-1], removed)}
    if shrunk > removed:
        found["giving space back"] = (removed, shrunk)
    if run.storing is not None:
        found[f"storing {_MISSES_PER_S}/s at the bound"] = run.storing
    return found


def _figures(run: _Run, begin: float, end: float) -> _Figures:
    hits = [hit for hit in run.hits if begin <= hit.at < end]
    if len(hits) < _FEWEST_HITS:
        raise Invalid(f"{len(hits)} hits in {end - begin:.1f} s tell nothing")
    every = [hit.ms for hit in hits]
    return _Figures(
        seconds=end - begin,
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
        row("this long", "s", lambda figures: figures.seconds),
    ]


def main() -> None:
    """Serve, with the first sweep after `_SWEEP_AFTER_S` seconds and a clock that is believed at once."""
    services._UPKEEP_S = _SWEEP_AFTER_S  # noqa: SLF001 - people wait longer, and figures must not
    services._SETTLE_S = 0.0  # noqa: SLF001
    cli.main()


if __name__ == "__main__":
    main()
