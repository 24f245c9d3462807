"""What a request for a prefix cache asks for: its name, and the lead that its prompt or messages stand for. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.upstream.prefix import RENDERED, Lead, lead_of, lead_of_prompt

MOST_BYTES = 4 * 1024 * 1024
"""Of a body; a prompt of a million tokens has about as many."""

_LONGEST_NAME = 64
_DEEPEST = 64
_START = "<|im_start|>"
_SYSTEM = re.compile(r"<\|im_start\|>(system|developer)\n(.*?)(?:<\|im_end\|>\s*|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prefix that somebody wants."""

    name: str
    lead: Lead


class BadPrefix(Exception):
    """The request cannot be used; the message names the field, in RockchipLlama's words where it has some."""


def read_wanted(raw: bytes) -> Wanted:
    """Read a body: `{"cache_name", "prompt"}` or `{"cache_name", "messages"}`, with the fields of `RENDERED` if any.

    Raises:
        BadPrefix: it is none, or a field is missing or wrong.
    """
    body = _object(raw)
    name = _name(body.get("cache_name"))
    prompt, messages = body.get("prompt"), body.get("messages")
    if not prompt and not messages:
        raise BadPrefix("Either 'prompt' or 'messages' is required")
    if prompt and messages:
        raise BadPrefix("send either 'prompt' or 'messages', not both")
    return Wanted(name, _lead_of_prompt(prompt) if prompt else _lead_of_messages(body))


def _object(raw: bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(raw)
        # What cannot be written down again, no server can be sent: halves of surrogate pairs, say.
        if not _is_deep(body):
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise BadPrefix("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadPrefix("the body is not a JSON object")
    if _is_deep(body):
        raise BadPrefix(f"the body is nested more than {_DEEPEST} levels deep")
    return body


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for one in level for child in _children(one)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _name(name: Any) -> str:
    if name is None or name == "":
        raise BadPrefix("cache_name is required")
    if not isinstance(name, str):
        raise BadPrefix("cache_name must be a string")
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise BadPrefix("cache_name must be alphanumeric (hyphens and underscores allowed)")
    if name[0] in "-_":
        raise BadPrefix("cache_name must begin with a letter or a digit")
    if len(name) > _LONGEST_NAME:
        raise BadPrefix(f"cache_name must have {_LONGEST_NAME} characters at most")
    return name


def _lead_of_prompt(prompt: Any) -> Lead:
    """A system prompt itself, or one that is rendered as ChatML, as RockchipLlama wants it."""
    if not isinstance(prompt, str):
        raise BadPrefix("prompt must be a string")
    if not prompt.lstrip().startswith(_START):
        return _checked(lead_of_prompt(prompt), "prompt")
    messages, at = [], len(prompt) - len(prompt.lstrip())
    while found := _SYSTEM.match(prompt, at):
        messages.append({"role": found[1], "content": found[2]})
        at = found.end()
    return _checked(lead_of({"messages": messages}), "prompt")


def _lead_of_messages(body: Mapping[str, Any]) -> Lead:
    messages = body["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadPrefix("messages must be a list of objects with role and content")
    fields = {name: body[name] for name in ("messages", *RENDERED) if name in body}
    return _checked(lead_of(fields), "messages")


def _checked(lead: Lead | None, field: str) -> Lead:
    if lead is None or not (lead.chars or len(lead.body) > 1):
        raise BadPrefix(f"{field} must begin with a system message of text: nothing else is shared between calls")
    return lead
