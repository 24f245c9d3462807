"""Every program, unchanged: whole and streamed answers, repeats, tools, and a server that is down."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from tests.clients.asking import Asking, Library, Llm, library
from tests.clients.serving import Served, repeated, serving
from tests.clients.upstreams import CALL, calling
from tests.fake_model import FakeModel

pytestmark = [pytest.mark.slow, pytest.mark.model]

QUESTION = "Name one fruit."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_repeat_is_answered_from_the_cache_in_both_forms(
    nearhit: Served, program: Asking, system: str, stream: bool
) -> None:
    first = program.ask(nearhit.url, QUESTION, system, stream=stream)
    assert (first.error, nearhit.outcomes()) == ("", ["MISS"])
    assert first.said
    assert repeated(nearhit, lambda: program.ask(nearhit.url, QUESTION, system, stream=stream)) == first
    assert program.ask(nearhit.url, QUESTION, system, stream=not stream) == first
    assert nearhit.outcomes() == ["HIT"]


def test_programs_that_ask_alike_share_an_answer(nearhit: Served, system: str, tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("openai_python", "litellm", "llm")]
    for home in homes:
        home.mkdir()
    with library("openai_python", homes[0]) as openai, library("litellm", homes[1]) as litellm:
        openai.ask(nearhit.url, QUESTION, system, stream=False)
        nearhit.outcomes()
        first = repeated(nearhit, lambda: openai.ask(nearhit.url, QUESTION, system, stream=False))
        assert litellm.ask(nearhit.url, QUESTION, system, stream=True) == first
    assert Llm(homes[2]).ask(nearhit.url, QUESTION, system, stream=True).said == first.said.strip()
    assert nearhit.outcomes(2) == ["HIT", "HIT"]


@pytest.mark.parametrize("name", ["openai_python", "langchain", "litellm", "anthropic_python"])
def test_the_address_can_come_from_the_environment(nearhit: Served, system: str, tmp_path: Path, name: str) -> None:
    openai = {"OPENAI_BASE_URL": f"{nearhit.url}/v1", "OPENAI_API_KEY": "unused"}
    anthropic = {"ANTHROPIC_BASE_URL": nearhit.url, "ANTHROPIC_API_KEY": "unused"}
    with library(name, tmp_path, **openai, **anthropic) as sdk:
        first = sdk.ask("", QUESTION, system, stream=False)
    assert (first.error, nearhit.outcomes()) == ("", ["MISS"])


async def test_a_call_of_a_tool_arrives_in_both_forms_and_again_from_the_cache(
    model: FakeModel, sdk: Library, tmp_path: Path
) -> None:
    model.extra = calling
    await asyncio.to_thread(_check_tool_calls, model.url, sdk, tmp_path)


def _check_tool_calls(upstream: str, sdk: Library, folder: Path) -> None:
    with serving(upstream, folder) as nearhit:
        nearhit.confirmed()
        for stream in (False, True):
            call = partial(sdk.run, "call_tool", base=nearhit.url, question=f"Light in the attic, {stream}!")
            assert call(stream=stream).said == CALL
            assert nearhit.outcomes() == ["MISS"]
            assert repeated(nearhit, partial(call, stream=stream)).said == CALL
            # A server that counts no tokens in its streams leaves nothing to serve a whole answer from.
            assert call(stream=True).said == CALL
            assert nearhit.outcomes() == ["HIT"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_same_question_is_sent_in_the_same_bytes(model: FakeModel, program: Asking, stream: bool) -> None:
    model.extra = calling
    for _ in range(2):
        await asyncio.to_thread(program.ask, model.url, QUESTION, "You are brief.", stream=stream)
    first, second = model.seen
    assert first.body == second.body
    assert first.raw_headers == second.raw_headers


def test_says_what_is_wrong_when_the_server_is_down(alone: Served, program: Asking, system: str) -> None:
    reply = program.ask(alone.url, QUESTION, system, stream=False)
    assert "the LLM server cannot be reached: is it running, and is upstream.url right?" in reply.error
