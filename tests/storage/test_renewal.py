"""A store that lost its file or its soundness is replaced, and service goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from storage.base import ForeignFile, Put, StorageCorrupt, StorageError, StorageFull, StorageRefused, StorageUnavailable
from storage.renewal import Opener, RenewableStore, renewable
from storage.sqlite import open_sqlite
from storage.store import Store
from tests.conftest import eventually
from tests.storage.engines import FOREVER, NOW, entry, key
from tests.storage.files import damage_second_half, set_asides

SOON = 0.01


class Openings:
    """Opens a real store, notes how, and fails on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.suspect: list[bool] = []
        self.failures: list[Exception] = []
        self.failed = 0

    def __call__(self, suspect: bool) -> AbstractAsyncContextManager[Store]:
        return self._open(suspect)

    @asynccontextmanager
    async def _open(self, suspect: bool) -> AsyncIterator[Store]:
        self.suspect.append(suspect)
        if self.failures:
            self.failed += 1
            raise self.failures.pop(0)
        async with open_sqlite(self.path, suspect=suspect) as store:
            yield store


@pytest.fixture
def openings(tmp_path: Path) -> Openings:
    return Openings(tmp_path / "nearhit.db")


def watched(opener: Opener) -> AbstractAsyncContextManager[RenewableStore]:
    return renewable(opener, watch_s=SOON, retry_s=SOON)


async def answers_again(store: Store) -> None:
    """Wait until an entry can be written and read; the limit only ends a test that has failed."""
    async with asyncio.timeout(60):
        while True:
            try:
                await store.write([Put(entry(99))])
                if await store.get(key(99), NOW) == entry(99):
                    return
            except StorageError:
                await asyncio.sleep(SOON)


async def reopened(openings: Openings, times: int) -> None:
    await eventually(lambda: len(openings.suspect) >= times)


def take_away(path: Path) -> None:
    for part in list(path.parent.iterdir()):
        part.unlink()


def replace_by_empty(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.touch()


def take_away_folder(path: Path) -> None:
    take_away(path)
    path.parent.rmdir()


@pytest.mark.parametrize("how", [take_away, replace_by_empty, take_away_folder])
async def test_a_file_taken_away_is_noticed_and_replaced(tmp_path: Path, how: object) -> None:
    assert callable(how)
    openings = Openings(tmp_path / "data" / "nearhit.db")
    async with watched(openings) as store:
        await store.write([Put(entry(1))])
        await asyncio.to_thread(how, openings.path)
        await reopened(openings, 2)
        await answers_again(store)
        assert await store.get(key(1), NOW) is None
        assert await store.problems() == []
    assert openings.suspect == [False, False]
    async with open_sqlite(openings.path) as found:
        assert await found.get(key(99), NOW) == entry(99)


async def test_a_store_knows_that_its_file_is_gone(openings: Openings) -> None:
    async with renewable(openings, watch_s=FOREVER, retry_s=FOREVER) as store:
        assert not await store.lost()
        await asyncio.to_thread(take_away, openings.path)
        assert await store.lost()


@pytest.fixture
def damaged(openings: Openings) -> Path:
    """A file whose answers are overwritten and whose schema is sound."""

    async def fill() -> None:
        async with open_sqlite(openings.path) as store:
            await store.write([Put(entry(n, answer=b"x" * 2000)) for n in range(50)])

    asyncio.run(fill())
    damage_second_half(openings.path)
    return openings.path


async def test_corrupt_data_is_set_aside_and_service_goes_on(
    openings: Openings, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with renewable(openings, watch_s=FOREVER, retry_s=FOREVER) as store:
        with pytest.raises(StorageCorrupt):
            await asyncio.gather(*(store.get(key(n), NOW) for n in range(50)))
        await reopened(openings, 2)
        await answers_again(store)
        assert (await store.totals()).entries == 1
        assert await store.problems() == []
    assert openings.suspect == [False, True]
    assert await asyncio.to_thread(set_asides, damaged) == ["corrupt"]
    assert "corrupt" in caplog.text


async def test_a_renewed_store_is_not_suspect_for_ever(openings: Openings, damaged: Path) -> None:
    async with watched(openings) as store:
        with pytest.raises(StorageCorrupt):
            await asyncio.gather(*(store.get(key(n), NOW) for n in range(50)))
        await reopened(openings, 2)
        await answers_again(store)
        await asyncio.to_thread(openings.path.unlink)
        await reopened(openings, 3)
        await answers_again(store)
    assert openings.suspect == [False, True, False]


async def test_a_refusal_of_the_first_opening_is_the_callers(openings: Openings) -> None:
    openings.failures = [ForeignFile("no")]
    with pytest.raises(ForeignFile, match="no"):
        async with watched(openings):
            pytest.fail("nothing was opened")
    assert openings.failed == 1


@pytest.mark.parametrize("failure", [StorageFull("no room"), StorageCorrupt("broken")])
async def test_a_first_opening_that_fails_for_now_is_tried_again(openings: Openings, failure: StorageError) -> None:
    openings.failures = [failure, failure]
    async with watched(openings) as store:
        with pytest.raises(StorageUnavailable):
            await store.totals()
        await answers_again(store)


async def test_a_foreign_file_is_refused_through_it(openings: Openings) -> None:
    await asyncio.to_thread(openings.path.write_text, "theirs")
    with pytest.raises(StorageRefused):
        async with watched(openings):
            pytest.fail("nothing was opened")
    assert await asyncio.to_thread(openings.path.read_text) == "theirs"


async def test_between_two_stores_it_is_unavailable(openings: Openings) -> None:
    async with renewable(openings, watch_s=SOON, retry_s=FOREVER) as store:
        openings.failures = [StorageFull("no room")]
        await asyncio.to_thread(take_away, openings.path)
        await reopened(openings, 2)
        for use in (store.get(key(1), NOW), store.write([Put(entry())]), store.totals(), store.lost()):
            with pytest.raises(StorageUnavailable):
                await use


@pytest.mark.parametrize("failure", [StorageFull("no room"), ForeignFile("theirs"), StorageCorrupt("again")])
async def test_a_renewal_that_fails_is_tried_again(
    openings: Openings, failure: StorageError, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched(openings) as store:
        openings.failures = [failure, failure]
        await asyncio.to_thread(take_away, openings.path)
        await reopened(openings, 4)
        await answers_again(store)
    told = [record.getMessage() for record in caplog.records if "cannot be opened" in record.getMessage()]
    # The same trouble is told once.
    assert [message.endswith(str(failure)) for message in told] == [True]


async def test_leaving_closes_the_store_while_it_is_being_renewed(openings: Openings) -> None:
    async with renewable(openings, watch_s=SOON, retry_s=FOREVER) as store:
        openings.failures = [StorageFull("no room")]
        await asyncio.to_thread(take_away, openings.path)
        await reopened(openings, 2)
    with pytest.raises(StorageUnavailable):
        await store.totals()
