"""The near look-up among few and many entries: CPU, latency, what bounding the candidates loses, memory."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from bench.lab import Lab
from bench.load import Invalid
from bench.loop import loop_factory
from bench.measure import percentile, resident_mb
from bench.prompts import long_prompt, prompt, with_courtesy, with_slip
from bench.stock import Stock, entry_of, fill
from bench.table import Judged, Row
from proxy.cache.near import matcher
from proxy.cache.near.tier import Nearest, NearTier
from proxy.settings import Settings
from storage.base import Candidate, Put, StorageError
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind

_FEW = 10_000
_PER_SPACE = 1_000
_LOOK_UPS = 400
_PLANTED = 300
_UNBOUNDED = 100
_WARM_UP = 1_500
_LONG_WORDS = 3_000
_LONG_PROMPTS = 4
_TICK_S = 0.001
_IDLE_S = 1.0
_NEW = 1
_NO_BOUND = 1 << 40
_MOST_CANDIDATES = 1_000
_NEVER_S = 3600.0


def near(lab: Lab) -> list[Row]:
    """Look up among 10,000 entries in one space, and among many in many spaces and in one."""
    entries = lab.near_entries
    spaces = max(1, entries // _PER_SPACE)
    folder = lab.new_folder("near")
    # The few are spread evenly over the many, old and new, so that the same planted prompts are sought among both.
    few = Stock(folder / "few.db", _FEW, stride=max(1, entries // _FEW))
    many = Stock(folder / "many.db", entries, spaces=spaces)
    one = Stock(folder / "one.db", entries)
    lab.say(f"near: storing {_FEW:,} entries and twice {entries:,}")
    lab.say(f"near: stored in {fill((few, many, one)):.0f} s")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_measure(lab, few, many, one))


@dataclass(slots=True)
class _Place:
    """A store with its tier, and what was measured there: CPU in ms of each round, wall-clock ms of every look-up."""

    stock: Stock
    store: Store
    tier: NearTier
    stored: int = 0
    cpu_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)


class _Unbounded:
    """A store whose common keys are looked at to the end."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        return await self._store.candidates(
            space, keys, now_ms, per_key=per_key * _NO_BOUND, limit=max(limit, _MOST_CANDIDATES)
        )

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        return await self._store.vetoed(pairs)


async def _measure(lab: Lab, few: Stock, many: Stock, one: Stock) -> list[Row]:
    loaded = await asyncio.to_thread(matcher.load)
    async with AsyncExitStack() as stack:
        places = [await _open(stack, stock, loaded) for stock in (few, many, one)]
        fresh = (prompt(number, seed=_NEW) for number in itertools.count())
        lab.say("near: warming up")
        for place in places:
            await _cpu_ms(place, itertools.islice(fresh, _WARM_UP))
        before_mb = resident_mb(os.getpid())
        for number in range(lab.rounds):
            for place in places[number % 3 :] + places[: number % 3]:
                lab.say(f"near: round {number + 1} of {lab.rounds}, {place.stock.path.stem}")
                asked = list(itertools.islice(fresh, _LOOK_UPS))
                place.cpu_ms.append(await _cpu_ms(place, asked))
                place.p99_ms.append(await _p99_ms(place, itertools.islice(fresh, _LOOK_UPS)))
        after_mb = resident_mb(os.getpid())
        small, spread, large = places
        return [
            *_look_up_rows(small, spread, large),
            *await _recall_rows(lab, small, large, loaded),
            *await _long_rows(lab, small),
            Row("near: memory after all look-ups", "MB", (after_mb,), (before_mb,), "before", limit=1.05),
        ]


async def _open(stack: AsyncExitStack, stock: Stock, loaded: matcher.Matcher) -> _Place:
    store = await stack.enter_async_context(open_sqlite(stock.path))
    totals = await store.totals()
    if totals.entries != stock.entries:
        raise Invalid(f"{stock.path.name} has {totals.entries:,} entries, expected {stock.entries:,}")
    buffer = WriteBehind(store, _fail, flush_s=_NEVER_S, max_pending_bytes=1)
    return _Place(stock, store, NearTier(buffer, loaded))


def _fail(_operation: str, error: StorageError) -> None:
    # A server goes on without its store; figures would be wrong.
    raise error


async def _find(tier: NearTier, stock: Stock, number: int, words: str) -> Nearest:
    now_ms = time.time_ns() // 1_000_000
    threshold = Settings().cache.threshold
    return await tier.find(stock.space_of(number), b"", words, threshold=threshold, now_ms=now_ms)


async def _cpu_ms(place: _Place, asked: Iterable[str]) -> float:
    """CPU of a look-up that goes all the way, of every thread of this process."""
    prompts = list(asked)
    begun = time.process_time()
    for number, words in enumerate(prompts):
        await _find(place.tier, place.stock, number, words)
    return (time.process_time() - begun) * 1000 / len(prompts)


async def _p99_ms(place: _Place, asked: Iterable[str]) -> float:
    took: list[float] = []
    for number, words in enumerate(asked):
        begun = time.perf_counter()
        await _find(place.tier, place.stock, number, words)
        took.append((time.perf_counter() - begun) * 1000)
    return percentile(took, 0.99)


def _look_up_rows(few: _Place, many: _Place, one: _Place) -> list[Row]:
    reference, name = tuple(few.cpu_ms), f"{_FEW:,}"
    entries, spaces = f"{many.stock.entries:,}", f"{many.stock.spaces:,}"
    return [
        Row(f"near: CPU per look-up, {_FEW:,} entries", "ms", reference, judged=Judged.VALUE, limit=1.0),
        Row(f"near: CPU, {entries} in {spaces} spaces", "ms", tuple(many.cpu_ms), reference, name, limit=1.5),
        Row(f"near: CPU, {entries} in one space", "ms", tuple(one.cpu_ms), reference, name),
        Row(f"near: p99, {entries} in {spaces} spaces", "ms", tuple(many.p99_ms), tuple(few.p99_ms), name),
        Row(f"near: p99, {entries} in one space", "ms", tuple(one.p99_ms), tuple(few.p99_ms), name, Judged.VALUE, 10.0),
    ]


async def _recall_rows(lab: Lab, few: _Place, one: _Place, loaded: matcher.Matcher) -> list[Row]:
    """Which share of planted near-duplicates is found, and what looking at the latest candidates only loses of it."""
    chance = random.Random(1)
    unbounded = _Place(one.stock, one.store, NearTier(_Unbounded(one.store), loaded))
    planted = [chance.randrange(_FEW) for _ in range(_PLANTED)]
    rows: list[Row] = []
    for kind, changed in (("courtesy added", with_courtesy), ("a slip in a word", with_slip)):
        lab.say(f"near: seeking {_PLANTED} planted prompts, {kind}")
        asked = [(number, changed(few.stock.prompt_of(number), chance)) for number in planted]
        here, there = await _found(few, asked, 1), await _found(one, asked, few.stock.stride)
        some = await _found(unbounded, asked[:_UNBOUNDED], few.stock.stride)
        what = f"near: found, {kind}"
        rows += [
            Row(f"{what}, {one.stock.entries:,}", "%", (_percent(there),), (_percent(here),), f"{_FEW:,}"),
            Row(f"{what}, first {_UNBOUNDED}", "%", (_percent(there[:_UNBOUNDED]),), (_percent(some),), "unbounded"),
        ]
    return rows


async def _found(place: _Place, asked: Sequence[tuple[int, str]], stride: int) -> list[bool]:
    found: list[bool] = []
    for number, words in asked:
        nearest = await _find(place.tier, place.stock, number * stride, words)
        found.append(nearest.found is not None and nearest.found.candidate.key == place.stock.key_of(number * stride))
    return found


def _percent(found: Sequence[bool]) -> float:
    return 100 * sum(found) / len(found)


async def _long_rows(lab: Lab, place: _Place) -> list[Row]:
    """Long prompts, and how long they hold up everything else in the event loop."""
    idle, unlike, alike = _Long(), _Long(), _Long()
    for number in range(lab.rounds):
        lab.say(f"near: round {number + 1} of {lab.rounds}, {_LONG_WORDS:,} words")
        async with _ticking(idle):
            await asyncio.sleep(_IDLE_S)
        prompts = [long_prompt(_LONG_WORDS, number * _LONG_PROMPTS + turn) for turn in range(_LONG_PROMPTS)]
        await _look_up_long(place, prompts, unlike)
        await _store(place, prompts)
        await _look_up_long(place, [f"{words}\n" for words in prompts], alike)
    if alike.found != lab.rounds * _LONG_PROMPTS:
        raise Invalid(f"{alike.found} of {lab.rounds * _LONG_PROMPTS} stored long prompts were found")
    what = f"near: {_LONG_WORDS:,} words"
    stalls = tuple(idle.stalls_ms)
    return [
        Row(f"{what}, nothing alike", "ms", tuple(unlike.took_ms)),
        Row(f"{what}, found", "ms", tuple(alike.took_ms)),
        Row(f"{what}, nothing alike: stall", "ms", tuple(unlike.stalls_ms), stalls, "idle", Judged.VALUE, 5.0),
        Row(f"{what}, found: stall", "ms", tuple(alike.stalls_ms), stalls, "idle", Judged.VALUE, 5.0),
    ]


@dataclass(slots=True)
class _Long:
    """For each round the slowest look-up and the longest stall; and how many look-ups found something."""

    took_ms: list[float] = field(default_factory=list)
    stalls_ms: list[float] = field(default_factory=list)
    found: int = 0


async def _look_up_long(place: _Place, prompts: Sequence[str], into: _Long) -> None:
    took: list[float] = []
    async with _ticking(into):
        for words in prompts:
            begun = time.perf_counter()
            nearest = await _find(place.tier, place.stock, 0, words)
            took.append((time.perf_counter() - begun) * 1000)
            into.found += nearest.found is not None
    into.took_ms.append(max(took))


@asynccontextmanager
async def _ticking(into: _Long) -> AsyncIterator[None]:
    """While the block runs, something else wants its turn every millisecond; the longest that it waited is noted."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            longest = max(longest, time.perf_counter() - begun - _TICK_S)

    task = asyncio.create_task(tick())
    await asyncio.sleep(_TICK_S)
    try:
        yield
        # What held the loop to the end is seen at the next turn only.
        await asyncio.sleep(2 * _TICK_S)
    finally:
        task.cancel()
        await asyncio.wait([task])
    into.stalls_ms.append(longest * 1000)


async def _store(place: _Place, prompts: Sequence[str]) -> None:
    now_ms = time.time_ns() // 1_000_000
    puts: list[Put] = []
    for words in prompts:
        place.stored += 1
        number = place.stock.entries + place.stored
        sketch = await place.tier.sketch(words, place.stock.space_of(number))
        puts.append(Put(entry_of(place.stock, number, words, now_ms), sketch))
    await place.store.write(puts)
