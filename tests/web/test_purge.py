"""`/-/purge`: all that meets conditions goes, from the file, from memory and from other processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest

from storage.base import Change, Delete, Put, Room, StorageBusy, StorageFull
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel
from tests.web.test_entries import ask, listed, many, numbers, put, stored
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near

ONLY = {"Cache-Control": "only-if-cached"}


async def purge(proxy: Proxy, **asked: Any) -> Answer:
    return await proxy.post("/-/purge", json=asked)


def counted(proxy: Proxy) -> float:
    return proxy.services.metrics.value("nearhit_evicted_total", {"reason": "purged"})


class Held:
    """A store's writes of deletions, which wait until they are let go, and of which some fail."""

    def __init__(self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        store: Any = proxy.services.store
        self._write = store.current.write
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()
        self.failures: list[Exception | None] = []
        self.steps = 0
        monkeypatch.setattr(store.current, "write", self._held)

    async def _held(self, changes: Sequence[Change], room: Room | None = None) -> int:
        if any(isinstance(change, Delete) for change in changes):
            self.arrived.set()
            await self.release.wait()
            self.steps += 1
            failure = self.failures.pop(0) if self.failures else None
            if failure is not None:
                raise failure
        count: int = await self._write(changes, room)
        return count


# What goes


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"model": "large"}, [4, 3, 1]),
        ({"endpoint": "completions"}, [4, 2, 1]),
        ({"namespace": (b"n" * 32).hex()}, [4, 2, 1]),
        ({"namespace": ""}, [3]),
        ({"fingerprint": (b"g" * 32).hex()}, [3, 2, 1]),
        ({"text": "lamp"}, [4, 3]),
        ({"id": "00000002"}, [4, 3, 1]),
        ({"older_s": 100}, [3, 2, 1]),
        ({"newer_s": 100.5}, [4]),
        ({"newer_s": 100, "text": "lamp", "model": "small"}, [4, 3, 2]),
        ({"model": "missing"}, [4, 3, 2, 1]),
        ({"all": True}, []),
        ({"model": "large", "all": False}, [4, 3, 1]),
    ],
)
async def test_what_meets_every_condition_goes(proxy: Proxy, asked: dict[str, Any], left: list[int]) -> None:
    old = stored(4, fingerprint=b"g" * 32)
    await put(
        proxy,
        stored(1, words="Dim the lamp.", near=True),
        stored(2, model="large", words="A Lamp?", near=True),
        stored(3, endpoint="completions", namespace=b"n" * 32),
        stored(4, fingerprint=b"g" * 32, stored_ms=old.stored_ms - 200_000),
    )
    dry = await purge(proxy, **asked, dry_run=True)
    assert (dry.status, dry.json["would_remove"]) == (200, 4 - len(left))
    assert await numbers(proxy) == [4, 3, 2, 1]
    answer = await purge(proxy, **asked)
    assert (answer.status, answer.json["removed"]) == (200, 4 - len(left))
    assert await numbers(proxy) == left
    assert counted(proxy) == 4 - len(left)
    assert (await purge(proxy, **asked)).json["removed"] == 0
    assert await proxy.services.store.problems() == []


async def test_a_dry_run_tells_what_would_go(proxy: Proxy) -> None:
    entries = [stored(number, words=f"question {number}", near=True) for number in range(1, 8)]
    await put(proxy, *entries)
    told = (await purge(proxy, all=True, dry_run=True)).json
    assert (told["would_remove"], told["bytes"]) == (7, sum(len(one.answer) for one in entries))
    assert told["examples"] == [{"id": one.key.hex(), "words": one.words} for one in reversed(entries[2:])]
    assert counted(proxy) == 0


async def test_what_is_in_memory_goes_too(start: StartProxy) -> None:
    proxy = await with_near(start, cache__flush_s=60)
    for words in (ASKED, OTHER):
        await ask(proxy, words)
    assert [(await proxy.chat(words)).outcome for words in (ASKED, OTHER, ALIKE)] == ["HIT", "HIT", "NEAR"]
    assert (await purge(proxy, all=True)).json["removed"] == 2
    assert [(await proxy.chat(words, headers=ONLY)).status for words in (ASKED, OTHER, ALIKE)] == [504] * 3
    assert [(await ask(proxy, words)).outcome for words in (ASKED, ALIKE)] == ["MISS", "NEAR"]


async def test_what_does_not_meet_the_conditions_is_served_on(start: StartProxy, model: FakeModel) -> None:
    proxy = await start()
    for words in (ASKED, OTHER):
        await ask(proxy, words)
    assert (await purge(proxy, text="dining")).json["removed"] == 1
    assert [(await proxy.chat(words)).outcome for words in (ASKED, OTHER)] == ["HIT", "MISS"]


async def test_other_processes_stop_serving_it(start: StartProxy) -> None:
    first, second = await start(), await start()
    for words in (ASKED, OTHER):
        await ask(first, words)
    await listed(first)
    for words in (ASKED, OTHER):
        async with asyncio.timeout(60):
            while (await second.chat(words, headers=ONLY)).status != 200:
                await asyncio.sleep(0.01)
    assert (await purge(first, all=True)).json["removed"] == 2
    for words in (ASKED, OTHER):
        async with asyncio.timeout(60):
            while (await second.chat(words, headers=ONLY)).status != 504:
                await asyncio.sleep(0.01)


async def test_more_than_a_step_goes_and_the_rest_stays(start: StartProxy) -> None:
    proxy = await start()
    await many(proxy, 2100, [stored(number, model="keep") for number in range(1, 4)])
    assert (await purge(proxy, model="small", dry_run=True)).json["would_remove"] == 2100
    assert (await purge(proxy, model="small")).json["removed"] == 2100
    assert await numbers(proxy) == [3, 2, 1]
    assert counted(proxy) == 2100
    assert await proxy.services.store.problems() == []


async def test_what_is_stored_meanwhile_stays(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start()
    await many(proxy, 1200)
    held = Held(proxy, monkeypatch)
    purging = asyncio.create_task(purge(proxy, all=True))
    await held.arrived.wait()
    await proxy.services.store.write([Put(stored(5000))])
    held.release.set()
    assert (await purging).json["removed"] == 1200
    assert await numbers(proxy) == [5000]


# Bad requests


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {},
            "say which entries: one or more of model, endpoint, namespace, fingerprint, id, text, older_s, newer_s, or",
        ),
        ({"dry_run": True}, "say which entries"),
        ({"all": False}, "say which entries"),
        ({"all": "yes"}, "all: expected true or false"),
        ({"all": 1}, "all: expected true or false"),
        ({"all": True, "model": "tiny"}, "all: expected without model"),
        ({"all": True, "dry_run": "true"}, "dry_run: expected true or false"),
        ({"all": True, "dryrun": True}, "dryrun: no such field"),
        ({"all": True, "limit": 5}, "limit: no such field"),
        ({"modle": "tiny"}, "modle: no such field"),
        ({"\x1b[31m": 1}, r"\x1b[31m: no such field"),
        ({"model": None}, "model: expected a text"),
        ({"model": ["tiny"]}, "model: expected a text"),
        ({"model": "\ud83d"}, "model: expected a text"),
        ({"endpoint": "/v1/chat/completions"}, "endpoint: expected chat or completions or responses"),
        ({"endpoint": []}, "endpoint: expected"),
        ({"namespace": 0}, "namespace: expected"),
        ({"namespace": "xyz"}, "namespace: expected"),
        ({"fingerprint": "ab"}, "fingerprint: expected the 64"),
        ({"id": "abc"}, "id: expected the first 8 to 64"),
        ({"id": 12345678}, "id: expected"),
        ({"text": ""}, "text: expected"),
        ({"text": "x" * 1001}, "text: expected"),
        ({"text": "\0"}, "text: expected"),
        ({"text": "\ud83d"}, "text: expected"),
        ({"older_s": "60"}, "older_s: expected seconds"),
        ({"older_s": True}, "older_s: expected seconds"),
        ({"older_s": -1}, "older_s: expected seconds"),
        ({"older_s": 1e300}, "older_s: expected seconds"),
        ({"older_s": 10**400}, "older_s: expected seconds"),
        ({"newer_s": float("nan")}, "newer_s: expected seconds"),
        ({"older_s": 60, "newer_s": 30}, "older_s: expected less than newer_s"),
    ],
)
async def test_a_request_that_is_not_understood_removes_nothing(proxy: Proxy, asked: Any, told: str) -> None:
    await put(proxy, stored(1))
    answer = await purge(proxy, **asked)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_selection")
    message = answer.json["error"]["message"]
    assert message.startswith(told)
    assert message.isprintable()
    assert await numbers(proxy) == [1]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"all"', b"[" * 100_000, b"\xff"])
async def test_a_body_that_is_no_object_removes_nothing(proxy: Proxy, body: bytes) -> None:
    await put(proxy, stored(1))
    answer = await proxy.post("/-/purge", data=body)
    assert (answer.status, answer.json["error"]["code"]) == (400, "not_json")
    assert await numbers(proxy) == [1]


# When something goes wrong in the middle


async def test_it_goes_on_when_whoever_asked_hangs_up(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start()
    await many(proxy, 1200)
    held = Held(proxy, monkeypatch)
    async with aiohttp.ClientSession() as client:
        asking = asyncio.create_task(client.post(f"{proxy.url}/-/purge", json={"all": True}))
        await held.arrived.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    held.release.set()
    await eventually(lambda: counted(proxy) == 1200)
    assert await numbers(proxy) == []


@pytest.mark.parametrize("error", [StorageFull("no space"), StorageBusy("locked")])
async def test_a_store_that_fails_in_the_middle_is_told_with_how_far_it_came(
    start: StartProxy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    proxy = await start()
    await many(proxy, 1200)
    held = Held(proxy, monkeypatch)
    held.failures = [None, error]
    held.release.set()
    answer = await purge(proxy, all=True)
    assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")
    assert "500 entries were removed" in answer.json["error"]["message"]
    assert counted(proxy) == 500
    assert len(await numbers(proxy, limit=1000)) == 700
    assert (await purge(proxy, all=True)).json["removed"] == 700


async def test_a_failure_that_nobody_waits_for_any_more_harms_nobody(
    start: StartProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = await start()
    await put(proxy, stored(1))
    held = Held(proxy, monkeypatch)
    held.failures = [StorageFull("no space")]
    async with aiohttp.ClientSession() as client:
        asking = asyncio.create_task(client.post(f"{proxy.url}/-/purge", json={"all": True}))
        await held.arrived.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    held.release.set()
    await eventually(lambda: held.steps == 1)
    assert (await purge(proxy, all=True)).json["removed"] == 1
    assert "never retrieved" not in caplog.text


async def test_stopping_does_not_wait_for_a_purge(
    tmp_path: Any, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await put(proxy, stored(1))
        held = Held(proxy, monkeypatch)
        async with aiohttp.ClientSession() as client:
            asking = asyncio.create_task(client.post(f"{proxy.url}/-/purge", json={"all": True}))
            await held.arrived.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        store: Any = proxy.services.store
        monkeypatch.undo()
        assert store.current is not None
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert await proxy.services.store.problems() == []


@pytest.mark.parametrize("operation", ["select"])
async def test_a_store_that_cannot_be_read_is_told(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store: Any = proxy.services.store

    async def failing(*_: Any, **__: Any) -> None:
        raise StorageBusy("locked")

    monkeypatch.setattr(store.current, operation, failing)
    for dry_run in (True, False):
        answer = await purge(proxy, all=True, dry_run=dry_run)
        assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")
