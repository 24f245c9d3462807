"""Which endpoint a body was made for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.cache.likely import likely_endpoint

USER = {"role": "user", "content": "hi"}
TALK = {"messages": [USER]}
ANTHROPIC = {"anthropic-version": "2026-10-21"}


def used(kind: str) -> dict[str, Any]:
    return {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind}]}]}


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("chat", TALK),
        ("chat", {"messages": [{"role": "system", "content": "S"}, USER], "max_tokens": 5}),
        ("chat", {**TALK, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}),
        ("chat", {**TALK, "tool_choice": {"type": "function", "function": {"name": "f"}}, "stop": ["x"]}),
        ("chat", used("image_url")),
        ("chat", {**TALK, "prompt": "x", "input": "x"}),
        ("chat", {}),
        ("messages", {**TALK, "max_tokens": 5, "system": "S"}),
        ("messages", {**TALK, "stop_sequences": ["x"]}),
        ("messages", {**TALK, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("messages", {**TALK, "tools": [{"name": "f", "input_schema": {}}]}),
        ("messages", {**TALK, "tool_choice": {"type": "any"}}),
        ("messages", used("tool_result")),
        ("messages", used("image")),
        ("completions", {"prompt": "x"}),
        ("responses", {"input": "hi", "model": "m"}),
        ("responses", {"input": [USER]}),
        ("responses", {"input": "hi", "instructions": "S", "prompt": {"id": "p"}}),
        ("embeddings", {"input": "hi", "encoding_format": "base64"}),
        ("embeddings", {"input": ["hi"]}),
        ("embeddings", {"input": [1, 2, 3]}),
        ("embeddings", {"input": [[1, 2], [3]]}),
    ],
)
def test_a_body_tells_its_endpoint(endpoint: str, body: dict[str, Any]) -> None:
    assert likely_endpoint(json.dumps(body).encode(), {}) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "body"), [("messages", TALK), ("completions", {"prompt": "x"}), ("embeddings", {"input": ["hi"]})]
)
def test_a_header_field_tells_whose_messages_they_are(endpoint: str, body: dict[str, Any]) -> None:
    assert likely_endpoint(json.dumps(body).encode(), {"Anthropic-Version": "2026-10-21"}) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("chat", b""),
        ("chat", b"[1]"),
        ("chat", b'{"messages": [{"role": ["system"]}, 5, {"content": [{"type": []}, 7]}], "tools": 5}'),
        ("chat", b'{"messages": null, "tool_choice": {"type": []}, "tools": [[]]}'),
        ("chat", b'{"messages": ' + b"[" * 100_000),
        ("completions", b'{"prompt": NaN}'),
        ("responses", b'{"input": null}'),
        ("responses", b'{"input": []}'),
        ("responses", b'{"input": "\\ud83d"}'),
    ],
)
def test_no_body_is_too_odd(endpoint: str, body: bytes) -> None:
    assert likely_endpoint(body, {}) == endpoint
