"""The whole thing: the installed program in front of a real llama.cpp, asked by the official client and by curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from proxy.demo.parts import model_file

pytestmark = pytest.mark.model

QUESTION: list[Any] = [{"role": "user", "content": "Name one fruit."}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "switch_light",
            "description": "Switch a light",
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]},
        },
    }
]


@contextmanager
def program(*arguments: str) -> Iterator[str]:
    """Run a module that says where it listens; it ends when its standard input does."""
    command = [sys.executable, "-m", "proxy.demo.child", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            if b"listens on" in line:
                address = line.decode().partition("listens on ")[2].split(",")[0].strip()
                break
        assert address, "it never said where it listens"
        drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
        try:
            yield address
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(120)
            drain.wait(120)


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with program("proxy.demo.llama_server", str(model_file())) as address:
        yield address


@pytest.fixture(scope="module")
def nearhit(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data = str(tmp_path_factory.mktemp("data"))
    with program("proxy", "serve", "--upstream", llama, "--port", "0", "--data-dir", data) as address:
        wait_until_confirmed(address)
        yield address


@pytest.fixture(scope="module")
def client(nearhit: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nearhit}/v1", api_key="unused", max_retries=0) as client:
        yield client


def attempts(seconds: float = 120.0) -> Iterator[None]:
    """Try again and again; the limit only ends a test that has failed."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        yield
        time.sleep(0.02)


def wait_until_confirmed(address: str) -> None:
    for _ in attempts():
        with suppress(OSError), urllib.request.urlopen(f"{address}/-/ready") as response:
            if json.load(response)["upstream"]["standing"] == "confirmed":
                return
    raise AssertionError("the upstream was never confirmed")


def ask(client: openai.OpenAI, **fields: Any) -> tuple[str, Any]:
    """An unstreamed chat: outcome and parsed answer."""
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    raw = client.chat.completions.with_raw_response.create(**asked)
    return raw.headers["x-cache"], raw.parse()


def ask_streamed(client: openai.OpenAI, **fields: Any) -> tuple[str, Any]:
    """A streamed chat, put together by the client's own accumulation."""
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    with client.chat.completions.stream(**asked) as stream:
        outcome = stream._response.headers["x-cache"]
        for _ in stream:
            pass
        return outcome, stream.get_final_completion()


def eventually_hit(client: openai.OpenAI, **fields: Any) -> Any:
    """Ask until the answer comes from the cache: it is stored a moment after it was given."""
    for _ in attempts():
        outcome, answer = ask(client, **fields)
        if outcome == "HIT":
            return answer
    raise AssertionError("never a hit")


def test_a_repeat_is_the_same_answer_at_no_cost(client: openai.OpenAI) -> None:
    outcome, first = ask(client)
    hit = eventually_hit(client)
    assert outcome == "MISS"
    assert hit.choices == first.choices
    assert hit.usage == first.usage
    assert hit.id != first.id


def test_a_stream_and_its_replay_accumulate_to_the_same(client: openai.OpenAI) -> None:
    asked = {"stream_options": {"include_usage": True}, "seed": 1}
    outcome, first = ask_streamed(client, **asked)
    whole = eventually_hit(client, seed=1)
    again, replay = ask_streamed(client, **asked)
    assert (outcome, again) == ("MISS", "HIT")
    assert replay.choices[0].message == first.choices[0].message
    assert replay.choices[0].finish_reason == first.choices[0].finish_reason
    assert replay.usage == first.usage == whole.usage
    assert whole.choices[0].message.content == first.choices[0].message.content


def test_a_stream_that_told_no_usage_serves_whole_answers_with_usage(client: openai.OpenAI) -> None:
    outcome, first = ask_streamed(client, seed=2)
    hit = eventually_hit(client, seed=2)
    assert outcome == "MISS"
    assert first.usage is None
    assert hit.usage.completion_tokens > 0
    assert hit.usage.total_tokens == hit.usage.prompt_tokens + hit.usage.completion_tokens


def test_tools_pass_and_hit(client: openai.OpenAI) -> None:
    _, first = ask(client, tools=TOOLS, seed=3)
    hit = eventually_hit(client, tools=TOOLS, seed=3)
    assert hit.choices == first.choices


def test_logprobs_survive_both_ways(client: openai.OpenAI) -> None:
    _, first = ask(client, logprobs=True, top_logprobs=2, seed=4)
    hit = eventually_hit(client, logprobs=True, top_logprobs=2, seed=4)
    outcome, streamed = ask_streamed(client, logprobs=True, top_logprobs=2, seed=4)
    assert outcome == "HIT"
    assert hit.choices[0].logprobs == first.choices[0].logprobs
    assert streamed.choices[0].logprobs.content == first.choices[0].logprobs.content


def test_several_choices_survive(client: openai.OpenAI) -> None:
    _, first = ask(client, n=2, seed=5, temperature=0.8)
    hit = eventually_hit(client, n=2, seed=5, temperature=0.8)
    assert len(first.choices) == 2
    assert hit.choices == first.choices


def test_completions_hit_in_both_forms(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    first = client.completions.create(**asked)
    raw = client.completions.with_raw_response.create(**asked)
    while raw.headers["x-cache"] != "HIT":
        raw = client.completions.with_raw_response.create(**asked)
    assert raw.parse().choices == first.choices
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(c.text for event in streamed for c in event.choices) == first.choices[0].text


async def test_the_async_client_works_alike(nearhit: str) -> None:
    # Reading the certificates of the system is the client's own affair.
    client = await asyncio.to_thread(openai.AsyncOpenAI, base_url=f"{nearhit}/v1", api_key="x", max_retries=0)
    async with client:
        asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "temperature": 0, "seed": 6}
        first = await client.chat.completions.create(**asked)
        streamed = await client.chat.completions.create(**asked, stream=True)
        pieces = [c.delta.content or "" async for event in streamed for c in event.choices]
        assert "".join(pieces) == first.choices[0].message.content


def test_errors_of_the_server_reach_the_client_unchanged(client: openai.OpenAI, llama: str) -> None:
    with pytest.raises(openai.BadRequestError) as through:
        ask(client, messages=[{"role": "user", "content": "word " * 3000}])
    with (
        openai.OpenAI(base_url=f"{llama}/v1", api_key="x", max_retries=0) as direct,
        pytest.raises(openai.BadRequestError) as straight,
    ):
        direct.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 3000}])
    assert through.value.body == straight.value.body


def curl(url: str, *arguments: str) -> bytes:
    return subprocess.run(["curl", "-sS", "--max-time", "60", *arguments, url], check=True, capture_output=True).stdout


@pytest.mark.parametrize("path", ["/props", "/slots", "/health", "/v1/models", "/nothing/here"])
def test_plain_curl_sees_what_it_would_see_without_nearhit(nearhit: str, llama: str, path: str) -> None:
    def shape(document: Any) -> Any:
        """Times and counters differ from one call to the next."""
        if isinstance(document, dict):
            return {key: shape(value) for key, value in document.items()}
        return [shape(item) for item in document] if isinstance(document, list) else type(document)

    direct, through = json.loads(curl(llama + path)), json.loads(curl(nearhit + path))
    # What a slot shows changes with the work that comes to it in between.
    for _ in attempts(10):
        if shape(through) == shape(direct):
            break
        direct, through = json.loads(curl(llama + path)), json.loads(curl(nearhit + path))
    assert shape(through) == shape(direct)


def test_the_servers_own_page_passes_byte_for_byte(nearhit: str, llama: str) -> None:
    compressed = ("-H", "Accept-Encoding: gzip")
    assert curl(f"{nearhit}/", *compressed) == curl(f"{llama}/", *compressed)
    assert curl(f"{nearhit}/") == curl(f"{llama}/")


def test_curl_streams_a_miss_and_a_hit(nearhit: str) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 5, "temperature": 0, "seed": 7, "stream": True})
    url = f"{nearhit}/v1/chat/completions"
    miss, hit = (curl(url, "-N", "-i", "-d", body) for _ in range(2))
    assert b"X-Cache: MISS" in miss
    # It comes from the cache, or from the fetch that is just being stored.
    assert b"X-Cache: HIT" in hit or b"X-Cache: JOINED" in hit
    assert miss.endswith(b"data: [DONE]\n\n")
    assert hit.endswith(b"data: [DONE]\n\n")


def test_an_answer_survives_a_restart(tmp_path: Path) -> None:
    with program("proxy.demo.llama_server", str(model_file())) as llama:
        # What compares other words would load meanwhile, and on a slow machine be in the way of the look-up.
        arguments = ("--upstream", llama, "--port", "0", "--data-dir", str(tmp_path), "--cache-mode=exact")
        for expected in ("MISS", "HIT"):
            with program("proxy", "serve", *arguments) as address:
                wait_until_confirmed(address)
                with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
                    assert ask(client)[0] == expected
