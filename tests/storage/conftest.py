"""A store of every engine; after each test no invariant may be broken."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.base import Store
from tests.storage.engines import ENGINES, OpenStore


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
