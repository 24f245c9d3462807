"""Calls as Claude Code makes them: what tells its sessions apart, and what does not.

https://code.claude.com/docs/en/llm-gateway-protocol
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Answer, Proxy
from tests.fake_model import FakeModel
from tests.web.test_messages import PATH, asked, speaking

ABOUT = "x-anthropic-billing-header: cc_version=2.1.181.fdb; cc_entrypoint=cli;"
PROMPT = "You are Claude Code, Anthropic's official CLI for Claude."


def call(about: str | None, session: str) -> dict[str, Any]:
    """A request's body in a session; `about` is what Claude Code says of itself, None where it is told not to."""
    before = [] if about is None else [{"type": "text", "text": about}]
    return {
        "model": "tiny",
        "max_tokens": 32000,
        "stream": True,
        "system": [*before, {"type": "text", "text": PROMPT, "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "List the files."}]}],
        "tools": [{"name": "Bash", "description": "Run a command.", "input_schema": {"type": "object"}}],
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": session})},
    }


async def ask(proxy: Proxy, about: str | None, session: str = "one") -> Answer:
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-claude-code-session-id": session,
        "User-Agent": "claude-cli/2.1.181 (external, cli)",
    }
    answer = await proxy.post(f"{PATH}?beta=true", json=call(about, session), headers=headers)
    await proxy.settled()
    return answer


@pytest.mark.parametrize("about", [None, ABOUT])
async def test_the_same_call_hits_in_another_session(proxy: Proxy, model: FakeModel, about: str | None) -> None:
    model.extra = speaking()
    outcomes = [(await ask(proxy, about, session)).outcome for session in ("one", "one", "two")]
    assert outcomes == ["MISS", "HIT", "HIT"]


@pytest.mark.parametrize(
    "other",
    [
        None,
        ABOUT.replace(".fdb", ".0c1"),
        ABOUT.replace("=cli", "=sdk-cli"),
        f"{ABOUT} cch=00c0d;",
        f"{ABOUT} cch=fffff;",
    ],
)
async def test_every_byte_that_it_says_of_itself_counts_and_goes_on(
    proxy: Proxy, model: FakeModel, other: str | None
) -> None:
    # The server may show all of it to the model.
    model.extra = speaking()
    abouts = (f"{ABOUT} cch=a5145;", other)
    answers = [await ask(proxy, about) for about in abouts]
    assert [answer.outcome for answer in answers] == ["MISS", "MISS"]
    assert answers[0].body != answers[1].body
    assert [seen.json for seen in asked(model)] == [call(about, "one") for about in abouts]
