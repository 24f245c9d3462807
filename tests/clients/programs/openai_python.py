"""What the tests have openai-python do."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import openai

from tests.clients.programs.orders import obey
from tests.clients.programs.tools import LIGHT


@cache
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="unused") if base else openai.OpenAI()


def asked(question: str, system: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"model": "tiny", "messages": messages, "max_tokens": 12}


def ask(base: str, question: str, system: str, stream: bool) -> str:
    chat = client(base).chat.completions
    if not stream:
        return chat.create(**asked(question, system)).choices[0].message.content or ""
    events = chat.create(**asked(question, system), stream=True)
    return "".join(choice.delta.content or "" for event in events for choice in event.choices)


def call_tool(base: str, question: str, stream: bool) -> dict[str, Any]:
    chat = client(base).chat.completions
    wanted: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": question}], "tools": [LIGHT]}
    if stream:
        with chat.stream(**wanted) as events:
            message: Any = events.get_final_completion().choices[0].message
    else:
        message = chat.create(**wanted).choices[0].message
    (call,) = message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def raw(base: str, question: str, system: str, **extra: Any) -> dict[str, Any]:
    """The header fields beside the answer."""
    response = client(base).chat.completions.with_raw_response.create(**asked(question, system), **extra)
    text = response.parse().choices[0].message.content
    return {"text": text, "headers": {name.lower(): value for name, value in response.headers.items()}}


def respond(base: str, question: str, system: str, stream: bool) -> str:
    wanted: dict[str, Any] = {"model": "tiny", "input": question, "instructions": system, "max_output_tokens": 16}
    if not stream:
        return str(client(base).responses.create(**wanted).output_text)
    # Not responses.stream: llama.cpp's events lack the indices that it needs.
    events = client(base).responses.create(**wanted, stream=True)
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def embed(base: str, texts: list[str]) -> list[list[float]]:
    return [item.embedding for item in client(base).embeddings.create(model="tiny", input=texts).data]


if __name__ == "__main__":
    obey({"ask": ask, "call_tool": call_tool, "raw": raw, "respond": respond, "embed": embed})
