"""One of several processes on a file: tasks that do everything at once, and notes of what each of them saw.

Prints `leads` once it does the upkeep, and at its end a report as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.cache.upkeep import Clocks, Upkeep
from storage.base import Delete, Entry, Room, Sketch, StorageError
from storage.listing import Which
from storage.presence import Presence
from storage.renewal import RenewableStore, renewable
from storage.sqlite import open_sqlite
from storage.write_behind import WriteBehind, write_behind
from tests.storage.engines import entry
from tests.stress.oracle import Event, answer_of, value_of

SPACE = b"s" * 32
_FOREVER_MS = 10_000_000
_VETOED = 200


@dataclass(frozen=True, slots=True)
class Orders:
    """What a process is told. `short` says that some entries expire while it runs."""

    path: str
    process: int
    seed: int
    tasks: int
    seconds: float
    keys: int
    max_entries: int
    max_bytes: int
    top_k: int
    short: bool


def key_of(number: int) -> bytes:
    """A key that spreads like a digest, as the filter of known keys expects."""
    return random.Random(number).randbytes(32)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Worker:
    """The tasks, and what they noted."""

    def __init__(self, orders: Orders, store: RenewableStore, buffer: WriteBehind, errors: Counter[str]) -> None:
        self.orders = orders
        self.store = store
        self.buffer = buffer
        self.errors = errors
        self.events: list[Event] = []
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self._puts = 0
        self._vetoed: set[bytes] = set()

    async def task(self, number: int) -> None:
        chance = random.Random(f"{self.orders.seed} {self.orders.process} {number}")
        ends = time.monotonic() + self.orders.seconds
        kinds = {
            self.get: 40,
            self.put: 30,
            self.burst: 2,
            self.use: 10,
            self.delete: 5,
            self.remove_now: 2,
            self.purge_page: 1,
            self.look: 5,
            self.veto: 1,
            self.totals: 1,
        }
        while time.monotonic() < ends:
            (act,) = chance.choices(list(kinds), list(kinds.values()))
            self.done[act.__name__] += 1
            try:
                await act(chance)
            except StorageError as error:
                self.errors[f"{act.__name__}: {type(error).__name__}"] += 1
            await asyncio.sleep(chance.random() * 0.004)

    async def get(self, chance: random.Random) -> None:
        key = self._key(chance)
        began, now = time.monotonic(), now_ms()
        found = await self.buffer.get(key, now)
        self._note("get", key, self._checked(key, found, now), began, time.monotonic())

    async def put(self, chance: random.Random) -> None:
        await self._putting(chance, 1)

    async def burst(self, chance: random.Random) -> None:
        await self._putting(chance, 40)

    async def use(self, chance: random.Random) -> None:
        self.buffer.used(self._key(chance), now_ms())

    async def delete(self, chance: random.Random) -> None:
        key = self._key(chance)
        began = time.monotonic()
        self.buffer.delete(key)
        self._note("delete", key, "", began, await self._flushed())

    async def remove_now(self, chance: random.Random) -> None:
        await self._remove([self._key(chance)])

    async def purge_page(self, chance: random.Random) -> None:
        which = Which(model=chance.choice(["a", "b"]), text=chance.choice([None, "0"]))
        mark = 0
        for _ in range(3):
            page = await self.store.select(which, mark, 10, newest_first=True)
            for listed in page.listed:
                if listed.entry.model != which.model:
                    self.wrong.append("a page has an entry that was not asked for")
            await self._remove([listed.entry.key for listed in page.listed[:5]])
            if page.mark is None:
                return
            mark = page.mark

    async def look(self, chance: random.Random) -> None:
        bands = [chance.randrange(60) for _ in range(4)]
        found = await self.buffer.candidates(SPACE, bands, now_ms(), per_key=16, limit=8)
        for candidate in found:
            if candidate.words != f"words {candidate.key.hex()}":
                self.wrong.append("a candidate has the words of another")

    async def veto(self, chance: random.Random) -> None:
        pairs = [chance.randrange(_VETOED).to_bytes(8, "big") for _ in range(2)]
        await self.store.veto(pairs, now_ms())
        self._vetoed.update(pairs)
        if not await self.buffer.vetoed([chance.choice(sorted(self._vetoed))]):
            self.wrong.append("a veto was forgotten")

    async def totals(self, chance: random.Random) -> None:
        await self.store.totals()

    async def _putting(self, chance: random.Random, count: int) -> None:
        began = time.monotonic()
        put = [self._put_one(chance) for _ in range(count)]
        ended = await self._flushed()
        for key, value in put:
            self._note("put", key, value, began, ended)
            began = math.nextafter(began, math.inf)

    def _put_one(self, chance: random.Random) -> tuple[bytes, str]:
        key = self._key(chance)
        self._puts += 1
        value = f"{self.orders.process}-{self._puts}"
        now = now_ms()
        fields: dict[str, Any] = {
            "key": key,
            "space": SPACE,
            "model": chance.choice(["a", "b", "c"]),
            "topic": chance.randrange(5),
            "near": chance.random() < 0.6,
            "words": f"words {key.hex()}",
            "answer": answer_of(key, value, chance.choice([10, 300, 3000, 20_000])),
            "stored_ms": now,
            "expires_ms": now + (chance.choice([50, 500, _FOREVER_MS]) if self.orders.short else _FOREVER_MS),
            "grace_ms": chance.choice([0, 200]),
        }
        sketch = Sketch(1, "skeleton", tuple(chance.randrange(60) for _ in range(8)))
        self.buffer.put(entry(**fields), sketch if chance.random() < 0.9 else None)
        return key, value

    async def _remove(self, keys: list[bytes]) -> None:
        """As a person's removal: written on return."""
        began = time.monotonic()
        await self.store.write([Delete(key) for key in keys])
        ended = time.monotonic()
        for key in keys:
            self._note("remove", key, "", began, ended)
            self._note("delete", key, "", time.monotonic(), math.inf)
            self.buffer.delete(key)

    async def _flushed(self) -> float:
        """The time at which all is written; never, where something failed meanwhile."""
        before = self.errors.total()
        await self.buffer.flush()
        return time.monotonic() if self.errors.total() == before else math.inf

    def _checked(self, key: bytes, found: Entry | None, now: int) -> str:
        if found is None:
            return ""
        if found.key != key or found.ends_ms <= now:
            self.wrong.append("an entry that was not asked for")
        try:
            return value_of(key, found.answer)
        except ValueError as error:
            self.wrong.append(str(error))
            return ""

    def _key(self, chance: random.Random) -> bytes:
        # Some keys are asked for far more often than others.
        return key_of(int(self.orders.keys * chance.random() ** 2))

    def _note(self, kind: str, key: bytes, value: str, began: float, ended: float) -> None:
        self.events.append(Event(self.orders.process, kind, key.hex(), value, began, ended))


class _Bounds:
    """The upkeep's view of the store; tells once that it leads."""

    def __init__(self, store: RenewableStore) -> None:
        self.leading = False
        self.expire, self.trim, self.give_back = store.expire, store.trim, store.give_back
        self._store = store

    async def leads(self) -> bool:
        leads = await self._store.leads()
        if leads and not self.leading:
            self.leading = True
            await asyncio.to_thread(print, "leads", flush=True)
        return leads


async def work(orders: Orders) -> dict[str, Any]:
    errors: Counter[str] = Counter()
    removed: Counter[str] = Counter()

    def failed(operation: str, error: StorageError) -> None:
        errors[f"{operation}: {type(error).__name__}"] += 1

    def evicted(reason: str, count: int) -> None:
        removed[reason] += count

    room = Room(orders.max_entries, orders.max_bytes, orders.top_k)
    presence = Presence()
    path = Path(orders.path)
    async with (
        renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=0.3, retry_s=0.3) as store,
        write_behind(
            store,
            failed,
            flush_s=0.05,
            max_pending_bytes=64 * 1024 * 1024,
            presence=presence,
            room=room,
            on_evicted=evicted,
        ) as buffer,
    ):
        bounds = _Bounds(store)
        clocks = Clocks(now_ms, lambda: time.monotonic_ns() // 1_000_000)
        upkeep = Upkeep(bounds, room, clocks=clocks, evicted=evicted, failed=failed, every_s=0.2, settle_s=0.0)
        worker = Worker(orders, store, buffer, errors)
        async with _beside(presence.follow(store)), _beside(upkeep.run()):
            await asyncio.gather(*(worker.task(number) for number in range(orders.tasks)))
    return {
        "errors": errors,
        "removed": removed,
        "wrong": worker.wrong,
        "done": worker.done,
        "led": bounds.leading,
        "events": [event.encoded() for event in worker.events],
    }


@asynccontextmanager
async def _beside(coroutine: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def main() -> None:
    orders = Orders(**json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(asyncio.run(work(orders))) + "\n")
