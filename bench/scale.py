"""A file with very many entries beside one with 10,000: look-ups, start, import, upkeep's questions, memory."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.bulk import HOUR_MS, Bulk, fill, insert, key_of
from bench.lab import Lab, make_hit
from bench.load import Invalid, drive
from bench.loop import loop_factory
from bench.measure import cpu_seconds, percentile, resident_mb
from bench.peers import Peer, nearhit, running
from bench.table import Judged, Row
from storage.base import Put, Room
from storage.listing import Which
from storage.presence import Presence
from storage.sqlite import open_sqlite
from storage.sqlite_file import connect
from storage.store import Store
from storage.write_behind import BATCH

ENTRIES = 1_000_000
_FEW = 10_000
_PER_TOPIC = 500
_LOOK_UPS = 3_000
_BATCHES = 12
_QUESTIONS = 9
_PAGE = 100
_TICK_S = 0.001
_SWITCH_S = 0.001
_IDLE_CPU = 0.05
_SETTLES_S = 60.0
_SAME_CACHE_KIB = 8192
_WIDE = Room(1 << 40, 1 << 50, 1 << 40)


@dataclass(slots=True)
class _Place:
    """A folder with a file of so many entries, and what each round found there."""

    name: str
    folder: Path
    entries: int
    found: dict[str, list[float]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / "nearhit.db"

    def note(self, what: str, value: float) -> None:
        self.found.setdefault(what, []).append(value)


def scale(lab: Lab, entries: int) -> list[Row]:
    """Compare a file of `entries` with one of 10,000."""
    few = _Place("few", lab.new_folder("few"), _FEW)
    many = _Place("many", lab.new_folder("many"), entries)
    now_ms = time.time_ns() // 1_000_000
    for place in (few, many):
        lab.say(f"scale: storing {place.entries:,} entries")
        took_s = fill(place.path, Bulk(range(place.entries), _PER_TOPIC, now_ms - HOUR_MS, now_ms + 24 * HOUR_MS))
        lab.say(f"scale: stored in {took_s:.0f} s, {place.path.stat().st_size / 1e6:,.0f} MB")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_in_process(lab, few, many))
    _starts(lab, few, many)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_imports(lab, few, many))
    for place in (few, many):
        shutil.rmtree(place.folder)
    return _rows(few, many)


async def _in_process(lab: Lab, few: _Place, many: _Place) -> None:
    # As `nearhit serve` has it: how long a thread that reads rows may keep the event loop waiting.
    sys.setswitchinterval(_SWITCH_S)
    async with open_sqlite(few.path) as small, open_sqlite(many.path) as large:
        stores = ((few, small), (many, large))
        for place, store in stores:
            await _look_up(_Place("warm-up", place.folder, place.entries), store)
        for number in range(lab.rounds):
            for place, store in stores if number % 2 else stores[::-1]:
                lab.say(f"scale: round {number + 1} of {lab.rounds}, {place.entries:,} entries")
                await _look_up(place, store)
                await _ask(place, store)
                await _learn_keys(place, store)


async def _look_up(place: _Place, store: Store) -> None:
    now_ms = time.time_ns() // 1_000_000
    took_us: list[float] = []
    for key in [key_of(random.randrange(place.entries)) for _ in range(_LOOK_UPS)]:
        begun = time.perf_counter()
        found = await store.get(key, now_ms)
        took_us.append((time.perf_counter() - begun) * 1e6)
        if found is None:
            raise Invalid("a stored entry was not found")
    place.note("look-up p50", percentile(took_us, 0.5))
    place.note("look-up p99", percentile(took_us, 0.99))


async def _ask(place: _Place, store: Store) -> None:
    """What upkeep and people ask while nothing is to be removed."""
    anything = Which()
    questions: dict[str, Callable[[], Awaitable[object]]] = {
        "totals": store.totals,
        "trim, nothing to do": lambda: store.trim(_WIDE, 1),
        "expire, nothing to do": lambda: store.expire(0, 1),
        f"page of {_PAGE}": lambda: store.select(anything, 0, _PAGE, newest_first=True),
    }
    for what, question in questions.items():
        took_ms: list[float] = []
        for _ in range(_QUESTIONS):
            begun = time.perf_counter()
            await question()
            took_ms.append((time.perf_counter() - begun) * 1000)
        place.note(what, median(took_ms))


async def _learn_keys(place: _Place, store: Store) -> None:
    """How long it takes until absent keys are told from memory, and how long others wait for their turn meanwhile."""
    presence = Presence()
    absent = [os.urandom(32) for _ in range(8)]
    async with _ticking() as idle:
        await asyncio.sleep(1)
    begun = time.perf_counter()
    async with _ticking() as waits, _task(presence.follow(store)):
        while not any(presence.lacks(key) for key in absent):  # noqa: ASYNC110 - it tells nobody when it is done
            await asyncio.sleep(_TICK_S)
    place.note("keys known", time.perf_counter() - begun)
    for name, turns in (("idle", idle), ("turn", waits)):
        place.note(f"{name} p99", percentile(turns, 0.99))
        place.note(f"{name} max", max(turns))


@asynccontextmanager
async def _ticking() -> AsyncIterator[list[float]]:
    """How long another task waited for each of its turns while the block ran, in ms."""
    waits: list[float] = [0.0]

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            waits.append((time.perf_counter() - begun - _TICK_S) * 1000)

    async with _task(tick()):
        yield waits


@asynccontextmanager
async def _task(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _starts(lab: Lab, few: _Place, many: _Place) -> None:
    request = lab.new_question()
    for place in (few, many):
        # Bounds that hold more than there is: upkeep would remove what is measured.
        config = "cache:\n  max_entries: 100000000\n  max_bytes: 1000000000000\n"
        (place.folder / "config.yaml").write_text(config, encoding="utf-8")
        lab.say(f"scale: starting with {place.entries:,} entries")
        with running(_peer(place), lab.upstream.url, place.folder) as server:
            make_hit(server, request)
    for number in range(lab.rounds):
        for place in (few, many) if number % 2 else (many, few):
            lab.say(f"scale: start {number + 1} of {lab.rounds}, {place.entries:,} entries")
            place.note("start", _start(lab, place, request))
            _forget_pages(place.path)
            place.note("start, not in the page cache", _start(lab, place, request))


def _peer(place: _Place) -> Peer:
    return nearhit("--config", str(place.folder / "config.yaml"))


def _start(lab: Lab, place: _Place, request: bytes) -> float:
    with running(_peer(place), lab.upstream.url, place.folder) as server:
        drive(server.port, [request], connections=1).only("HIT")
        took_s = time.monotonic() - server.spawned
        _until_idle(server.pid)
        place.note("memory", resident_mb(server.pid))
    return took_s


def _until_idle(pid: int) -> None:
    deadline = time.monotonic() + _SETTLES_S
    before = cpu_seconds(pid)
    while time.monotonic() < deadline:
        time.sleep(1)
        before, last = cpu_seconds(pid), before
        if before - last < _IDLE_CPU:
            return
    raise Invalid(f"nearhit was still busy {_SETTLES_S:g} s after its start")


def _forget_pages(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


async def _imports(lab: Lab, few: _Place, many: _Place) -> None:
    """Batches of new entries by the store and by plain SQL, in turns, into the same file."""
    now_ms = time.time_ns() // 1_000_000
    starts = itertools.count(1 << 40, BATCH)
    for place in (few, many):
        async with open_sqlite(place.path) as store:
            with closing(connect(str(place.path))) as plain:
                plain.execute("PRAGMA synchronous = NORMAL")
                plain.execute(f"PRAGMA cache_size = -{_SAME_CACHE_KIB}")
                for number in range(lab.rounds):
                    lab.say(f"scale: import {number + 1} of {lab.rounds}, into {place.entries:,} entries")
                    for what in ("import", "plain"):
                        batches = [
                            list(Bulk(range(start, start + BATCH), _PER_TOPIC, now_ms, now_ms + HOUR_MS).entries())
                            for start in itertools.islice(starts, _BATCHES)
                        ]
                        begun = time.perf_counter()
                        for batch in batches:
                            if what == "import":
                                await store.write([Put(entry) for entry in batch], _WIDE)
                            else:
                                insert(plain, batch)
                        place.note(what, (time.perf_counter() - begun) * 1000 * 1000 / (_BATCHES * BATCH))


def _rows(few: _Place, many: _Place) -> list[Row]:
    name = f"{few.entries:,}"
    prefix = f"scale: {many.entries:,}"

    def beside(what: str, label: str, unit: str, judged: Judged = Judged.RATIO, limit: float | None = None) -> Row:
        mine, theirs = tuple(many.found[what]), tuple(few.found[what])
        return Row(f"{prefix}: {label}", unit, mine, theirs, name, judged, limit)

    def imported(place: _Place) -> Row:
        what = f"scale: 1,000 imported into {place.entries:,}"
        mine, plain = tuple(place.found["import"]), tuple(place.found["plain"])
        return Row(what, "ms", mine, plain, "plain SQL", Judged.VALUE, 500.0)

    asked = ("totals", "trim, nothing to do", "expire, nothing to do", f"page of {_PAGE}")
    idle = tuple(many.found["idle p99"])
    return [
        beside("look-up p50", "exact look-up, p50", "us", limit=1.5),
        beside("look-up p99", "exact look-up, p99", "us"),
        beside("start", "start to the first hit", "s", Judged.VALUE, 3.0),
        beside("start, not in the page cache", "the same, nothing in the page cache", "s", Judged.VALUE, 3.0),
        beside("keys known", "until all keys are known", "s"),
        Row(f"{prefix}: wait of others, p99", "ms", tuple(many.found["turn p99"]), idle, "idle", Judged.VALUE, 2.0),
        Row(f"{prefix}: the longest", "ms", tuple(many.found["turn max"]), tuple(many.found["idle max"]), "idle"),
        *(beside(what, what, "ms") for what in asked),
        imported(few),
        imported(many),
        beside("memory", "resident memory", "MB", Judged.VALUE, 150.0),
    ]
