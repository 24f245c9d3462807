"""The disk is full: every client gets its answer, what is stored stays, and storing goes on by itself."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.failures.disks import Disk
from tests.failures.serving import Nearhit, serving_on, sound
from tests.fake_model import FakeModel

NO_MEMORY = {"NEARHIT_CACHE_HOT_BYTES": "0"}
"""So that what is served comes from the file."""


async def store_some(nearhit: Nearhit, count: int) -> None:
    for number in range(count):
        assert await nearhit.outcome(f"before {number}") == "MISS"

    async def stored() -> bool:
        return await nearhit.size() == count

    await nearhit.until(stored)


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
        await store_some(nearhit, 3)
        await fill(small_disk, nearhit)
        await ask_while_full(nearhit, 12)
        assert await nearhit.size() == 3
        assert len(nearhit.told("storage failed (write)")) == 1
        assert "requests are answered without it" in nearhit.told("storage failed (write)")[0]
        await asyncio.to_thread(small_disk.free, nearhit.pid)
        await nearhit.stores_again("after")
        for number in range(3):
            assert await nearhit.outcome(f"before {number}") == "HIT"
        assert await nearhit.stop() == 0
    assert "Traceback" not in "\n".join(nearhit.lines)
    assert await sound(small_disk) > 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_what_was_stored_outlives_an_end_on_a_full_disk(
    small_disk: Disk, model: FakeModel, number: signal.Signals
) -> None:
    async with serving_on(small_disk, model, **NO_MEMORY) as nearhit:
        await store_some(nearhit, 3)
        await fill(small_disk, nearhit)
        await ask_while_full(nearhit, 6)
        assert await nearhit.stop(number) == (0 if number == signal.SIGTERM else -number)
        assert "Traceback" not in "\n".join(nearhit.lines)
    await asyncio.to_thread(small_disk.fill, None)
    # Still full: what can be served is served, and nothing is spoilt by trying.
    async with serving_on(small_disk, model, **NO_MEMORY) as again:
        for content in ("before 0", "new"):
            assert (await again.chat(content))[0] == 200
        await asyncio.to_thread(small_disk.free, again.pid)
        await again.stores_again("after")
        for number in range(3):
            assert await again.outcome(f"before {number}") == "HIT"
        assert await again.stop() == 0
    assert await sound(small_disk) > 3


async def test_a_start_on_a_full_disk_serves_from_memory_until_there_is_room(
    small_disk: Disk, model: FakeModel
) -> None:
    await asyncio.to_thread(small_disk.fill, None)
    async with serving_on(small_disk, model) as nearhit:
        assert await nearhit.outcome("x") == "MISS"
        assert (await nearhit.storage())["standing"] == "closed"
        # Longer than any of its pauses.
        for _ in range(20):
            assert await nearhit.outcome("x") == "HIT"
            await asyncio.sleep(0.05)
        assert len(nearhit.told("answers are kept in memory only")) == 1
        await asyncio.to_thread(small_disk.free, nearhit.pid)
        await nearhit.stores_again("after")
        assert await nearhit.storage() == {"standing": "open", "trouble": ""}
        assert await nearhit.stop() == 0
    assert await sound(small_disk) >= 1
