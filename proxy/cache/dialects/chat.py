"""`/v1/chat/completions`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from proxy.cache.answer import Pieces
from proxy.cache.dialects.call import Json, NotCacheable, Reading, storable
from proxy.cache.dialects.choices import Choices
from proxy.cache.policy import Bypass

_SYSTEM = ("system", "developer")
_LATER = ("assistant", "tool", "function")
_RUN_BY_CALLERS = (None, "function", "custom")
_SPOKEN = frozenset({"reasoning_content", "reasoning", "content"})
_TEXT_FIRST = ("reasoning_content", "reasoning", "content", "refusal", "tool_calls", "function_call")


class _Chat:
    endpoint = "chat"
    paths = ("/v1/chat/completions", "/chat/completions")
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    stream_object = "chat.completion.chunk"

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        if _looks_up(body):
            return NotCacheable(Bypass.BACKGROUND)
        asked = [_text(m.get("content")) or "" for m in messages if m.get("role") == "user"]
        last = messages[-1]
        words = _text(last.get("content")) if last.get("role") == "user" else None
        system = list(takewhile(lambda message: message.get("role") in _SYSTEM, messages))
        later = any(message.get("role") in _LATER for message in messages)
        # The events of official streams repeat nothing of who the user is.
        echoed = [body.get("metadata")]
        if last.get("role") == "assistant":
            # An answer goes on from what is put in its mouth. llama.cpp repeats that in a whole answer, and leaves it
            # out of a stream: neither can be made of the other.
            return Reading(None, (), {}, asked[-1] if asked else "", system, later, by_form=True, echoed=echoed)
        if words is None or not words.strip() or not storable(words) or _exact_only(body):
            return Reading(None, (), {}, asked[-1] if asked else "", system, later, echoed=echoed)
        content = last["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        shell = {**last, "content": _without_text(content)}
        return Reading(
            words, texts, {**body, "messages": [*messages[:-1], shell]}, asked[-1], system, later, echoed=echoed
        )

    def finish_choice(self, choice: dict[str, Json]) -> dict[str, Json]:
        message = {"role": "assistant", "content": None, **choice.pop("delta", {})}
        calls = message.get("tool_calls")
        if calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        return {"index": 0, "message": message, **choice}

    def split_choice(self, choice: Mapping[str, Json], pieces: Pieces) -> list[dict[str, Json]]:
        index = choice.get("index", 0)
        message = dict(choice.get("message") or {})
        content = message.get("content")
        first = {"role": message.pop("role", "assistant"), "content": None if content is None else ""}
        if content is None or content == "":
            message.pop("content", None)
        rest = {k: v for k, v in choice.items() if k not in {"index", "message", "finish_reason", "logprobs"}}
        order = [*(k for k in _TEXT_FIRST if k in message), *(k for k in message if k not in _TEXT_FIRST)]
        deltas = [first, *(delta for key in order for delta in _deltas(key, message[key], pieces))]
        events = [{"index": index, "delta": delta, "finish_reason": None} for delta in deltas]
        if "logprobs" in choice:
            events[-1]["logprobs"] = choice["logprobs"]
        return [*events, {"index": index, "delta": {}, "finish_reason": choice.get("finish_reason"), **rest}]

    def acts(self, choice: Mapping[str, Json]) -> bool:
        message = _message(choice)
        return bool(message.get("tool_calls") or message.get("function_call"))

    def refusal(self, choice: Mapping[str, Json]) -> str:
        return str(_message(choice).get("refusal") or "")

    def reasoning(self, choice: Mapping[str, Json]) -> str:
        reasoning = _message(choice).get("reasoning_content")
        return reasoning if isinstance(reasoning, str) else ""

    def text(self, choice: Mapping[str, Json]) -> str:
        content = _message(choice).get("content")
        return content if isinstance(content, str) else (_text(content) or "")


def _message(choice: Mapping[str, Json]) -> Mapping[str, Json]:
    message = choice.get("message")
    return message if isinstance(message, dict) else {}


def _looks_up(body: Mapping[str, Json]) -> bool:
    """Whether the server itself may run tools: the answer depends on what they find."""
    tools = body.get("tools")
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return body.get("web_search_options") is not None or any(kind not in _RUN_BY_CALLERS for kind in kinds)


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


def _deltas(key: str, value: Json, pieces: Pieces) -> list[dict[str, Json]]:
    if key in _SPOKEN and isinstance(value, str):
        return [{key: piece} for piece in pieces(value)]
    # A stream tells tool calls apart by their index, which a whole message does not carry.
    if key == "tool_calls" and isinstance(value, list):
        value = [{"index": i, **call} if isinstance(call, dict) else call for i, call in enumerate(value)]
    return [{key: value}]


CHAT = Choices(_Chat())
"""The chat dialect."""
