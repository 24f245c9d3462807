"""What a real llama.cpp makes of the line that Claude Code puts before its system prompts.

https://github.com/ggml-org/llama.cpp/pull/21793
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.llama_server import Flags, LlamaServer
from tests.web.test_leads import found, messages, post

pytestmark = pytest.mark.model

ABOUT = "x-anthropic-billing-header: cc_version=2.1.101.%s; cc_entrypoint=cli; cch=%s;"
PROMPT = "You are a coding agent. Read a file before you change it."


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with LlamaServer(Flags(slots=1, context=1024)) as server:
        yield server.url


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def system(suffix: str = "e51", stamp: str = "a5145", before: str = "") -> list[dict[str, Any]]:
    return [text(before + ABOUT % (suffix, stamp)), text(PROMPT)]


def usage(llama: str, body: dict[str, Any]) -> Any:
    return post(f"{llama}/v1/messages", {**body, "temperature": 0})["usage"]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        pytest.param(system(), system(stamp="00c0d"), True, id="number"),
        pytest.param(system(), system(stamp="fffff"), True, id="what is put in its place"),
        pytest.param(ABOUT % ("e51", "a5145") + PROMPT, ABOUT % ("e51", "00c0d") + PROMPT, True, id="no blocks"),
        pytest.param(system(), system(suffix="0d9"), False, id="fingerprint"),
        pytest.param(system(stamp="a51451"), system(stamp="00c0d1"), False, id="six characters"),
        pytest.param(system(before=" "), system(before=" ", stamp="00c0d"), False, id="not at the beginning"),
    ],
)
def test_it_takes_out_the_number_alone_and_no_lead_has_it(llama: str, one: Any, other: Any, alike: bool) -> None:
    first, second = messages(system=one), messages(system=other)
    usage(llama, first)
    # The last token of a prompt is always computed again.
    assert (usage(llama, second)["input_tokens"] == 1) is alike
    assert (found("messages", **first) == found("messages", **second)) is alike
