"""The disk is full: every client gets its answer, what is stored stays, and storing goes on by itself."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from tests.conftest import StartProxy
from tests.failures.disks import Disk
from tests.failures.serving import Nearhit, serving_on, sound
from tests.fake_model import FakeModel

NO_MEMORY = {"NEARHIT_CACHE_HOT_BYTES": "0"}
"""So that what is served comes from the file."""
BEFORE = ("before 0", "before 1", "before 2")


async def fill(disk: Disk, nearhit: Nearhit) -> None:
    await asyncio.to_thread(disk.fill, nearhit.pid)


async def ask_while_full(nearhit: Nearhit, count: int) -> None:
    for number in range(count):
        assert await nearhit.outcome(f"during {number}") == "MISS"
        assert await nearhit.outcome(f"before {number % 3}") == "HIT"

    async def noticed() -> bool:
        return await nearhit.errors("write") > 0

    await nearhit.until(noticed)


async def test_nobody_notices_and_storing_goes_on_once_there_is_room(small_disk: Disk, model: FakeModel) -> None:
    async with serving_on(small_disk, model, **NO_MEMORY) as nearhit:
        await nearhit.stores(*BEFORE)
        await fill(small_disk, nearhit)
        await ask_while_full(nearhit, 12)
        assert await nearhit.size() == 3
        assert len(nearhit.told("storage failed (write)")) == 1
        assert "requests are answered without it" in nearhit.told("storage failed (write)")[0]
        await asyncio.to_thread(small_disk.free, nearhit.pid)
        await nearhit.stores_again("after")
        for content in BEFORE:
            assert await nearhit.outcome(content) == "HIT"
        assert await nearhit.stop() == 0
    assert "Traceback" not in "\n".join(nearhit.lines)
    assert await sound(small_disk) > 3


async def test_what_was_stored_outlives_a_kill_and_a_start_on_a_full_disk(small_disk: Disk, model: FakeModel) -> None:
    async with serving_on(small_disk, model, **NO_MEMORY) as nearhit:
        await nearhit.stores(*BEFORE)
        await fill(small_disk, nearhit)
        await ask_while_full(nearhit, 6)
        assert await nearhit.stop(signal.SIGKILL) == -signal.SIGKILL
    await asyncio.to_thread(small_disk.fill, None)
    async with serving_on(small_disk, model, **NO_MEMORY) as again:
        for content in (*BEFORE, "new"):
            assert (await again.chat(content))[0] == 200
        assert await again.stop() == 0
    assert "Traceback" not in "\n".join(nearhit.lines + again.lines)
    assert await sound(small_disk) == 3


async def test_a_start_on_a_full_disk_serves_from_memory_until_there_is_room(
    small_disk: Disk, model: FakeModel
) -> None:
    await asyncio.to_thread(small_disk.fill, None)
    async with serving_on(small_disk, model) as nearhit:
        assert await nearhit.outcome("x") == "MISS"
        assert await nearhit.storage() == "closed"
        # Longer than any of its pauses.
        for _ in range(20):
            assert await nearhit.outcome("x") == "HIT"
            await asyncio.sleep(0.05)
        assert len(nearhit.told("answers are kept in memory only")) == 1
        await asyncio.to_thread(small_disk.free, nearhit.pid)
        await nearhit.stores_again("after")
        assert await nearhit.storage() == "open"
        assert await nearhit.stop() == 0
    assert await sound(small_disk) >= 1


async def test_what_cannot_be_written_takes_no_memory(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__mode="exact", cache__hot_bytes=0, cache__flush_s=0.01)
    store: Any = proxy.services.store
    await store.current._writer.execute_fetchall("PRAGMA max_page_count = 1")
    value = proxy.services.metrics.value
    for number in range(100):
        assert (await proxy.chat(f"during {number}")).outcome == "MISS"
    await proxy.settled()
    await proxy.services.buffer.flush()
    assert proxy.services.buffer._pending.weight == 0
    assert value("nearhit_storage_errors_total", {"op": "write"}) > 0
    assert (await proxy.stats())["not_stored"] == {}
    await store.current._writer.execute_fetchall("PRAGMA max_page_count = 1000000")
    await proxy.chat("after")
    await proxy.settled()
    await proxy.services.buffer.flush()
    assert (await store.totals()).entries == 1
    assert await store.problems() == []
