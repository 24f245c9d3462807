"""`/v1/messages`: Anthropic's Messages API, as llama.cpp's server and others speak it, too. Pure.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from proxy.cache.answer import ABORTED, Assembling, Gist, Pieces, Wire, count, fresh, in_one
from proxy.cache.dialects.call import Json, NotCacheable, Reading, storable
from proxy.cache.dialects.messages_stream import Assembler, render
from proxy.cache.policy import Bypass, Drop

_CUT = frozenset({"max_tokens", "model_context_window_exceeded"})
_CALL = "tool_use"
"""A call of a tool that the caller runs: the kind of its block, and the reason to stop for it."""
_FINISHED = frozenset({"end_turn", "stop_sequence", _CALL}) | _CUT
"""A `refusal` is none of them: a filter may have broken off a text."""
_SPOKEN = {"text": "text", "thinking": "thinking"}
"""Kinds of blocks that show what was generated, with the field that holds it."""
_BY_THE_MODEL = frozenset({*_SPOKEN, "redacted_thinking", _CALL})
"""Kinds of blocks that depend on the call alone; others tell what the server found or did, though no tool was named."""
_PROMPT_TOKENS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_RUN_BY_CALLERS = ("custom", "function", "bash_", "text_editor_", "computer_", "memory_", "browser_toolset_")
"""How the types of tools begin that the caller runs; the server runs all others, by itself."""


class _Messages:
    endpoint = "messages"
    paths = ("/v1/messages", "/messages")
    id_prefix = "msg_"
    usage_on_request = False

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        """See `Dialect`."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        bound = _bound(body, messages)
        if bound is not None:
            return NotCacheable(bound)
        # What tools returned comes from the user, too: the question stands before it.
        asked = [said for m in messages if m.get("role") == "user" and (said := _said(m.get("content")))]
        timely = asked[-1] if asked else ""
        system = [body["system"]] if body.get("system") else []
        system += takewhile(lambda message: message.get("role") == "system", messages)
        later = any(message.get("role") == "assistant" for message in messages)
        last = messages[-1]
        if last.get("role") == "assistant":
            # An answer goes on from what is put in its mouth. llama.cpp repeats that in a whole answer, and leaves it
            # out of a stream: neither can be made of the other.
            return Reading(None, (), {}, timely, system, later, by_form=True)
        texts = _texts(last.get("content")) if last.get("role") == "user" else None
        words = "\n".join(texts or ())
        if texts is None or not words.strip() or not storable(words):
            return Reading(None, (), {}, timely, system, later)
        shell = {**last, "content": _without_text(last["content"])}
        return Reading(words, texts, {**body, "messages": [*messages[:-1], shell]}, timely, system, later)

    def kept(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """See `Dialect`."""
        return {name: value for name, value in body.items() if name != "id"}

    def judge(self, body: Mapping[str, Json]) -> Gist | Drop:
        """See `Dialect`."""
        return _examine(body) or _gist(body)

    def assembler(self) -> Assembling:
        """See `Dialect`."""
        return Assembler(self.judge)

    def whole(self, body: Mapping[str, Json]) -> Wire:
        """See `Dialect`."""
        return Wire(fresh(body))

    def stream(self, body: Mapping[str, Json], *, include_usage: bool, pieces: Pieces = in_one) -> Wire:
        """See `Dialect`; usage comes always."""
        del include_usage
        return render(body, pieces)


def _bound(body: Mapping[str, Json], messages: Sequence[Mapping[str, Json]]) -> Bypass | None:
    """Why an answer depends on more than the call, or does more than answer it."""
    diagnostics = body.get("diagnostics")
    if isinstance(diagnostics, dict) and diagnostics.get("previous_message_id"):
        return Bypass.PREVIOUS_RESPONSE
    if body.get("container") or body.get("thread") or _names_files([message.get("content") for message in messages]):
        return Bypass.CONVERSATION
    tools = body.get("tools")
    if body.get("mcp_servers") or any(map(_runs_at_server, tools if isinstance(tools, list) else ())):
        return Bypass.BACKGROUND
    return None


def _names_files(content: Json) -> bool:
    """Whether content names files that the server keeps."""
    unseen = [content]
    while unseen:
        value = unseen.pop()
        if isinstance(value, list):
            unseen += value
        elif isinstance(value, dict):
            if value.get("file_id") is not None:
                return True
            unseen += value.get("content"), value.get("source")
    return False


def _runs_at_server(tool: Json) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and not kind.startswith(_RUN_BY_CALLERS)


def _texts(content: Json) -> list[str] | None:
    """The texts of a message; None where it is not all text."""
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, list) else []
    texts = [text for text in map(_text, blocks) if text is not None]
    return texts if texts and len(texts) == len(blocks) else None


def _said(content: Json) -> str:
    """What a message says in words, whatever else is in it."""
    if isinstance(content, str):
        return content
    return "\n".join(filter(None, map(_text, content if isinstance(content, list) else ())))


def _text(block: Json) -> str | None:
    text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _without_text(content: Json) -> Json:
    return "" if isinstance(content, str) else [{**block, "text": ""} for block in content]


def _examine(body: Mapping[str, Json]) -> Drop | None:
    """Why a complete answer is not worth keeping: servers report failures with status 200."""
    if body.get("error") is not None or body.get("type") == "error":
        return Drop.ERROR_IN_200
    content, reason, usage = body.get("content"), body.get("stop_reason"), body.get("usage")
    # The official client reads no stream without a count of tokens.
    generated = count(usage, "output_tokens")
    if body.get("type") != "message" or not _is_content(content) or generated is None:
        return Drop.NOT_UNDERSTOOD
    text = _joined(body, "text")
    checks = (
        (Drop.NO_FINISH, reason is None),
        (Drop.FINISH_REASON, not (isinstance(reason, str) and reason in _FINISHED)),
        (Drop.FINISH_REASON, not _BY_THE_MODEL.issuperset(_kinds(body))),
        (Drop.EMPTY, not text.strip() and not _acts(body)),
        (Drop.ZERO_TOKENS, generated == 0),
        (Drop.ABORTED, ABORTED in text),
    )
    return next((drop for drop, applies in checks if applies), None)


def _is_content(content: Json) -> bool:
    return isinstance(content, list) and all(map(_is_block, content))


def _is_block(block: Json) -> bool:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return False
    spoken = _SPOKEN.get(block["type"])
    return isinstance(block.get("input", {}), dict) and (spoken is None or isinstance(block.get(spoken), str))


def _gist(body: Mapping[str, Json]) -> Gist:
    prompt = [count(body["usage"], name) for name in _PROMPT_TOKENS]
    return Gist(
        texts=(f"{_joined(body, 'thinking')} {_joined(body, 'text')}",),
        cut=body["stop_reason"] in _CUT,
        acts=_acts(body) or body["stop_reason"] == _CALL,
        # What the server found in its own cache is not counted as input.
        prompt_tokens=None if prompt[0] is None else sum(number or 0 for number in prompt),
        completion_tokens=count(body["usage"], "output_tokens"),
    )


def _joined(body: Mapping[str, Json], kind: str) -> str:
    return "".join(block[_SPOKEN[kind]] for block in body["content"] if block["type"] == kind)


def _acts(body: Mapping[str, Json]) -> bool:
    return _CALL in _kinds(body)


def _kinds(body: Mapping[str, Json]) -> list[str]:
    return [block["type"] for block in body["content"]]


MESSAGES = _Messages()
"""The messages dialect."""
