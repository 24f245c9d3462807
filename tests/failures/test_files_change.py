"""Files that are deleted, moved, replaced or strangely named while nearhit runs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.web import services
from storage.base import Put, StorageError
from storage.renewal import renewable
from storage.sqlite import open_sqlite
from storage.store import Store
from tests.conftest import Proxy, StartProxy, running_proxy, settings_for
from tests.failures.disks import Disk
from tests.failures.serving import serving_on
from tests.fake_model import FakeModel
from tests.storage.engines import entry
from tests.storage.files import query, set_asides, snapshot

SOON = 0.02
BACKED_UP = range(100, 140)


# Another database in its place


async def put(path: Path, numbers: range) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(entry(n, answer=b"b" * 20_000)) for n in numbers])


def costs(path: Path) -> list[int]:
    """The numbers of the entries in a file."""
    return [int.from_bytes(bytes(key)[-4:], "big") for (key,) in query(path, "SELECT key FROM entry ORDER BY key")]


def move_over(path: Path, backup: Path) -> None:
    backup.rename(path)


def swap(path: Path, backup: Path) -> None:
    path.rename(path.with_name("moved.db"))
    backup.rename(path)


def delete_and_copy(path: Path, backup: Path) -> None:
    path.unlink()
    shutil.copy(backup, path)


@pytest.mark.parametrize("written", [range(10), range(60)], ids=["less", "more"])
@pytest.mark.parametrize("how", [move_over, swap, delete_and_copy])
async def test_a_backup_put_in_its_place_is_used_and_not_mixed_with_what_was_there(
    tmp_path: Path, how: Callable[[Path, Path], None], written: range
) -> None:
    path, backup = tmp_path / "nearhit.db", tmp_path / "backup.db"
    await put(backup, BACKED_UP)
    async with renewable(lambda suspect: open_sqlite(path, suspect=suspect), watch_s=SOON, retry_s=SOON) as store:
        await store.write([Put(entry(n, answer=b"x" * 20_000)) for n in written])
        await asyncio.to_thread(how, path, backup)
        async with asyncio.timeout(60):
            while not await has(store.current, len(BACKED_UP)):
                await asyncio.sleep(SOON)
        assert await store.problems() == []
        await store.write([Put(entry(200))])
        assert await store.problems() == []
    assert await asyncio.to_thread(costs, path) == [*BACKED_UP, 200]
    assert await asyncio.to_thread(set_asides, path) == []
    if how is swap:
        # Whole, though its log was not moved along.
        async with open_sqlite(tmp_path / "moved.db") as moved:
            assert await moved.problems() == []
        assert await asyncio.to_thread(costs, tmp_path / "moved.db") == [*written]


async def has(store: Store | None, count: int) -> bool:
    try:
        return store is not None and (await store.totals()).entries == count
    except StorageError:
        return False


# Deleted


async def stored(proxy: Proxy, content: str) -> None:
    assert (await proxy.chat(content)).outcome == "MISS"
    await proxy.settled()
    await proxy.services.buffer.flush()


async def test_a_data_directory_deleted_while_it_runs_is_made_anew(
    start: StartProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(services, "_WATCH_FILE_S", 0.05)
    data = tmp_path / "data"
    proxy = await start(data_dir=str(data), cache__mode="exact")
    await stored(proxy, "before")
    await asyncio.to_thread(shutil.rmtree, data)
    async with asyncio.timeout(60):
        while not await has(proxy.services.store, 0):
            await asyncio.sleep(SOON)
    await stored(proxy, "after")
    assert await has(proxy.services.store, 1)
    assert await asyncio.to_thread((data / "nearhit.db").exists)
    assert len([r for r in caplog.records if "was deleted or replaced" in r.getMessage()]) == 1


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
async def test_without_its_log_it_goes_on_and_a_clean_stop_keeps_everything(
    tmp_path: Path, model: FakeModel, suffix: str
) -> None:
    path = tmp_path / "nearhit.db"
    async with running_proxy(settings_for(tmp_path, model.url, cache__mode="exact", cache__hot_bytes=0)) as proxy:
        for content in ("a", "b"):
            await stored(proxy, content)
        await asyncio.to_thread(path.with_name(f"nearhit.db{suffix}").unlink)
        for content in ("c", "d"):
            await stored(proxy, content)
        assert (await proxy.chat("a")).outcome == "HIT"
    async with open_sqlite(path) as store:
        assert await store.problems() == []
        assert (await store.totals()).entries == 4


async def test_without_its_lock_files_it_goes_on_beside_another(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__mode="exact")
    async with running_proxy(settings) as proxy:
        await stored(proxy, "a")
        for suffix in (".lock", ".upkeep"):
            await asyncio.to_thread((tmp_path / f"nearhit.db{suffix}").unlink)
        async with running_proxy(settings) as other:
            await stored(other, "b")
            assert (await other.chat("a")).outcome == "HIT"
            await stored(proxy, "c")
        assert await has(proxy.services.store, 3)
        assert await proxy.services.store.problems() == []


# Strange places


async def served_again_after_a_restart(folder: Path, model: FakeModel, file: Path) -> None:
    options = {"cache__file": str(file), "cache__mode": "exact"}
    for outcome in ("MISS", "HIT"):
        async with running_proxy(settings_for(folder / "data", model.url, **options)) as proxy:
            assert (await proxy.chat("x")).outcome == outcome
            await proxy.settled()
            assert await proxy.services.store.problems() == []


@pytest.mark.parametrize(
    "name", ["my answers.db", "50%20off.db", "what?mode=memory", "a#b&c=d;e.db", "é\n'\"ö.db", "-x"]
)
async def test_a_file_may_have_any_name(tmp_path: Path, model: FakeModel, name: str) -> None:
    folder = tmp_path / f"in {name}"
    await served_again_after_a_restart(tmp_path, model, folder / name)
    assert name in await asyncio.to_thread(os.listdir, folder)
    assert set(await asyncio.to_thread(os.listdir, tmp_path)) == {"data", folder.name}


async def test_a_file_may_be_a_link(tmp_path: Path, model: FakeModel) -> None:
    await asyncio.to_thread((tmp_path / "big disk").mkdir)
    link, target = tmp_path / "nearhit.db", tmp_path / "big disk" / "answers.db"
    # It leads nowhere yet.
    await asyncio.to_thread(link.symlink_to, target)
    await served_again_after_a_restart(tmp_path, model, link)
    assert await asyncio.to_thread(link.is_symlink)
    assert await asyncio.to_thread(query, target, "SELECT count(*) FROM entry") == [(1,)]


async def test_a_file_may_be_on_another_disk_than_the_rest(small_disk: Disk, tmp_path: Path, model: FakeModel) -> None:
    file = small_disk.folder / "answers.db"
    async with serving_on(small_disk, model, NEARHIT_CACHE_FILE=str(file), NEARHIT_DATA_DIR=str(tmp_path)) as nearhit:
        await nearhit.stores("x")
        assert await nearhit.stop() == 0
    assert await asyncio.to_thread((small_disk.seen / "answers.db").exists)


def a_folder(place: Path) -> Path:
    (place / "nearhit.db").mkdir()
    return place / "nearhit.db"


def a_link_to_nowhere(place: Path) -> Path:
    (place / "nearhit.db").symlink_to(place / "no" / "folder.db")
    return place / "nearhit.db"


def a_link_to_itself(place: Path) -> Path:
    (place / "nearhit.db").symlink_to(place / "nearhit.db")
    return place / "nearhit.db"


def too_long_a_name(place: Path) -> Path:
    return place / ("n" * 252)


def too_long_a_path(place: Path) -> Path:
    return place.joinpath(*["d" * 200] * 4, "nearhit.db")


@pytest.mark.parametrize("where", [a_folder, a_link_to_nowhere, a_link_to_itself, too_long_a_name, too_long_a_path])
async def test_where_no_file_can_be_answers_are_kept_in_memory(
    tmp_path: Path, model: FakeModel, where: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = await asyncio.to_thread(where, tmp_path)
    before = await asyncio.to_thread(snapshot, tmp_path)
    settings = settings_for(tmp_path / "data", model.url, cache__file=str(file), cache__mode="exact")
    async with running_proxy(settings) as proxy:
        assert (await proxy.chat("x")).outcome == "MISS"
        await proxy.settled()
        await asyncio.sleep(0.5)
        assert (await proxy.chat("x")).outcome == "HIT"
        assert (await proxy.send("GET", "/-/ready")).json["storage"]["standing"] == "closed"
    assert len([r for r in caplog.records if "answers are kept in memory only" in r.getMessage()]) == 1
    assert {name for name in await asyncio.to_thread(snapshot, tmp_path) if not name.startswith("n" * 252)} == set(
        before
    )
