"""Identical calls in flight share one fetch, streams included; leaving and failing stay everyone's own affair."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, chat_events, error, held, numbered, raw, reply, sse, streamed
from tests.web.test_exact_tier import said
from tests.web.test_identity import props

FORMS: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]


async def received_up_to(text: bytes, response: aiohttp.ClientResponse) -> bytes:
    """What has come by the time this has."""
    received = b""
    while text not in received:
        piece = await response.content.readany()
        assert piece, received
        received += piece
    return received


async def several(proxy: Proxy, count: int, **fields: Any) -> list[asyncio.Task[Answer]]:
    return [asyncio.create_task(proxy.chat("x", **fields)) for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
async def test_identical_calls_make_one_upstream_request(proxy: Proxy, model: FakeModel, form: dict[str, Any]) -> None:
    model.respond = held(numbered())
    tasks = await several(proxy, 20, **form)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 19)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert len(model.generations) == 1
    assert {said(answer) for answer in answers} == {"answer 1"}
    assert sorted(answer.outcome for answer in answers) == ["JOINED"] * 19 + ["MISS"]
    joined = [a for a in answers if a.outcome == "JOINED"]
    assert {a.headers["Cache-Status"] for a in joined} == {"nearhit; fwd=miss; collapsed"}


def tells_usage(form: dict[str, Any]) -> bool:
    return not form.get("stream") or "stream_options" in form


@pytest.mark.parametrize("leading", FORMS)
@pytest.mark.parametrize("following", FORMS)
async def test_a_follower_is_answered_in_its_own_form(
    proxy: Proxy, model: FakeModel, leading: dict[str, Any], following: dict[str, Any]
) -> None:
    model.respond = held(reply("one ", "two"))
    # Who must be told what the other's answer will not tell asks at once, instead of waiting for nothing.
    joins = tells_usage(leading) or not tells_usage(following)
    leader = asyncio.create_task(proxy.chat("x", **leading))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x", **following))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") + model.started == 2)
    assert model.started == (1 if joins else 2)
    model.release.set()
    one, other = await asyncio.gather(leader, follower)
    assert said(one) == said(other) == "one two"
    assert other.outcome == ("JOINED" if joins else "MISS")
    assert [a.headers["Content-Type"].partition(";")[0] for a in (one, other)] == [
        "text/event-stream" if form.get("stream") else "application/json" for form in (leading, following)
    ]
    assert ("usage" in other.body.decode()) is tells_usage(following)


LIVE = [({"stream": True, "stream_options": {"include_usage": True}}, {"stream": True}), ({"stream": True},) * 2]


@pytest.mark.parametrize(("leading", "following"), LIVE)
async def test_a_streaming_follower_reads_live_whatever_the_leader_asked_of_usage(
    proxy: Proxy, model: FakeModel, leading: dict[str, Any], following: dict[str, Any]
) -> None:
    events = chat_events("a", "b", usage="stream_options" in leading)
    model.respond = streamed(sse(*events[:2], done=False), sse(*events[2:]), hold_after=1)
    leader = asyncio.create_task(proxy.chat("x", **leading))
    await eventually(lambda: model.started == 1)
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, **following}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as follower:
        first = await received_up_to(b'"content": "a"', follower)
        assert not leader.done()
        model.release.set()
        whole = first + await follower.read()
    assert whole == sse(*chat_events("a", "b"))
    assert ("usage" in (await leader).body.decode()) is ("stream_options" in leading)


async def test_a_follower_who_wants_usage_gets_it_live_from_the_timings_of_llama_cpp(
    start: StartProxy, model: FakeModel
) -> None:
    model.props = props()
    proxy = await start(upstream__kind="llamacpp", upstream__canary_s=0)
    timings = {"cache_n": 2, "prompt_n": 7, "predicted_n": 4}
    events = chat_events("a", "b")
    events[-1]["timings"] = timings
    model.respond = streamed(sse(*events[:2], done=False), sse(*events[2:]), hold_after=1)
    leader = asyncio.create_task(proxy.chat("x", stream=True))
    await eventually(lambda: model.started == 1)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, **asked}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as follower:
        first = await received_up_to(b'"content": "a"', follower)
        assert not leader.done()
        model.release.set()
        lines = (first + await follower.read()).decode().split("\n\n")
    assert lines[-2] == "data: [DONE]"
    told = json.loads(lines[-3].removeprefix("data: "))
    assert (told["choices"], told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == ([], 9, 4)
    assert "usage" not in (await leader).body.decode()


async def test_a_follower_in_mid_stream_gets_the_beginning_at_once_and_then_the_tail(
    proxy: Proxy, model: FakeModel
) -> None:
    model.respond = streamed(sse(*chat_events("a", "b")[:2], done=False), sse(*chat_events("a", "b")[2:]), hold_after=1)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
    leader = asyncio.create_task(proxy.chat("x", stream=True))
    await eventually(lambda: model.started == 1)
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as follower:
        first = await received_up_to(b'"content": "a"', follower)
        assert not leader.done()
        model.release.set()
        rest = await follower.read()
    assert (first + rest) == (await leader).body
    assert len(model.generations) == 1


async def test_a_leader_that_leaves_hands_over(proxy: Proxy, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("a", "b")[:2], done=False), sse(*chat_events("a", "b")[2:]), hold_after=1)
    leader = asyncio.create_task(proxy.chat("x", stream=True))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x", stream=True))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    model.release.set()
    assert said(await follower) == "ab"
    await proxy.settled()
    assert (model.gone, (await proxy.chat("x")).outcome) == (0, "MISS")  # its stream told no usage
    assert (await proxy.chat("x", stream=True)).outcome == "HIT"


async def test_the_last_reader_to_leave_ends_the_fetch(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    tasks = await several(proxy, 3)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await eventually(lambda: model.gone == 1)
    await proxy.settled()


async def test_a_new_call_does_not_join_a_fetch_that_is_being_given_up(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply("fine"))
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    leader.cancel()
    model.release.set()
    assert said(await proxy.chat("x")) == "fine"
    await asyncio.gather(leader, return_exceptions=True)


async def test_a_drained_fetch_goes_on_without_readers_and_is_stored(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(upstream__on_disconnect="drain")
    model.respond = held(reply("drained"))
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    model.release.set()
    await proxy.settled()
    assert (model.finished, model.gone) == (1, 0)
    assert (await proxy.chat("x")).outcome == "HIT"


async def test_followers_hear_the_true_error(proxy: Proxy, model: FakeModel) -> None:
    body = error(500, "out of memory", "server_error").body
    assert isinstance(body, bytes)
    model.respond = held(raw(body, status=500))
    tasks = await several(proxy, 2) + await several(proxy, 2, stream=True)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 3)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert {(a.status, a.body) for a in answers} == {(500, body)}


async def test_a_follower_of_another_form_asks_itself_when_the_answer_cannot_be_converted(
    proxy: Proxy, model: FakeModel
) -> None:
    model.respond = held(streamed(sse(*chat_events("half"), done=False)))
    asked: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    leader = asyncio.create_task(proxy.chat("x", **asked))
    await eventually(lambda: model.started == 1)
    follower = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    await leader
    answer = await follower
    assert (answer.outcome, answer.status, len(model.generations)) == ("BYPASS", 200, 2)


async def test_after_an_answer_that_could_not_be_shared_equal_calls_go_side_by_side(
    proxy: Proxy, model: FakeModel
) -> None:
    model.respond = held(raw(b'{"error": {"message": "slow down"}}', status=429))
    first = await several(proxy, 2)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 1)
    model.release.set()
    assert [a.status for a in await asyncio.gather(*first)] == [429, 429]
    model.release.clear()
    before = model.started
    later = await several(proxy, 3)
    await eventually(lambda: model.started == before + 3)
    model.release.set()
    await asyncio.gather(*later)
    assert proxy.services.metrics.value("nearhit_joined_total") == 1


async def test_who_has_waited_long_enough_for_another_asks_itself(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__join_timeout_s=0.05)
    model.respond = held(numbered())
    tasks = await several(proxy, 2)
    await eventually(lambda: model.started == 2)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert {a.outcome for a in answers} <= {"MISS", "BYPASS"}
    assert {a.status for a in answers} == {200}


async def garble_first(model: FakeModel, request: Any, asked: Any) -> Any:
    await model.release.wait()
    if model.started == 1:
        request.transport.write(b"no HTTP at all\r\n\r\n")
        request.transport.close()
        raise aiohttp.ClientConnectionResetError
    return await numbered()(model, request, asked)


@pytest.mark.parametrize("status", [None, 500, 503])
async def test_followers_of_a_failure_ask_once_together_where_that_is_configured(
    start: StartProxy, model: FakeModel, status: int | None
) -> None:
    proxy = await start(cache__join_failures="retry", upstream__busy_retry_s=0)

    async def fail_first(model: FakeModel, request: Any, asked: Any) -> Any:
        await model.release.wait()
        return (
            error(status or 0, "no", "server_error") if model.started == 1 else await numbered()(model, request, asked)
        )

    model.respond = garble_first if status is None else held(fail_first)
    tasks = await several(proxy, 6)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 5)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert sorted(a.status for a in answers) == sorted([200] * 5 + [status or 502])
    assert model.started == 2
    assert {said(a) for a in answers if a.status == 200} == {"answer 2"}


async def test_followers_of_a_failure_that_goes_on_hear_of_it_after_one_more_try(
    start: StartProxy, model: FakeModel
) -> None:
    proxy = await start(cache__join_failures="retry")
    model.respond = held(raw(b"{}", status=500))
    tasks = await several(proxy, 6)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 5)
    model.release.set()
    assert {a.status for a in await asyncio.gather(*tasks)} == {500}
    assert model.started == 2


async def test_a_whole_answer_that_breaks_off_fails_all_who_wait_for_it(proxy: Proxy, model: FakeModel) -> None:
    async def half(model: FakeModel, request: Any, asked: Any) -> Any:
        await model.release.wait()
        response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"choices"')
        request.transport.abort()
        return response

    model.respond = half
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    followers = await several(proxy, 2, stream=True)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    answers = await asyncio.gather(*followers)
    assert {(a.status, a.json["error"]["code"]) for a in answers} == {(502, "upstream_interrupted")}
    with pytest.raises(aiohttp.ClientPayloadError):
        await leader
    assert model.started == 1


async def test_a_call_that_finds_its_answer_too_old_joins_the_new_one(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    await proxy.chat("x")
    await proxy.settled()
    await asyncio.sleep(1.1)  # ages are whole seconds
    model.respond = held(numbered())
    young = {"Cache-Control": "max-age=0"}
    tasks = await several(proxy, 3, headers={"Cache-Control": "min-fresh=10000000"})
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    own = await several(proxy, 1, headers=young)
    await eventually(lambda: model.started == 3)
    model.release.set()
    assert len({said(a) for a in await asyncio.gather(*tasks)}) == 1
    assert (await own[0]).outcome == "MISS"


async def test_only_if_cached_does_not_wait_for_an_answer_under_way(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    answer = await proxy.chat("x", headers={"Cache-Control": "only-if-cached"})
    assert answer.status == 504
    model.release.set()
    await leader


async def test_no_cache_never_joins(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(numbered())
    leader = asyncio.create_task(proxy.chat("x"))
    await eventually(lambda: model.started == 1)
    other = asyncio.create_task(proxy.chat("x", headers={"Cache-Control": "no-cache"}))
    await eventually(lambda: model.started == 2)
    model.release.set()
    await asyncio.gather(leader, other)
    assert len(model.generations) == 2


async def test_a_slow_reader_of_a_huge_answer_holds_no_more_than_the_limit(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__max_answer_bytes=65_536)
    model.respond = streamed(*[b": " + b"x" * 65_000 + b"\n\n"] * 400)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        await asyncio.sleep(0.3)
        # 26 MB would have been sent by now, did nobody wait for the reader.
        assert model.finished == 0
        assert len(await response.read()) > 20_000_000
    assert model.finished == 1


async def test_uncacheable_calls_do_not_wait_for_one_another(proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    tasks = await several(proxy, 3, store=True)
    await eventually(lambda: model.started == 3)
    model.release.set()
    assert {a.outcome for a in await asyncio.gather(*tasks)} == {"BYPASS"}


async def test_first_bytes_of_a_miss_come_before_the_answer_has_ended(proxy: Proxy, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("early", "late")[:2], done=False), sse(), hold_after=1)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await received_up_to(b"early", response)
        assert model.finished == 0
        model.release.set()
        await response.read()


async def test_an_unreachable_upstream_fails_all_callers_alike(start: StartProxy, model: FakeModel) -> None:
    proxy = await start()

    async def hang_up(model: FakeModel, request: Any, asked: Any) -> Any:
        await model.release.wait()
        request.transport.abort()
        raise aiohttp.ClientConnectionResetError

    model.respond = hang_up
    tasks = await several(proxy, 3)
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 2)
    model.release.set()
    answers = await asyncio.gather(*tasks)
    assert {a.status for a in answers} == {502}
    assert all(a.json["error"]["code"] == "upstream_unreachable" for a in answers)


async def test_a_client_that_closes_at_the_end_mark_has_its_answer_stored(proxy: Proxy, model: FakeModel) -> None:
    # The official clients hang up at [DONE], before the closing bytes of the upstream's answer have come.
    model.respond = streamed(sse(*chat_events("whole", usage=True)), b"", hold_after=1)
    options = {"include_usage": True}
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": True, "stream_options": options}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await received_up_to(b"[DONE]", response)
    await asyncio.sleep(0.1)  # nearhit hears that the client has gone
    model.release.set()
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"


async def test_an_upstream_that_never_closes_after_the_end_mark_is_left_and_its_answer_stored(
    proxy: Proxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.cache import flight

    monkeypatch.setattr(flight, "TAIL_S", 0.05)
    model.respond = streamed(sse(*chat_events("whole", usage=True)), b"", hold_after=1)
    body = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "stream": True}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await received_up_to(b"[DONE]", response)
    await proxy.settled()
    await eventually(lambda: model.gone == 1)
    assert (await proxy.chat("x")).outcome == "HIT"
