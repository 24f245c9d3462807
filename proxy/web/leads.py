"""What the prompts of a call begin with, read from its body, whichever endpoint it is for. Pure.

llama.cpp makes a chat of what comes to `/v1/messages` and `/v1/responses`, and has its template render that. The leads
here are those of the chats that it makes: equal ones are one lead, on whichever endpoint they come. Where it is not
plain what it would make of a body, there is none: a wrong one would cost time, though never an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import takewhile

import msgspec

from proxy.upstream.prefix import RENDERED, Json, Lead, lead_of

LeadIn = Callable[[bytes], Lead | None]
"""Finds the lead in the body of a request."""

_LONGEST_BODY = 4 * 1024 * 1024
"""Bytes beyond which looking for a lead would hold up others; with images, mostly."""
_LEADING = ("system", "developer")
_TOOL_CHOICES = {"auto": "auto", "any": "required", "tool": "required"}
_STAMP = re.compile(r"(x-anthropic-billing-header:(?:(?!cch=).)*cch=)[!-~]{5}(?=;)", re.DOTALL)
"""Older versions of Claude Code put a new number into each system prompt, at its beginning; llama.cpp takes it out."""
_decode = msgspec.json.Decoder().decode


class _Unsure(ValueError):
    """What the server would make of the body is not plain."""


def lead_in(endpoint: str) -> LeadIn:
    """What finds the leads of calls to this endpoint: chat, messages or responses; others have none."""
    chat = _CHATS.get(endpoint)
    return no_lead if chat is None else partial(_lead, chat)


def no_lead(body: bytes) -> Lead | None:
    """For what no template renders."""
    del body
    return None


def _lead(chat: Callable[[Mapping[str, Json]], Mapping[str, Json]], body: bytes) -> Lead | None:
    if len(body) > _LONGEST_BODY:
        return None
    try:
        decoded = _decode(body)
        return lead_of(chat(decoded)) if isinstance(decoded, dict) else None
    except (ValueError, TypeError, RecursionError):
        # Whatever a body holds, learning from it must not cost it its answer.
        return None


def _same(body: Mapping[str, Json]) -> Mapping[str, Json]:
    return body


def _of_messages(body: Mapping[str, Json]) -> Mapping[str, Json]:
    """The chat that llama.cpp makes of a call in Anthropic's format."""
    leading, others = _parted(body.get("messages"))
    system = body.get("system")
    before = [] if system is None else [{"role": "system", "content": _joined(system)}]
    named = {name: body[name] for name in ("model", "lora", "chat_template_kwargs") if name in body}
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in _TOOL_CHOICES:
        named["tool_choice"] = _TOOL_CHOICES[choice["type"]]
    tools = [_of_anthropic(tool) for tool in body.get("tools") or ()]
    shown = [{"role": message["role"], "content": _content(message, "text")} for message in leading]
    return {**named, **({"tools": tools} if tools else {}), "messages": [*before, *shown, *_spoken(others)]}


def _of_responses(body: Mapping[str, Json]) -> Mapping[str, Json]:
    """The chat that llama.cpp makes of a call in the format of OpenAI's Responses."""
    if any(body.get(name) for name in ("previous_response_id", "conversation", "prompt")):
        raise _Unsure("it goes on from what only the server knows")
    asked, instructions = body.get("input"), body.get("instructions", "")
    if not isinstance(instructions, str) or isinstance(body.get("tool_choice"), dict) or _formats(body.get("text")):
        raise _Unsure("instructions, a choice or a format of another kind")
    leading, others = ([], []) if isinstance(asked, str) else _parted(asked)
    before = [{"role": "system", "content": instructions}] if "instructions" in body else []
    shown = [{"role": item["role"], "content": _listed(item)} for item in leading]
    named = {name: body[name] for name in ("model", "lora", *RENDERED) if name in body and name != "tools"}
    tools = [_of_openai(tool) for tool in body.get("tools") or ()]
    chat = {**named, **_effort(body), **({"tools": tools} if tools else {})}
    return {**chat, "messages": [*before, *shown, *_spoken(others)]}


def _parted(messages: Json) -> tuple[list[dict[str, Json]], list[dict[str, Json]]]:
    """The messages before the first of the user or the model, and the others."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Unsure("not a list of messages")
    leading = list(takewhile(_leads, messages))
    return leading, messages[len(leading) :]


def _leads(message: Mapping[str, Json]) -> bool:
    return message.get("role") in _LEADING and message.get("type", "message") == "message"


def _spoken(messages: Iterable[Mapping[str, Json]]) -> list[Json]:
    """Who speaks in them; items without a role are what the model did, or what came of it."""
    return [{"role": message.get("role", "assistant")} for message in messages]


def _content(message: Mapping[str, Json], kind: str) -> Json:
    """The content of a leading message whose parts are of this kind.

    A template may render one text and a list of one differently, so neither becomes the other.
    """
    content = message.get("content")
    return content if isinstance(content, str) else [{"type": "text", "text": text} for text in _texts(content, kind)]


def _listed(item: Mapping[str, Json]) -> Json:
    """As `_content`, for an item of a call for a response: there llama.cpp makes a list of a text, too."""
    content = _content(item, "input_text")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(parts: Json, kind: str) -> list[str]:
    if not isinstance(parts, list) or not parts:
        raise _Unsure("not a list of parts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != kind or not isinstance(part.get("text"), str):
            raise _Unsure("a part that is no text")
    return [part["text"] for part in parts]


def _joined(system: Json) -> str:
    texts = [system] if isinstance(system, str) else _texts(system, "text")
    return "".join(_STAMP.sub(r"\1fffff", text, count=1) if _STAMP.match(text) else text for text in texts)


def _of_anthropic(tool: Json) -> Json:
    if not isinstance(tool, dict) or tool.get("type", "custom") != "custom" or not isinstance(tool.get("name"), str):
        raise _Unsure("a tool of the server's own")
    described, schema = tool.get("description", ""), tool.get("input_schema", {})
    if not isinstance(described, str) or not isinstance(schema, dict):
        raise _Unsure("a tool that is described otherwise")
    return {"type": "function", "function": {"name": tool["name"], "description": described, "parameters": schema}}


def _of_openai(tool: Json) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise _Unsure("a tool of the server's own")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _formats(text: Json) -> bool:
    """Whether the answer shall have a form, of which the server may tell the model."""
    form = text.get("format") if isinstance(text, dict) else text
    return form is not None and not (isinstance(form, dict) and form.get("type") == "text")


def _effort(body: Mapping[str, Json]) -> dict[str, Json]:
    reasoning = body.get("reasoning")
    if reasoning is None:
        return {}
    if not isinstance(reasoning, dict) or "reasoning_effort" in body:
        raise _Unsure("an effort that is told otherwise, or twice")
    effort = reasoning.get("effort")
    return {} if effort is None else {"reasoning_effort": effort}


_CHATS: Mapping[str, Callable[[Mapping[str, Json]], Mapping[str, Json]]] = {
    "chat": _same,
    "messages": _of_messages,
    "responses": _of_responses,
}
