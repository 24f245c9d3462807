"""The official client for `/v1/responses`, with nearhit between it and a real llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.llama_server import Flags, LlamaServer
from tests.program.test_llama_cpp import attempts, program, wait_until_confirmed

pytestmark = pytest.mark.model

THINKING = """{%- for message in messages %}\
{%- if message.role == 'assistant' %}\
{%- set content = message.content %}\
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}\
{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}\
{%- else %}\
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{%- endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
"""Lets a model begin by thinking, as those that do have it."""


@contextmanager
def client_of(flags: Flags, data: Path) -> Iterator[openai.OpenAI]:
    """The official client of a nearhit in front of a llama.cpp that was started so."""
    with (
        LlamaServer(flags) as llama,
        program("proxy", "serve", "--upstream", llama.url, "--port", "0", "--data-dir", str(data)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client,
    ):
        wait_until_confirmed(address)
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with client_of(Flags(context=2048), tmp_path_factory.mktemp("data")) as client:
        yield client


def fields(**changes: Any) -> Any:
    return {"model": "tiny", "input": "Name one fruit.", "max_output_tokens": 10, "temperature": 0, **changes}


def ask(client: openai.OpenAI, **changes: Any) -> tuple[str, Any]:
    """A whole answer: outcome and response."""
    raw = client.responses.with_raw_response.create(**fields(**changes))
    return raw.headers["x-cache"], raw.parse()


def eventually_hit(client: openai.OpenAI, **changes: Any) -> Any:
    """Ask until the answer comes from the cache: it is stored a moment after it was given."""
    for _ in attempts():
        outcome, response = ask(client, **changes)
        if outcome == "HIT":
            return response
    raise AssertionError("never a hit")


def accumulated(client: openai.OpenAI, **changes: Any) -> tuple[str, Any]:
    """A streamed answer, put together by the client's own accumulation."""
    with client.responses.stream(**fields(**changes)) as stream:
        outcome = stream._response.headers["x-cache"]
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        response = stream.get_final_response()
    assert said == response.output_text
    return outcome, response


def same(one: Any, other: Any) -> bool:
    """Whether two responses differ in id and times alone."""
    own = {"id", "created_at", "completed_at"}
    seen = [{k: v for k, v in response.to_dict().items() if k not in own} for response in (one, other)]
    return seen[0] == seen[1] and one.id != other.id


def test_a_repeat_is_the_same_answer_at_no_cost(client: openai.OpenAI) -> None:
    outcome, first = ask(client)
    hit = eventually_hit(client)
    assert outcome == "MISS"
    assert same(hit, first)
    assert hit.usage.output_tokens == first.usage.output_tokens > 0
    outcome, streamed = accumulated(client)
    assert (outcome, streamed.output_text) == ("HIT", first.output_text)


def test_a_stream_and_its_replay_say_the_same(client: openai.OpenAI) -> None:
    asked = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Say hi."}]}], "instructions": "Hi."}
    first = list(client.responses.create(**fields(**asked), stream=True))
    whole = eventually_hit(client, **asked)
    replay = list(client.responses.create(**fields(**asked), stream=True))
    said = [
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        for events in (first, replay)
    ]
    assert said == [whole.output_text] * 2
    assert said[0] != ""
    assert (first[-1].type, replay[-1].type) == ("response.completed", "response.completed")
    assert replay[-1].response.usage == first[-1].response.usage == whole.usage
    assert [item.id for item in whole.output] == [item.id for item in first[-1].response.output]


def test_tools_pass_and_hit(client: openai.OpenAI) -> None:
    room = {"type": "object", "properties": {"room": {"type": "string"}}, "required": ["room"]}
    tool = {"type": "function", "name": "switch_light", "parameters": room, "strict": False}
    outcome, first = ask(client, tools=[tool])
    assert outcome == "MISS"
    assert same(eventually_hit(client, tools=[tool]), first)


def test_a_conversation_goes_on_from_a_replayed_answer(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "Name one tree."}]
    _, first = ask(client, input=question)
    turns = [
        [*question, *(item.to_dict() for item in given.output), {"role": "user", "content": "Why?"}]
        for given in (first, eventually_hit(client, input=question))
    ]
    assert turns[0] == turns[1]
    outcome, _ = ask(client, input=turns[0])
    assert outcome == "MISS"
    eventually_hit(client, input=turns[1])


def test_what_llama_cpp_refuses_reaches_the_client_unchanged(client: openai.OpenAI) -> None:
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="does not support 'previous_response_id'") as refused:
            ask(client, previous_response_id="resp_1")
        assert refused.value.response.headers["x-cache"] == "BYPASS"


def test_thoughts_survive_in_both_forms(tmp_path: Path) -> None:
    grammar = {"extra_body": {"grammar": 'root ::= "I think" "</think>" "A fig."'}, "max_output_tokens": 30}
    with client_of(Flags(context=2048, chat_template=THINKING), tmp_path) as client:
        first = list(client.responses.create(**fields(**grammar), stream=True))
        whole = eventually_hit(client, **grammar)
        outcome, replay = accumulated(client, **grammar)
    assert outcome == "HIT"
    assert whole.output_text == replay.output_text == "A fig."
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    thoughts = [event.delta for event in first if event.type == "response.reasoning_text.delta"]
    assert whole.output[0].content[0].text == replay.output[0].content[0].text == "".join(thoughts)
    assert "I think" in "".join(thoughts)
