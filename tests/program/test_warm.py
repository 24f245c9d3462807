"""Asking before clients do, as people and programs run it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from proxy.cache.dialects import DIALECTS
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, Json, error, held, reply
from tests.program.test_cli import PROGRAM, Ran, environment, run
from tests.program.test_transfer_commands import in_between, nearhit, piped, written
from tests.web.test_transfer import lines, row, whole

PROMPTS = b"What is one?\n\n# a remark\nWhat is two?\r\n  What is three?  \n"
NO_MODEL = "asked without a model: clients that name one will not find these; see --model\n"


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "tiny",
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 1},
}
SAID = {"type": "output_text", "text": "hello", "annotations": []}
ITEM = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [SAID]}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "tiny",
    "status": "completed",
    "output": [ITEM],
    "usage": {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4},
}
EMBEDDINGS = {
    "object": "list",
    "model": "tiny",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.25, -1.5]}],
    "usage": {"prompt_tokens": 3, "total_tokens": 3},
}


def batch(number: int, url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    """A line of an OpenAI batch file."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": f"q{number}"}], "temperature": 0, **body}
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": asked}


async def warm(home: Path, proxy: Proxy, content: bytes, *arguments: str, **changes: str) -> Ran:
    file = await written(home / "warm.txt", content)
    return await nearhit(home, proxy, "warm", file, *arguments, **changes)


def told(ran: Ran) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran.out)
    return {name: value for name, value in found.items() if value and name != "seconds"}


def asked_of(model: FakeModel) -> list[Json]:
    return [seen.json for seen in model.generations]


def test_help_has_an_example(tmp_path: Path) -> None:
    ran = run(tmp_path, "warm", "--help")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"Example: nearhit warm\b", ran.out)


# Prompts


async def test_prompts_are_asked_and_then_found_by_clients(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    more = ("--model", "tiny", "--system", "Be brief.", "--max-tokens", "20")
    ran = await warm(tmp_path, proxy, PROMPTS, *more)
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(r"3 asked, 0 known already, in [0-9.]+ s\n", ran.out)
    assert asked_of(model)[0] == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is one?"}],
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 20,
    }
    said = [asked["messages"][-1]["content"] for asked in asked_of(model)]
    assert said == ["What is one?", "What is two?", "  What is three?  "]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is two?"}]
    for stream in (False, True):
        answer = await proxy.chat(model="tiny", max_tokens=20, messages=messages, stream=stream)
        assert answer.outcome == "HIT"


async def test_what_is_known_is_not_asked_again(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    assert told(await warm(tmp_path, proxy, PROMPTS, "--json")) == {"questions": 3, "asked": 3}
    again = await warm(tmp_path, proxy, PROMPTS + b"What is four?\n", "--json")
    assert (again.code, told(again)) == (0, {"questions": 4, "asked": 1, "known": 3})
    assert len(model.generations) == 4


@pytest.mark.parametrize(
    ("flag", "fields"),
    [("0", {"temperature": 0}), ("0.0", {"temperature": 0.0}), ("0.7", {"temperature": 0.7}), ("none", {})],
)
async def test_the_temperature_is_sent_as_it_is_spelled(
    tmp_path: Path, proxy: Proxy, model: FakeModel, flag: str, fields: dict[str, float]
) -> None:
    ran = await warm(tmp_path, proxy, b"hi\n", "--temperature", flag)
    assert ran.err == NO_MODEL
    body = model.generations[0].body
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    assert body == json.dumps({**messages, **fields}).encode()


async def test_the_system_prompt_may_be_in_a_file(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    system = "Du bist höflich.\nImmer.\n"
    await written(tmp_path / "system.txt", system.encode())
    assert (await warm(tmp_path, proxy, b"hi\n", "--system", "@system.txt")).code == 0
    assert asked_of(model)[0]["messages"][0] == {"role": "system", "content": system}


async def test_a_mark_of_the_byte_order_is_no_part_of_a_prompt(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    assert (await warm(tmp_path, proxy, b"\xef\xbb\xbfhi\n")).code == 0
    assert asked_of(model)[0]["messages"][0]["content"] == "hi"


async def test_bytes_that_are_no_text_are_told_by_line(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    ran = await warm(tmp_path, proxy, b"one\n\xff\xfe\nthree\n", "--model", "tiny")
    assert (ran.code, len(model.generations)) == (1, 2)
    assert ran.err == "1 lines are no questions\nline 2: expected text in UTF-8\n"


async def test_prompts_come_from_standard_input(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    done = await piped(tmp_path, f"cat | {PROGRAM} warm - --json --url {proxy.url} --data-dir {tmp_path}", PROMPTS)
    assert (done.returncode, json.loads(done.stdout)["asked"]) == (0, 3)


async def test_many_at_a_time(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    model.respond = held(reply())
    content = b"".join(b"question %d\n" % n for n in range(12))
    running = asyncio.create_task(warm(tmp_path, proxy, content, "--concurrency", "4", "--json"))
    await eventually(lambda: model.started == 4)
    model.release.set()
    assert told(await running) == {"questions": 12, "asked": 12}


async def test_an_empty_file_is_nothing_to_do(tmp_path: Path, proxy: Proxy) -> None:
    for content in (b"", b"\n# nothing\n"):
        ran = await warm(tmp_path, proxy, content, "--json")
        assert (ran.code, told(ran)) == (0, {})


# Batches and exports


async def test_a_batch_is_asked_without_its_streaming(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    rows = [batch(1, stream=True, stream_options={"include_usage": True}), batch(2, url="/v1/completions", prompt="x")]
    ran = await warm(tmp_path, proxy, lines(*rows))
    assert (ran.code, ran.err) == (0, "")
    first, second = asked_of(model)
    assert first == {"model": "tiny", "messages": [{"role": "user", "content": "q1"}], "temperature": 0}
    assert (second["prompt"], model.generations[1].target) == ("x", "/v1/completions")
    assert (await proxy.chat("q1", model="tiny")).outcome == "HIT"


async def test_lines_of_a_batch_that_cannot_be_asked_are_told(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    rows: list[Any] = [batch(1), batch(2, url="/v1/rerank"), "[1]", "{", {**batch(3), "body": None}]
    rows += [{**batch(4), "method": "GET"}, batch(5), '{"url": "/v1/chat/completions", "body": {"x": NaN}}', batch(6)]
    rows += [{**batch(7), "url": ["/v1/chat/completions"]}]
    ran = await warm(tmp_path, proxy, lines(*rows), "--json")
    assert (ran.code, len(model.generations)) == (1, 3)
    bad = json.loads(ran.out)["bad"]
    assert [one["line"] for one in bad] == [2, 3, 4, 5, 6, 8, 10]
    assert "found /v1/rerank" in bad[0]["why"]
    assert all(dialect.paths[0] in bad[0]["why"] for dialect in DIALECTS)
    assert json.loads(ran.out)["bad_count"] == 7


@pytest.mark.parametrize(
    ("url", "body", "reason"),
    [
        ("/v1/chat/completions", {"messages": "hi"}, "not-understood"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "store": True}, "store-true"),
        ("/v1/messages", {"max_tokens": 5, "messages": []}, "not-understood"),
        ("/v1/responses", {"input": "hi", "previous_response_id": "resp_1"}, "previous-response"),
        ("/v1/responses", {"input": "hi", "background": True}, "background"),
        ("/v1/embeddings", {"input": []}, "not-understood"),
    ],
)
async def test_questions_whose_answers_are_never_kept_are_not_asked(
    tmp_path: Path, proxy: Proxy, model: FakeModel, url: str, body: dict[str, Any], reason: str
) -> None:
    ran = await warm(tmp_path, proxy, lines({"url": url, "body": body}))
    assert ran.code == 1
    assert f"line 1: body: expected one whose answer is kept; this is {reason}\n" in ran.err
    assert not model.generations


@pytest.mark.parametrize(
    ("url", "body", "answer", "field"),
    [
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}, MESSAGE, "Authorization"),
        ("/v1/responses", {"input": "hi", "store": False}, RESPONSE, "Authorization"),
        ("/v1/embeddings", {"input": ["hi"]}, EMBEDDINGS, "Authorization"),
    ],
)
async def test_what_is_warmed_is_found_by_the_official_clients(
    tmp_path: Path,
    proxy: Proxy,
    model: FakeModel,
    url: str,
    body: dict[str, Any],
    answer: dict[str, Any],
    field: str,
) -> None:
    async def answering(request: web.Request) -> web.StreamResponse | None:
        return web.json_response(answer) if request.path == url else None

    model.extra = answering
    asked = {"model": "tiny", **body}
    ran = await warm(tmp_path, proxy, lines({"url": url, "body": asked}), NEARHIT_WARM_KEY="mine")
    assert (ran.code, ran.err) == (0, "")
    (seen,) = (seen for seen in model.seen if seen.target == url and seen.body and seen.json == asked)
    assert "mine" in seen.headers[field]
    sent = {"anthropic-version": "2026-10-21"} if url == "/v1/messages" else {}
    assert (await proxy.post(url, json=asked, headers=sent)).outcome == "HIT"


async def test_the_query_that_a_client_sends_counts_when_its_question_is_warmed(
    tmp_path: Path, proxy: Proxy, model: FakeModel
) -> None:
    async def answering(request: web.Request) -> web.StreamResponse | None:
        return web.json_response(MESSAGE) if request.path == "/v1/messages" else None

    model.extra = answering
    asked = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    target = "/v1/messages?beta=true&name=%7eme"
    ran = await warm(tmp_path, proxy, lines({"url": target, "body": asked}))
    assert (ran.code, ran.err) == (0, "")
    assert [seen.target for seen in model.seen if seen.body and seen.json == asked] == [target]
    sent = {"anthropic-version": "2026-10-21"}
    for path, outcome in ((target, "HIT"), ("/v1/messages", "MISS")):
        url = URL(proxy.url + path, encoded=True)
        async with proxy.session.post(url, json=asked, headers=sent) as response:
            assert response.headers["X-Cache"] == outcome


@pytest.mark.parametrize(
    "url", ["/v1/messages?a b", "/v1/messages?a\r\nX: y", "/v1/messages?\u00e9", "/x?/v1/messages"]
)
async def test_an_address_that_no_request_can_have_is_told_by_its_line(
    tmp_path: Path, proxy: Proxy, model: FakeModel, url: str
) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    ran = await warm(tmp_path, proxy, lines({"url": url, "body": body}))
    assert ran.code == 1
    assert "line 1: url: expected one that is cached" in ran.err
    assert not model.generations


async def test_an_export_takes_the_answers_of_every_endpoint_along(
    tmp_path: Path, start: StartProxy, model: FakeModel
) -> None:
    answers = {"/v1/messages": MESSAGE, "/v1/responses": RESPONSE, "/v1/embeddings": EMBEDDINGS}

    async def answering(request: web.Request) -> web.StreamResponse | None:
        return web.json_response(answers[request.path]) if request.path in answers else None

    model.extra = answering
    asked = {
        "/v1/messages": {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
        "/v1/responses": {"input": "hi", "store": False},
        "/v1/embeddings": {"input": ["hi"]},
    }
    here, there = await start(), await start(data_dir=str(tmp_path / "there"))
    for path, body in asked.items():
        assert (await here.post(path, json=body)).outcome == "MISS"
    await here.settled()
    ran = await warm(tmp_path, there, (await here.send("GET", "/-/export")).body, "--json")
    assert (ran.code, json.loads(ran.out)["imported"]) == (0, 3)
    for path, body in asked.items():
        first, second = [await proxy.post(path, json=body) for proxy in (here, there)]
        assert (first.outcome, second.outcome) == ("HIT", "HIT")
        assert {**first.json, "id": 0, "created_at": 0} == {**second.json, "id": 0, "created_at": 0}


async def test_what_is_past_its_time_is_asked_again(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__stale_while_revalidate_s=3600)
    asked = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    await proxy.post("/v1/chat/completions", json={**asked, "cache": {"ttl": 1}})
    await proxy.settled()
    async with asyncio.timeout(60):
        while (await proxy.send("GET", "/-/entries")).json["entries"][0]["ttl_s"] >= 0:
            await asyncio.sleep(0.05)
    ran = await warm(tmp_path, proxy, lines({"url": "/v1/chat/completions", "body": asked}), "--json")
    assert told(ran) == {"questions": 1, "asked": 1}


async def test_an_export_is_imported(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    ran = await warm(tmp_path, proxy, whole(row(1), row(2)), "--json")
    assert (ran.code, json.loads(ran.out)["imported"]) == (0, 2)
    assert not model.generations


async def test_what_a_file_is_can_be_said(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    content = b'{"a": "question in braces"}\n'
    assert told(await warm(tmp_path, proxy, content, "--json"))["bad_count"] == 1
    assert told(await warm(tmp_path, proxy, content, "--json", "--format", "prompts"))["asked"] == 1
    assert asked_of(model)[0]["messages"][0]["content"] == content.decode().strip()


async def test_what_goes_with_prompts_is_refused_elsewhere(tmp_path: Path, proxy: Proxy) -> None:
    ran = await warm(tmp_path, proxy, lines(batch(1)), "--max-tokens", "5")
    message = "nearhit: --max-tokens goes with a list of prompts; this is a file of the kind batch\n"
    assert ran == Ran(2, "", message)


# Only telling


async def test_a_dry_run_asks_nothing(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    ran = await warm(tmp_path, proxy, PROMPTS, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("3 questions would be asked; the first ones:\n  line 1: /v1/chat/completions {")
    shown = json.loads((await warm(tmp_path, proxy, lines(batch(1), "{"), "--dry-run", "--json")).out)
    assert (shown["would_ask"], shown["bad_count"], shown["first"][0]["body"]) == (1, 1, batch(1)["body"])
    assert not model.generations


# Trouble


async def test_a_question_that_fails_is_told_and_the_others_are_asked(
    tmp_path: Path, proxy: Proxy, model: FakeModel
) -> None:
    async def picky(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        if "two" in asked["messages"][-1]["content"]:
            return error(400, "too \x1b[31mlong", "invalid_request_error")
        return await reply()(model, request, asked)

    model.respond = picky
    ran = await warm(tmp_path, proxy, PROMPTS, "--model", "tiny")
    assert (ran.code, ran.err) == (1, "1 failed\nline 4: HTTP 400: too \\x1b[31mlong\n")
    assert ran.out.startswith("2 asked, 0 known already")


async def test_answers_that_are_not_kept_are_told(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(cache__mode="off")
    ran = await warm(tmp_path, proxy, b"hi\n", "--model", "tiny")
    assert (ran.code, ran.err) == (1, "1 answered, but not kept\nline 1: answered, but not kept: mode-off\n")


async def test_a_busy_server_is_waited_for(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    async def busy_twice(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        if model.started <= 2:
            response = error(503, "busy", "unavailable_error")
            response.headers["Retry-After"] = "0"
            return response
        return await reply()(model, request, asked)

    model.respond = busy_twice
    ran = await warm(tmp_path, proxy, b"hi\n", "--json")
    assert (ran.code, told(ran)) == (0, {"questions": 1, "asked": 1})


@pytest.mark.parametrize("give_up", ["0", "0.3"])
async def test_a_dead_server_is_given_up(tmp_path: Path, start: StartProxy, give_up: str) -> None:
    proxy = await start(url="http://127.0.0.1:9")
    ran = await warm(tmp_path, proxy, PROMPTS, "--give-up", give_up)
    assert (ran.code, ran.out.startswith("0 asked, 0 known already")) == (1, True)
    assert re.search(r"nearhit: gave up \(.*\); 3 of 3 are left: the same command goes on", ran.err)


async def test_a_key_is_sent_and_one_that_is_refused_ends_it(
    tmp_path: Path, start: StartProxy, model: FakeModel
) -> None:
    model.key = "sk-right"
    proxy = await start(upstream__api_key="sk-right")
    refused = await warm(tmp_path, proxy, PROMPTS, "--api-key", "sk-wrong")
    assert refused.code == 1
    assert "nearhit: the LLM server does not accept the key (Invalid API Key); 3 of 3 are left" in refused.err
    assert "sk-wrong" not in refused.out + refused.err
    for arguments, changes in ((("--api-key", "sk-right"), {}), ((), {"NEARHIT_WARM_KEY": "sk-right"})):
        ran = await warm(tmp_path, proxy, PROMPTS, "--json", *arguments, **changes)
        assert (ran.code, ran.err) == (0, "")


async def test_ctrl_c_says_how_far_it_came(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    async def first_only(model: FakeModel, request: web.Request, asked: dict[str, Json]) -> web.StreamResponse:
        if model.started > 1:
            await model.release.wait()
        return await reply()(model, request, asked)

    model.respond = first_only
    file = await written(tmp_path / "warm.txt", PROMPTS)
    process = await asyncio.to_thread(
        lambda: subprocess.Popen(
            [PROGRAM, "warm", file, "--url", proxy.url],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    await eventually(lambda: model.started == 2)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.to_thread(process.communicate)
    assert (process.returncode, out.startswith("1 asked, 0 known already")) == (130, True)
    assert err == "nearhit: stopped; 2 of 3 are left: the same command goes on, and skips what is known\n"
    model.release.set()
    await proxy.settled()


async def test_what_is_no_nearhit_is_not_asked(tmp_path: Path) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": "1"})

    file = await written(tmp_path / "warm.txt", PROMPTS)
    async with in_between(handle) as url:
        ran = await asyncio.to_thread(run, tmp_path, "warm", file, "--url", url)
    assert ran.code == 1
    assert "what answers there is no nearhit" in ran.err


def test_without_a_running_one_it_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "warm.txt").write_bytes(PROMPTS)
    ran = run(tmp_path, "warm", "warm.txt", "--url", "http://127.0.0.1:9")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: no nearhit answers at http://127.0.0.1:9 (Connection refused)")


WRONG: Sequence[tuple[str, ...]] = (
    (),
    ("missing.txt",),
    ("warm.txt", "--temperature", "hot"),
    ("warm.txt", "--temperature", "NaN"),
    ("warm.txt", "--temperature", "-1"),
    ("warm.txt", "--max-tokens", "0"),
    ("warm.txt", "--concurrency", "0"),
    ("warm.txt", "--system", "@missing.txt"),
    ("warm.txt", "--system", "@binary"),
    ("warm.txt", "--system", "\udcff"),
    ("warm.txt", "--api-key", "a\nb"),
    ("warm.txt", "--format", "x"),
    (".",),
)


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "warm.txt").write_bytes(PROMPTS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    ran = run(tmp_path, "warm", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
