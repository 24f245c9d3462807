"""Two nearhits on one file for a while, of one version or of two: an upgrade."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from proxy.web import services
from tests.conftest import Proxy, StartProxy
from tests.failures.disks import Disk
from tests.failures.serving import Nearhit, serving_on, sound
from tests.fake_model import FakeModel
from tests.storage.files import snapshot
from tests.storage.test_two_versions import NEXT, newer_is_gone, newer_takes_over


async def standing_becomes(proxy: Proxy, wanted: str) -> None:
    async with asyncio.timeout(60):
        while (await proxy.send("GET", "/-/ready")).json["storage"]["standing"] != wanted:
            await asyncio.sleep(0.02)


def database_of(folder: Path) -> str:
    # Whoever looks into it has SQLite make an empty log beside it.
    return snapshot(folder)["nearhit.db"]


@pytest.mark.parametrize("asked", [False, True], ids=["idle", "busy"])
async def test_an_older_one_serves_from_memory_and_leaves_the_file_to_the_newer(
    start: StartProxy,
    tmp_path: Path,
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: bool,
) -> None:
    monkeypatch.setattr(services, "_WATCH_FILE_S", 0.05)
    path = tmp_path / "nearhit.db"
    proxy = await start(cache__mode="exact", cache__flush_s=0.01)
    assert (await proxy.chat("before")).outcome == "MISS"
    await proxy.settled()
    await proxy.services.buffer.flush()
    await newer_takes_over(path)
    if asked:
        assert (await proxy.chat("at that moment")).outcome == "MISS"
    await standing_becomes(proxy, "closed")
    before = await asyncio.to_thread(database_of, tmp_path)
    assert (await proxy.chat("x")).outcome == "MISS"
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert (await proxy.chat("x")).outcome == "HIT"
    assert await asyncio.to_thread(database_of, tmp_path) == before
    told = [r.getMessage() for r in caplog.records if "answers are kept in memory only" in r.getMessage()]
    assert len(told) == 1
    assert f"the database has schema {NEXT}, this nearhit knows {NEXT - 1}: start the newer nearhit" in told[0]
    findings = (await proxy.send("GET", "/-/doctor")).json["findings"]
    assert any(f"schema {NEXT}" in finding["what"] for finding in findings)
    await newer_is_gone(path)
    await standing_becomes(proxy, "open")
    assert (await proxy.chat("before")).outcome == "HIT"
    assert await proxy.services.store.problems() == []


async def test_an_upgrade_that_overlaps_loses_nothing_of_either(tmp_path: Path, model: FakeModel) -> None:
    disk = Disk(tmp_path / "disk")
    await asyncio.to_thread(disk.folder.mkdir)
    # The old one writes what it has learned when it is told to end.
    async with serving_on(disk, model, NEARHIT_CACHE_FLUSH_S="60") as old, serving_on(disk, model) as new:
        await asyncio.gather(ask(old, "old"), ask(new, "new"))
        assert await old.stop() == 0
        assert not old.told("storage failed")
        await ask(new, "later")
        for who in ("old", "new", "later"):
            for number in range(10):
                await new.until(partial(new.knows, f"{who} {number}"))
        assert await new.stop() == 0
        assert not new.told("storage failed")
    assert await sound(disk) == 30


async def ask(nearhit: Nearhit, who: str) -> None:
    for number in range(10):
        assert await nearhit.outcome(f"{who} {number}") == "MISS"
