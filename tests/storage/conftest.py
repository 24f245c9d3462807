"""A store of every engine; after each test no invariant may be broken."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.base import StorageError
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind
from tests.storage.door import Door, OnErrorToList
from tests.storage.engines import ENGINES, FOREVER, OpenStore


@pytest.fixture(autouse=True, scope="module")
def _quick_leak_checks() -> Iterator[None]:
    """Spare the leak check of every test the objects that were there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=list(ENGINES))
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens the engine under test."""
    engine = ENGINES[request.param]
    return lambda: engine(tmp_path)


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[Store]:
    async with open_store() as opened:
        yield opened
        assert await opened.problems() == []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nearhit.db"


@pytest.fixture
async def door(path: Path) -> AsyncIterator[Door]:
    async with open_sqlite(path) as store:
        yield Door(store)
        assert await store.problems() == []


@pytest.fixture
def errors() -> list[tuple[str, type[StorageError]]]:
    """What was reported: operation and kind of error."""
    return []


@pytest.fixture
def buffer(door: Door, errors: list[tuple[str, type[StorageError]]]) -> WriteBehind:
    """A buffer that flushes only when told to."""
    return WriteBehind(door, OnErrorToList(errors), flush_s=FOREVER, max_pending_bytes=10_000_000)
