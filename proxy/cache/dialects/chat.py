"""`/v1/chat/completions`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from proxy.cache.dialects.call import Json, NotCacheable, Reading, storable
from proxy.cache.policy import Bypass

_SYSTEM = ("system", "developer")
_LATER = ("assistant", "tool", "function")
_TEXT_FIRST = ("reasoning_content", "reasoning", "content", "refusal", "tool_calls", "function_call")


class _Chat:
    endpoint = "chat"
    paths = ("/v1/chat/completions", "/chat/completions")
    id_prefix = "chatcmpl-"

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        asked = [_text(m.get("content")) or "" for m in messages if m.get("role") == "user"]
        last = messages[-1]
        words = _text(last.get("content")) if last.get("role") == "user" else None
        system = list(takewhile(lambda message: message.get("role") in _SYSTEM, messages))
        later = any(message.get("role") in _LATER for message in messages)
        if words is None or not words.strip() or not storable(words) or _exact_only(body):
            return Reading(None, (), {}, asked[-1] if asked else "", system, later)
        content = last["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        shell = {**last, "content": _without_text(content)}
        return Reading(words, texts, {**body, "messages": [*messages[:-1], shell]}, asked[-1], system, later)

    def stream_object(self) -> str:
        return "chat.completion.chunk"

    def whole_object(self) -> str:
        return "chat.completion"

    def finish_choice(self, choice: dict[str, Json]) -> dict[str, Json]:
        message = {"role": "assistant", "content": None, **choice.pop("delta", {})}
        calls = message.get("tool_calls")
        if calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        return {"index": 0, "message": message, **choice}

    def split_choice(self, choice: Mapping[str, Json]) -> list[dict[str, Json]]:
        index = choice.get("index", 0)
        message = dict(choice.get("message") or {})
        content = message.get("content")
        first = {"role": message.pop("role", "assistant"), "content": None if content is None else ""}
        if content is None or content == "":
            message.pop("content", None)
        rest = {k: v for k, v in choice.items() if k not in {"index", "message", "finish_reason", "logprobs"}}
        order = [*(k for k in _TEXT_FIRST if k in message), *(k for k in message if k not in _TEXT_FIRST)]
        deltas = [first, *({key: _indexed(key, message[key])} for key in order)]
        events = [{"index": index, "delta": delta, "finish_reason": None} for delta in deltas]
        if "logprobs" in choice:
            events[-1]["logprobs"] = choice["logprobs"]
        return [*events, {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason"), **rest}]

    def is_empty(self, choice: Mapping[str, Json]) -> bool:
        message = choice.get("message")
        if not isinstance(message, dict):
            return True
        acts = message.get("tool_calls") or message.get("function_call")
        return not acts and not (self.text(choice) or str(message.get("refusal") or "")).strip()

    def text(self, choice: Mapping[str, Json]) -> str:
        content = (choice.get("message") or {}).get("content")
        return content if isinstance(content, str) else (_text(content) or "")


def _exact_only(body: Mapping[str, Json]) -> bool:
    return body.get("n") not in (None, 1) or bool(body.get("logprobs"))


def _text(content: Json) -> str | None:
    """The text of a message; None where it is not all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not parts or not all(isinstance(part, str) for part in parts):
        return None
    return "\n".join(part for part in parts if isinstance(part, str))


def _without_text(content: Json) -> Json:
    return "" if isinstance(content, str) else [{**part, "text": ""} for part in content]


def _indexed(key: str, value: Json) -> Json:
    # A stream tells tool calls apart by their index, which a whole message does not carry.
    if key != "tool_calls" or not isinstance(value, list):
        return value
    return [{"index": i, **call} if isinstance(call, dict) else call for i, call in enumerate(value)]


CHAT = _Chat()
"""The chat dialect."""
