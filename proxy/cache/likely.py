"""What is known of a request without its path: which endpoint it was made for, and what is sent along. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from proxy.cache.dialects.call import Json

SENT_ALONG: Mapping[str, Mapping[str, str]] = {"messages": {"anthropic-version": "2026-10-21"}}
"""Header fields that count and that the official client of an endpoint always sends, by endpoint."""
_ANTHROPIC = frozenset({"system", "stop_sequences", "thinking", "output_config", "mcp_servers", "container"})
"""Fields of calls to `/v1/messages` that chat calls do not have."""
_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking", "image", "document")
_CHOICES = ("auto", "any", "tool", "none")
_EMBEDDING = frozenset({"encoding_format", "dimensions"})
_decode = msgspec.json.Decoder().decode


def likely_endpoint(raw: bytes, headers: Mapping[str, str]) -> str:
    """The endpoint's name; chat where nothing tells."""
    try:
        body = _decode(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        body = {name: None for name in ("messages", "prompt", "input") if b'"%b"' % name.encode() in raw}
    if "messages" in body:
        is_anthropic = any(name.startswith("anthropic-") for name in map(str.lower, headers)) or _is_anthropic(body)
        return "messages" if is_anthropic else "chat"
    if "prompt" in body and "input" not in body:
        return "completions"
    if "input" in body:
        return "embeddings" if _EMBEDDING & body.keys() or _is_to_embed(body["input"]) else "responses"
    return "chat"


def _is_anthropic(body: Mapping[str, Json]) -> bool:
    choice = body.get("tool_choice")
    return (
        bool(_ANTHROPIC & body.keys())
        or (isinstance(choice, dict) and choice.get("type") in _CHOICES)
        or any("input_schema" in tool for tool in _objects(body.get("tools")))
        or any(
            block.get("type") in _BLOCKS
            for turn in _objects(body["messages"])
            for block in _objects(turn.get("content"))
        )
    )


def _objects(value: Json) -> Iterator[Mapping[str, Json]]:
    yield from (item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


def _is_to_embed(given: Json) -> bool:
    """Whether it is a list of texts or tokens: an input of messages is a text, or a list of objects."""
    return isinstance(given, list) and bool(given) and not any(isinstance(item, dict) for item in given)
