"""When things fail: the server is never less available than it was without nearhit."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from storage.base import Entry, StorageBusy, StorageFull
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, chat_events, fake_model, held, numbered, raw, reply, sse, streamed


@contextmanager
def write_locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def test_a_locked_database_costs_nobody_an_answer(start: StartProxy, tmp_path: Path, model: FakeModel) -> None:
    proxy = await start()
    await proxy.chat("before")
    await proxy.settled()
    lock = write_locked(tmp_path / "nearhit.db")
    await asyncio.to_thread(lock.__enter__)
    try:
        assert (await proxy.chat("before")).outcome == "HIT"
        assert (await proxy.chat("during")).outcome == "MISS"
        await proxy.settled()
        assert (await proxy.chat("during")).outcome == "HIT"
    finally:
        await asyncio.to_thread(lock.__exit__, None, None, None)


async def test_a_failing_store_is_a_miss_that_is_counted(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await start(cache__hot_bytes=4096, cache__mode="exact")
    value = proxy.services.metrics.value
    await proxy.chat("x")
    await proxy.chat("another that takes its place in memory")
    await proxy.settled()
    await proxy.services.buffer.flush()
    store: Any = proxy.services.store

    async def busy(key: bytes, now_ms: int) -> Entry | None:
        raise StorageBusy("locked")

    async def full(changes: Any, room: Any = None) -> int:
        raise StorageFull("no space")

    monkeypatch.setattr(store.current, "get", busy)
    monkeypatch.setattr(store.current, "write", full)
    assert (await proxy.chat("x")).outcome == "MISS"
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"  # from memory
    assert value("nearhit_storage_errors_total", {"op": "get"}) == 1
    await eventually(lambda: value("nearhit_storage_errors_total", {"op": "write"}) == 1)


async def test_a_store_that_hangs_holds_no_call_up(
    proxy: Proxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = proxy.services.store

    async def hang(key: bytes, now_ms: int) -> Entry | None:
        await asyncio.sleep(3600)
        return None

    monkeypatch.setattr(store.current, "get", hang)
    async with asyncio.timeout(60):
        assert (await proxy.chat("x")).outcome == "MISS"


async def test_a_fault_of_ours_costs_nobody_an_answer(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise KeyError("the prompt of somebody")

    monkeypatch.setattr(type(proxy.services.backends.first.answers), "respond", broken)
    answer = await proxy.chat("x")
    assert (answer.status, answer.headers["Cache-Status"]) == (200, "nearhit; fwd=bypass; detail=internal-error")
    assert "KeyError" in caplog.text
    assert "somebody" not in caplog.text


async def test_a_corrupt_database_is_set_aside_while_running(start: StartProxy, tmp_path: Path) -> None:
    proxy = await start(cache__hot_bytes=0)
    for number in range(50):
        await proxy.chat(f"{number} " + "long " * 400)
    await proxy.settled()
    database = tmp_path / "nearhit.db"
    await proxy.services.buffer.flush()

    def damage() -> None:
        with closing(sqlite3.connect(database)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = bytearray(database.read_bytes())
        content[8192:] = b"\xa5" * (len(content) - 8192)
        database.write_bytes(content)

    await asyncio.to_thread(damage)

    def aside() -> bool:
        return bool(list(tmp_path.glob("nearhit.db.corrupt-*")))

    number = 0
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(aside):
            number += 1
            assert (await proxy.chat(f"{number} again")).status == 200
            await asyncio.sleep(0.02)
    assert (await proxy.chat("new")).status == 200


async def test_a_deleted_database_is_replaced_while_running(
    start: StartProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.web import services

    monkeypatch.setattr(services, "_WATCH_FILE_S", 0.05)
    proxy = await start()
    database = tmp_path / "nearhit.db"
    await asyncio.to_thread(database.unlink)

    def there() -> bool:
        return database.exists()

    async with asyncio.timeout(60):
        while not await asyncio.to_thread(there):
            assert (await proxy.chat("x")).status == 200
            await asyncio.sleep(0.01)


async def test_an_unwritable_data_directory_leaves_a_cache_in_memory(tmp_path: Path, model: FakeModel) -> None:
    blocker = tmp_path / "file"
    await asyncio.to_thread(blocker.write_text, "not a directory")
    async with running_proxy(settings_for(blocker / "data", model.url)) as proxy:
        await proxy.chat("x")
        await proxy.settled()
        assert (await proxy.chat("x")).outcome == "HIT"


async def test_an_upstream_that_refuses_is_told_as_502_and_hits_still_flow(tmp_path: Path) -> None:
    async with fake_model() as model, running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await proxy.chat("known")
        await proxy.settled()
        port = int(model.url.rsplit(":", 1)[1])
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        refused = await proxy.chat("unknown")
        assert (refused.status, refused.json["error"]["code"]) == (502, "upstream_unreachable")
        assert (refused.headers["Retry-After"], refused.outcome) == ("2", "MISS")
        assert (await proxy.send("GET", "/v1/models")).status == 502
        assert (await proxy.chat("known")).outcome == "HIT"
        async with fake_model(port):
            await eventually(lambda: proxy.services.backends.first.tracker.current.confirmed)
            assert (await proxy.chat("unknown")).status == 200
            assert (await proxy.chat("known")).outcome == "HIT"


async def test_loading_is_passed_on_with_a_time_to_retry_and_hits_still_flow(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("known")
    await proxy.settled()
    model.loading = True
    answer = await proxy.chat("unknown")
    assert (answer.status, answer.json["error"]["message"]) == (503, "Loading model")
    assert answer.headers["Retry-After"] == "2"
    await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    assert (await proxy.chat("known")).outcome == "HIT"


async def test_a_stalled_upstream_is_given_up_where_a_limit_is_set(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(upstream__read_timeout_s=1)
    model.respond = held(reply())
    answer = await proxy.chat("x")
    assert (answer.status, answer.json["error"]["code"]) == (504, "upstream_timeout")
    model.respond = streamed(sse(*chat_events("a")[:2], done=False), sse(), hold_after=1)
    with pytest.raises(aiohttp.ClientPayloadError):
        await proxy.chat("x", stream=True)
    model.release.set()


async def test_without_a_limit_a_silent_upstream_is_waited_for(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply("at last"))
    task = asyncio.create_task(proxy.chat("x"))
    await asyncio.sleep(0.3)
    assert not task.done()
    model.release.set()
    assert (await task).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_the_upstream_request(proxy: Proxy, model: FakeModel, stream: bool) -> None:
    model.respond = held(reply())
    task = asyncio.create_task(proxy.chat("x", stream=stream))
    await eventually(lambda: model.started == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: model.gone == 1)
    await proxy.settled()
    assert (await proxy.stats())["not_stored"] == {"client-gone": 1}


async def test_a_bypassed_call_of_a_client_that_leaves_is_cancelled_too(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    task = asyncio.create_task(proxy.chat("x", store=True))
    await eventually(lambda: model.started == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: model.gone == 1)


async def test_stopping_ends_running_fetches_and_leaves_nothing(tmp_path: Path, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("a")[:2], done=False), sse(), hold_after=1)
    async with running_proxy(settings_for(tmp_path, model.url, upstream__on_disconnect="drain")) as proxy:
        session = aiohttp.ClientSession()
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        response = await session.post(f"{proxy.url}/v1/chat/completions", json=body)
        await response.content.readany()
    # The shutdown limit of 0.5 s has passed: the stream was cut, and the client can tell.
    with pytest.raises(aiohttp.ClientPayloadError):
        await response.read()
    await session.close()
    await eventually(lambda: model.gone == 1)


async def test_many_calls_at_once_leave_nothing_behind(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    answers = await asyncio.gather(*(proxy.chat(f"q{n % 20}", stream=n % 3 == 0) for n in range(300)))
    assert {answer.status for answer in answers} == {200}
    await proxy.settled()
    assert await proxy.services.store.problems() == []
    assert 20 <= len(model.generations) < 300


async def test_a_bypassed_call_is_drained_where_the_server_needs_that(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(upstream__on_disconnect="drain")
    model.respond = held(reply())
    task = asyncio.create_task(proxy.chat("x", store=True))
    await eventually(lambda: model.started == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    model.release.set()
    await proxy.settled()
    assert (model.finished, model.gone) == (1, 0)


async def test_a_huge_error_answer_holds_no_more_than_the_limit(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__max_answer_bytes=65_536)

    async def huge(model: FakeModel, request: Any, asked: Any) -> Any:
        from aiohttp import web

        response = web.StreamResponse(status=500)
        await response.prepare(request)
        for _ in range(400):
            await response.write(b"x" * 65_000)
        return response

    model.respond = huge
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        await asyncio.sleep(0.3)
        assert model.finished == 0
        assert len(await response.read()) > 20_000_000


async def test_known_answers_come_while_others_hear_that_the_model_is_loading(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("known")
    await proxy.settled()
    model.loading = True
    await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    for number in range(20):
        assert (await proxy.chat(f"unknown {number}")).status == 503
        assert (await proxy.chat("known")).outcome == "HIT"


@pytest.mark.parametrize(
    ("stream", "body"),
    [
        (True, sse({"choices": 5})),
        (True, sse({"choices": [{"index": 0, "delta": "hello", "finish_reason": "stop"}]})),
        (True, sse({"choices": [{"index": 0, "delta": {"tool_calls": ["f"]}, "finish_reason": "stop"}]})),
        (False, b'{"choices": [{"message": "hi", "finish_reason": "stop"}]}'),
    ],
)
async def test_recording_never_ends_a_relay(proxy: Proxy, model: FakeModel, stream: bool, body: bytes) -> None:
    model.respond = streamed(body) if stream else raw(body)
    for _ in range(2):
        assert (await proxy.chat("x", stream=stream)).body == body
        await proxy.settled()
    assert (await proxy.stats())["cache.size"] == 0


async def test_a_follower_of_an_answer_that_cannot_be_rendered_asks_itself(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(raw(b'{"choices": [{"message": {"content": "\\ud83d"}, "finish_reason": "stop"}]}'))
    tasks = [asyncio.create_task(proxy.chat("x")) for _ in range(3)]
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}


async def test_a_stored_answer_that_cannot_be_read_is_asked_anew(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("x")
    await proxy.settled()
    for ready in proxy.services.backends.first.answers._hot._held.values():
        object.__setattr__(ready.entry, "answer", b"{damaged")
    assert (await proxy.chat("x")).status == 200
    assert (await proxy.chat("x")).outcome == "MISS"


async def test_headers_that_are_no_http_are_told_as_such(proxy: Proxy, model: FakeModel) -> None:
    from aiohttp import web

    async def garbled(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/garbled":
            return None
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 9000 + b"\r\n")
        request.transport.close()
        raise ConnectionResetError

    model.extra = garbled
    answer = await proxy.send("GET", "/garbled")
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_garbled")
    assert proxy.services.backends.first.tracker.current.confirmed


async def test_a_fault_in_the_fast_look_up_costs_no_answer(
    proxy: Proxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("planted")

    monkeypatch.setattr(proxy.services.hot, "get", broken)
    answer = await proxy.chat("x")
    assert (answer.status, answer.headers["Cache-Status"]) == (200, "nearhit; fwd=bypass; detail=internal-error")


async def test_a_fault_while_asking_again_costs_no_answer(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start(cache__join_failures="retry", upstream__busy_retry_s=0)
    model.respond = held(raw(b"{}", status=503))
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)

    async def broken(*_: object, **__: object) -> None:
        raise LookupError("planted")

    monkeypatch.setattr(proxy.services.backends.first.answers, "respond", broken)
    model.respond = reply("fine")
    model.release.set()
    assert (await leader).status == 503
    assert ((await follower).status, (await follower).outcome) == (200, "BYPASS")
