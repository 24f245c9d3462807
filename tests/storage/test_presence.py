"""What is known of a store without asking it: never that a stored key is absent."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import presence as presence_module
from storage.base import Delete, Keys, Put
from storage.presence import Presence
from storage.renewal import renewable
from storage.sqlite import open_sqlite
from storage.write_behind import WriteBehind
from tests.conftest import eventually
from tests.storage.engines import entry

ABSENT = b"\xff" * 32


class Following:
    """A presence that follows a store for the life of a block."""

    def __init__(self, presence: Presence, keys: Keys) -> None:
        self._following = presence.follow(keys)

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._following)

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "FOLLOW_S", 0.01)


def test_before_anything_is_known_every_key_may_be_stored() -> None:
    assert not Presence().lacks(ABSENT)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=50))
def test_a_key_that_was_added_is_never_taken_for_absent(keys: list[bytes]) -> None:
    presence = Presence()
    presence._complete = True
    for key in keys:
        presence.add(key)
    assert not any(presence.lacks(key) for key in keys)


async def test_what_is_stored_is_learned_and_the_rest_is_known_to_be_absent() -> None:
    presence = Presence()
    async with open_sqlite(None) as store:
        stored = [entry(key=bytes([n]) * 32) for n in range(20)]
        await store.write([Put(one) for one in stored])
        async with Following(presence, store):
            await eventually(lambda: presence.lacks(ABSENT))
            assert not any(presence.lacks(one.key) for one in stored)


async def test_what_another_process_stores_is_learned_soon(tmp_path: Path) -> None:
    presence = Presence()
    path = tmp_path / "a.db"
    async with open_sqlite(path) as ours, open_sqlite(path) as theirs, Following(presence, ours):
        await eventually(lambda: presence.lacks(ABSENT))
        await theirs.write([Put(entry(key=ABSENT))])
        await eventually(lambda: not presence.lacks(ABSENT))


async def test_a_store_opened_anew_is_learned_anew(tmp_path: Path) -> None:
    presence, path = Presence(), tmp_path / "a.db"
    async with renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=0.01, retry_s=0.01) as store:
        for number in range(5):
            await store.write([Put(entry(key=bytes([number]) * 32))])
        async with Following(presence, store):
            await eventually(lambda: presence.lacks(ABSENT))
            await asyncio.to_thread(path.unlink)
            first = store.current
            await eventually(lambda: store.current not in (None, first))
            # Its row ids begin again at 1.
            await store.write([Put(entry(key=ABSENT))])
            await eventually(lambda: not presence.lacks(ABSENT))


async def test_a_filter_that_has_taken_too_many_keys_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "_CAPACITY", 10)
    presence = Presence()
    async with open_sqlite(None) as store:
        await store.write([Put(entry(key=bytes([n]) * 32)) for n in range(8)])
        await store.write([Delete(bytes([n]) * 32) for n in range(8)])
        for n in range(20):
            presence.add(bytes([n]) * 32)
        async with Following(presence, store):
            await eventually(lambda: presence.lacks(bytes([3]) * 32))


class Counting:
    """Keys of a store, and how often they were read from the beginning."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.beginnings = 0
        self.looks = 0

    async def keys_after(self, mark: int, limit: int) -> tuple[int, list[bytes]]:
        self.beginnings += mark == 0
        self.looks += 1
        return await self._keys.keys_after(mark, limit)


async def test_a_store_with_more_keys_than_the_filter_is_made_for_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence_module, "_CAPACITY", 10)
    monkeypatch.setattr(presence_module, "_PAGE", 4)
    presence = Presence()
    async with open_sqlite(None) as store:
        await store.write([Put(entry(key=bytes([n]) * 32)) for n in range(18)])
        counting = Counting(store)
        async with Following(presence, counting):
            await eventually(lambda: presence.lacks(ABSENT))
            looks = counting.looks
            await eventually(lambda: counting.looks > looks + 3)
            assert presence.lacks(ABSENT)
            assert counting.beginnings == 1


async def test_a_buffer_asks_the_store_only_for_keys_that_may_be_there() -> None:
    presence = Presence()
    async with open_sqlite(None) as store:
        buffer = WriteBehind(store, lambda *_: None, flush_s=1, max_pending_bytes=1 << 20, presence=presence)
        async with Following(presence, store):
            await eventually(lambda: presence.lacks(ABSENT))
            assert buffer.lacks(ABSENT)
            assert await buffer.get(ABSENT, 0) is None
            assert buffer.put(entry(key=ABSENT))
            assert not buffer.lacks(ABSENT)
            await buffer.flush()
            assert not buffer.lacks(ABSENT)
            assert await buffer.get(ABSENT, 0) is not None
