"""What the tests have LiteLLM's SDK do."""

from __future__ import annotations

import json
from typing import Any

import litellm

from tests.clients.programs.orders import obey
from tests.clients.programs.tools import LIGHT


def complete(base: str, stream: bool, **asked: Any) -> Any:
    """The message."""
    place = {"api_base": f"{base}/v1", "api_key": "unused"} if base else {}
    said = litellm.completion(model="openai/tiny", **place, stream=stream, **asked)
    whole = litellm.stream_chunk_builder(list(said)) if stream else said
    return whole.choices[0].message


def ask(base: str, question: str, system: str, stream: bool, **extra: Any) -> str:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return str(complete(base, stream, messages=messages, max_tokens=12, **extra).content)


def call_tool(base: str, question: str, stream: bool) -> dict[str, Any]:
    (call,) = complete(base, stream, messages=[{"role": "user", "content": question}], tools=[LIGHT]).tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


def embed(base: str, texts: list[str]) -> list[list[float]]:
    said = litellm.embedding(model="openai/tiny", api_base=f"{base}/v1", api_key="unused", input=texts)
    return [item["embedding"] for item in said.data]


if __name__ == "__main__":
    obey({"ask": ask, "call_tool": call_tool, "embed": embed})
