"""The official client for `/v1/messages`, with nearhit between it and a real llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from proxy.demo.parts import model_file
from tests.program.test_llama_cpp import program, wait_until_confirmed

pytestmark = pytest.mark.model

SYSTEM = "You are brief."
QUESTION: list[Any] = [{"role": "user", "content": "Name one fruit."}]
LIMIT = 10


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with program("proxy.demo.llama_server", str(model_file())) as address:
        yield address


@pytest.fixture(scope="module")
def client(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[anthropic.Anthropic]:
    data = str(tmp_path_factory.mktemp("data"))
    with program("proxy", "serve", "--upstream", llama, "--port", "0", "--data-dir", data) as address:
        wait_until_confirmed(address)
        with anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0) as client:
            yield client


def fields(**changes: Any) -> Any:
    greedy = {"temperature": 0}
    return {"model": "tiny", "max_tokens": LIMIT, "messages": QUESTION, "extra_body": greedy, **changes}


def ask(client: anthropic.Anthropic, **changes: Any) -> tuple[str, anthropic.types.Message]:
    """A whole answer: outcome and message."""
    raw = client.messages.with_raw_response.create(**fields(**changes))
    return raw.headers["x-cache"], raw.parse()


def ask_streamed(client: anthropic.Anthropic, **changes: Any) -> tuple[str, Any]:
    """A streamed answer, put together by the client's own accumulation."""
    with client.messages.stream(**fields(**changes)) as stream:
        outcome = stream.response.headers["x-cache"]
        said = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert said == text_of(message)
    return outcome, message


def eventually_hit(client: anthropic.Anthropic, **changes: Any) -> anthropic.types.Message:
    """Ask until the answer comes from the cache: it is stored a moment after it was given."""
    for _ in range(200):
        outcome, message = ask(client, **changes)
        if outcome == "HIT":
            return message
    raise AssertionError("never a hit")


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content)


def same(one: Any, other: Any) -> bool:
    """Whether two messages differ in their ids alone."""
    seen = [{k: v for k, v in message.to_dict(exclude_none=True).items() if k != "id"} for message in (one, other)]
    return seen[0] == seen[1] and one.id != other.id


def test_a_whole_answer_is_given_again_in_both_forms(client: anthropic.Anthropic) -> None:
    outcome, first = ask(client, system=SYSTEM)
    hit = eventually_hit(client, system=SYSTEM)
    again, streamed = ask_streamed(client, system=SYSTEM)
    assert (outcome, again) == ("MISS", "HIT")
    assert first.stop_reason == "max_tokens" or first.usage.output_tokens < LIMIT
    assert same(hit, first)
    assert same(streamed, first)


def test_a_streamed_answer_is_given_again_in_both_forms(client: anthropic.Anthropic) -> None:
    system = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
    outcome, first = ask_streamed(client, system=system)
    whole = eventually_hit(client, system=system)
    again, replay = ask_streamed(client, system=system)
    assert (outcome, again) == ("MISS", "HIT")
    assert same(replay, first)
    assert same(whole, first)
    raw = client.messages.create(**fields(system=system, stream=True))
    kinds = [event.type for event in raw]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_is_told_again(client: anthropic.Anthropic) -> None:
    asked: Any = {"stop_sequences": ["fruit"], "system": SYSTEM}
    _, first = ask_streamed(client, **asked)
    assert first.stop_sequence == "fruit"
    assert same(eventually_hit(client, **asked), first)


def test_an_answer_that_was_begun_by_the_caller_is_each_forms_own(client: anthropic.Anthropic) -> None:
    asked: Any = {"messages": [*QUESTION, {"role": "assistant", "content": "The fruit is"}], "max_tokens": 4}
    outcome, streamed = ask_streamed(client, **asked)
    other, whole = ask(client, **asked)
    assert (outcome, other) == ("MISS", "MISS")
    assert same(eventually_hit(client, **asked), whole)
    again, replay = ask_streamed(client, **asked)
    assert again == "HIT"
    assert same(replay, streamed)


def test_tokens_are_counted_by_the_server(client: anthropic.Anthropic) -> None:
    told = client.messages.count_tokens(model="tiny", messages=QUESTION)
    _, message = ask(client)
    assert told.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_errors_of_the_server_reach_the_client_unchanged(client: anthropic.Anthropic, llama: str) -> None:
    long: Any = [{"role": "user", "content": "word " * 3000}]
    with pytest.raises(anthropic.BadRequestError) as through:
        ask(client, messages=long)
    with (
        anthropic.Anthropic(base_url=llama, api_key="x", max_retries=0) as direct,
        pytest.raises(anthropic.BadRequestError) as straight,
    ):
        direct.messages.create(**fields(messages=long))
    assert through.value.body == straight.value.body
