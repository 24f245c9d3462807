"""Whatever is done to a store, its candidates are those of a plain list of entries, and no invariant breaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Candidate, Change, Delete, Entry, Put, Sketch, Sketched, StorageBusy, Unsketched, Used
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.worth import gain
from tests.storage.engines import NOW, key, near, room, sketch

SPACES = [b"s" * 32, b"t" * 32]
NUMBERS = st.integers(0, 7)
BANDS = st.integers(-3, 3)
SKETCHES = st.builds(
    Sketch, scheme=st.integers(1, 2), skeleton=st.sampled_from(["a", "b"]), keys=st.lists(BANDS, max_size=5).map(tuple)
)
ENTRIES = st.builds(
    near,
    NUMBERS,
    near=st.sampled_from([True, True, True, False]),
    words=st.sampled_from(["one", "two", "three", None]),
    space=st.sampled_from(SPACES),
    stored_ms=st.integers(NOW - 3, NOW),
    expires_ms=st.integers(NOW + 1, NOW + 6),
)
KEYS = NUMBERS.map(key)
CHANGES = st.one_of(
    st.builds(Put, ENTRIES, SKETCHES | st.none()),
    st.builds(Put, ENTRIES, SKETCHES),
    st.builds(Delete, KEYS),
    st.builds(Sketched, KEYS, SKETCHES),
    st.builds(Used, KEYS, st.integers(1, 3), st.integers(NOW, NOW + 5)),
)
STEPS = st.one_of(
    st.lists(CHANGES, max_size=6),
    st.tuples(st.just("expire"), st.integers(NOW, NOW + 6), st.integers(0, 4)),
    st.tuples(st.just("trim"), st.integers(0, 8), st.integers(0, 4)),
)
Step = list[Change] | tuple[str, int, int]


class Model:
    """The entries in the order in which they were written, and what each is worth."""

    def __init__(self) -> None:
        self.puts: dict[bytes, Put] = {}
        self.hits: dict[bytes, int] = {}
        self.worth: dict[bytes, float] = {}
        self.floor = 0.0

    def apply(self, step: Step) -> None:
        match step:
            case ("expire", int(now_ms), int(limit)):
                stale = [put.entry for put in self.puts.values() if put.entry.expires_ms <= now_ms]
                for entry in sorted(stale, key=lambda entry: entry.expires_ms)[:limit]:
                    self.remove(entry.key)
            case (_, int(bound), int(limit)):
                surplus = max(len(self.puts) - bound, 0)
                # Of the one topic, half of what there is room for is spared as long as others can go.
                asked_again = [one for one in self.least_worthy() if self.hits[one]]
                spared = set(asked_again[max(len(asked_again) - bound // 2, 0) :])
                doomed = sorted(self.least_worthy(), key=spared.__contains__)[: min(surplus, limit)]
                self.floor = max([self.floor, *(self.worth[one] for one in doomed)])
                for one in doomed:
                    self.remove(one)
            case _:
                for change in step:
                    assert not isinstance(change, str | int)
                    self.change(change)

    def change(self, change: Change) -> None:
        match change:
            case Put(entry):
                self.remove(entry.key)
                self.puts[entry.key] = change
                self.hits[entry.key] = 0
                self.value(entry.key)
            case Delete(one):
                self.remove(one)
            case Sketched(one, sketch):
                if one in self.puts:
                    self.puts[one] = replace(self.puts[one], sketch=sketch)
            case Used(one, count, _):
                if one in self.puts:
                    self.hits[one] += count
                    self.value(one)

    def value(self, one: bytes) -> None:
        entry = self.puts[one].entry
        self.worth[one] = self.floor + gain(entry.cost_ms, len(entry.answer), 1 + self.hits[one])

    def least_worthy(self) -> list[bytes]:
        # Sorting keeps the order in which they came.
        return sorted(self.puts, key=self.worth.__getitem__)

    def remove(self, one: bytes) -> None:
        self.puts.pop(one, None)

    def near(self) -> list[tuple[Entry, str, Sketch | None]]:
        return [(p.entry, p.entry.words, p.sketch) for p in self.puts.values() if p.entry.near and p.entry.words]

    def candidates(self, space: bytes, keys: Sequence[int], now_ms: int, per_key: int, limit: int) -> list[Candidate]:
        latest_first = [(e, words, sketch) for e, words, sketch in reversed(self.near()) if sketch is not None]
        shared: Counter[bytes] = Counter()
        for band in set(keys):
            shared.update([e.key for e, _, sketch in latest_first if band in sketch.keys][:per_key])
        found = [
            Candidate(e.key, words, sketch.skeleton, shared[e.key])
            for e, words, sketch in latest_first
            if shared[e.key] and e.space == space and e.expires_ms > now_ms
        ]
        return sorted(found, key=lambda candidate: -candidate.shared)[:limit]

    def unsketched(self, scheme: int) -> set[Unsketched]:
        return {Unsketched(e.key, e.space, words) for e, words, s in self.near() if s is None or s.scheme != scheme}


async def take(store: Store, step: Step) -> None:
    if isinstance(step, list):
        await store.write(step)
    elif step[0] == "expire":
        await store.expire(step[1], step[2])
    else:
        await store.trim(room(step[1], 2**60), step[2])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(STEPS, max_size=12),
    keys=st.lists(BANDS, max_size=6),
    space=st.sampled_from(SPACES),
    now_ms=st.integers(NOW, NOW + 6),
    per_key=st.integers(1, 8),
    limit=st.integers(0, 8),
)
async def test_a_store_is_a_list_of_entries(
    store: Store, steps: list[Step], keys: list[int], space: bytes, now_ms: int, per_key: int, limit: int
) -> None:
    await store.trim(room(0, 2**60), 1000)
    model = Model()
    for step in steps:
        await take(store, step)
        model.apply(step)
        expected = model.candidates(space, keys, now_ms, per_key, limit)
        assert await store.candidates(space, keys, now_ms, per_key=per_key, limit=limit) == expected
    for scheme in (1, 2):
        assert set(await store.unsketched(scheme, 100)) == model.unsketched(scheme)
    assert (await store.totals()).entries == len(model.puts)
    assert await store.problems() == []


async def churn(store: Store, chance: random.Random) -> None:
    """Change entries that others change at the same moment; a lock held for too long is no error here."""
    for _ in range(40):
        number = chance.randrange(30)
        made = sketch(number, number // 3, chance.randrange(5), scheme=chance.randrange(3))
        short = near(number, expires_ms=NOW + chance.randrange(2, 9), stored_ms=NOW)
        changes: list[Change] = [Put(short, made), Put(short), Sketched(key(number), made), Delete(key(number))]
        try:
            await store.write(chance.sample(changes, 2))
            await store.expire(NOW + chance.randrange(4), 3)
            await store.trim(room(20, 2**60), 3)
            for candidate in await store.candidates(SPACES[0], [number, 0, 1], NOW, per_key=5, limit=5):
                assert 1 <= candidate.shared <= 3
            for waiting in await store.unsketched(1, 3):
                await store.write([Sketched(waiting.key, sketch(number, scheme=1))])
        except StorageBusy:
            continue


async def test_two_stores_on_one_file_keep_its_invariants(tmp_path: Path) -> None:
    path = tmp_path / "nearhit.db"
    async with open_sqlite(path) as one, open_sqlite(path) as two:
        await asyncio.gather(*(churn(store, random.Random(n)) for n, store in enumerate([one, two, one, two])))
        for store in (one, two):
            assert await store.problems() == []
        assert await one.candidates(SPACES[0], range(30), NOW, per_key=50, limit=50) == await two.candidates(
            SPACES[0], range(30), NOW, per_key=50, limit=50
        )


async def test_what_one_process_vetoes_and_sketches_the_other_sees(tmp_path: Path) -> None:
    path = tmp_path / "nearhit.db"
    async with open_sqlite(path) as one, open_sqlite(path) as two:
        await one.veto([b"a"], NOW)
        await one.write([Put(near(1))])
        assert await two.vetoed([b"a"])
        await two.write([Sketched(key(1), sketch(7))])
        assert len(await one.candidates(SPACES[0], [7], NOW, per_key=5, limit=5)) == 1
        await one.write([Delete(key(1))])
        assert await two.candidates(SPACES[0], [7], NOW, per_key=5, limit=5) == []
