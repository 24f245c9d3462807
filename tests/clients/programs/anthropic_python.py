"""What the tests have Anthropic's client do."""

from __future__ import annotations

from functools import cache
from typing import Any

import anthropic

from tests.clients.programs.orders import obey
from tests.clients.programs.tools import PARAMETERS

LIGHT = {"name": "switch_light", "description": "Switch a light", "input_schema": PARAMETERS}


@cache
def client(base: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=base, api_key="unused") if base else anthropic.Anthropic()


def message(base: str, stream: bool, **wanted: Any) -> Any:
    if not stream:
        return client(base).messages.create(model="tiny", **wanted)
    with client(base).messages.stream(model="tiny", **wanted) as events:
        return events.get_final_message()


def ask(base: str, question: str, system: str, stream: bool) -> str:
    messages = [{"role": "user", "content": question}]
    said = message(base, stream, system=system, messages=messages, max_tokens=12)
    return "".join(block.text for block in said.content)


def call_tool(base: str, question: str, stream: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    said = message(base, stream, messages=messages, tools=[LIGHT], max_tokens=50)
    (call,) = [block for block in said.content if block.type == "tool_use"]
    return {"name": call.name, "arguments": call.input}


if __name__ == "__main__":
    obey({"ask": ask, "call_tool": call_tool})
