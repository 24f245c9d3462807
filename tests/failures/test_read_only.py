"""Nothing can be written: answers are kept in memory, it is said, and storing goes on by itself."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartProxy, eventually, running_proxy, settings_for
from tests.failures.disks import Disk, Mounted, limited, may_mount, mounted
from tests.failures.serving import Nearhit, serving_on, sound
from tests.fake_model import FakeModel


async def serves_from_memory(nearhit: Nearhit, content: str) -> None:
    """For longer than any of its pauses."""
    assert await nearhit.outcome(content) == "MISS"
    for _ in range(10):
        assert await nearhit.outcome(content) == "HIT"
        await asyncio.sleep(0.05)


async def closed(nearhit: Nearhit) -> bool:
    return await nearhit.storage() == "closed"


async def test_a_new_data_directory_that_cannot_be_written(protected_disk: Disk, model: FakeModel) -> None:
    await asyncio.to_thread(protected_disk.protect)
    async with serving_on(protected_disk, model) as nearhit:
        await serves_from_memory(nearhit, "x")
        assert await closed(nearhit)
        assert "the store does not answer" in await nearhit.problems()
        assert len(nearhit.told("no local admin token")) == 1
        (told,) = nearhit.told("answers are kept in memory only")
        assert str(protected_disk.folder / "data") in told
        await asyncio.to_thread(protected_disk.release)
        await nearhit.stores_again("after")
        assert await nearhit.storage() == "open"
        assert await nearhit.problems() == ""
        assert await nearhit.stop() == 0
    assert "Traceback" not in "\n".join(nearhit.lines)
    assert await sound(protected_disk) >= 1


async def test_a_database_that_cannot_be_written_is_left_as_it_is(protected_disk: Disk, model: FakeModel) -> None:
    made, data = protected_disk.folder.with_name("made"), protected_disk.seen / "data"
    async with running_proxy(settings_for(made, model.url, cache__mode="exact")) as proxy:
        assert (await proxy.chat("before")).outcome == "MISS"
        await proxy.settled()
    await asyncio.to_thread(shutil.copytree, made, data)
    await asyncio.to_thread(protect_deep, protected_disk, data)
    async with serving_on(protected_disk, model) as nearhit:
        await serves_from_memory(nearhit, "x")
        assert await closed(nearhit)
        assert len(nearhit.told("answers are kept in memory only")) == 1
        await asyncio.to_thread(release_deep, protected_disk, data)
        await nearhit.stores_again("after")
        assert await nearhit.outcome("before") == "HIT"
        assert await nearhit.stop() == 0
    assert await sound(protected_disk) > 1


def protect_deep(disk: Disk, data: Path) -> None:
    for path in (*data.iterdir(), data):
        path.chmod(0o500 if path.is_dir() else 0o400)
    disk.protect()


def release_deep(disk: Disk, data: Path) -> None:
    disk.release()
    for path in (data, *data.iterdir()):
        path.chmod(0o700 if path.is_dir() else 0o600)


# While it runs


async def test_a_database_that_turns_read_only_is_as_a_full_disk(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__mode="exact", cache__hot_bytes=0, cache__flush_s=0.01)
    store: Any = proxy.services.store
    await proxy.chat("before")
    await proxy.settled()
    await proxy.services.buffer.flush()
    # What SQLite says where a file system was remounted read-only after an error of its disk.
    await store.current._writer.execute("PRAGMA query_only = ON")
    for number in range(5):
        assert (await proxy.chat(f"during {number}")).outcome == "MISS"
        await proxy.settled()
    await eventually(lambda: proxy.services.metrics.value("nearhit_storage_errors_total", {"op": "write"}) > 0)
    assert (await proxy.chat("before")).outcome == "HIT"
    assert (await proxy.stats())["cache.size"] == 1
    await proxy.services.buffer.flush()
    await store.current._writer.execute("PRAGMA query_only = OFF")
    await proxy.chat("after")
    await proxy.settled()
    await proxy.services.buffer.flush()
    assert (await proxy.stats())["cache.size"] == 2
    assert await store.problems() == []


# While it runs, the whole directory


class Away:
    """A data directory that is moved away, with something in its place that is none."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._data = disk.seen / "data"

    def hide(self) -> None:
        self._data.rename(self._data.with_name("moved"))
        self._data.touch()

    def show(self) -> None:
        self._data.unlink()
        self._data.with_name("moved").rename(self._data)


class Covered(Away):
    """A data directory over which another disk is mounted, read-only."""

    def hide(self) -> None:
        assert isinstance(self.disk, Mounted)
        self.disk.hide()

    def show(self) -> None:
        assert isinstance(self.disk, Mounted)
        self.disk.show()


@pytest.fixture(params=[Away, Covered] if may_mount() else [Away])
def away(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Away]:
    with (mounted if request.param is Covered else limited)(tmp_path / "disk") as disk:
        yield request.param(disk)


async def test_a_data_directory_that_is_hidden_for_a_while_is_found_again(away: Away, model: FakeModel) -> None:
    async with serving_on(away.disk, model) as nearhit:
        await nearhit.stores_again("before")
        await asyncio.to_thread(away.hide)
        await nearhit.until(lambda: closed(nearhit))
        await serves_from_memory(nearhit, "x")
        await asyncio.to_thread(away.show)
        await nearhit.stores_again("after")
        assert await nearhit.outcome("before 1") == "HIT"
        assert await nearhit.stop() == 0
    assert await sound(away.disk) >= 2
