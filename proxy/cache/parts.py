"""What a key is made of, in parts with names for people, and where two calls differ in them. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxy.cache.dialects.call import BEHAVIOUR_HEADERS, Json, Reading, counted
from proxy.cache.dialects.dialect import Dialect

_SYSTEM = frozenset({"system", "developer"})
_CONVERSATIONS = {"chat": ("", "messages"), "messages": ("system", "messages"), "responses": ("instructions", "input")}
"""Where the endpoints have a system prompt beside the turns, and the turns."""
_NAMED = ("model", "tools", "prompt", "input")
_SHOWN = 120
_AROUND = 24
_LOOKS = (
    ("a time of day", r"\d{1,2}:\d{2}(?::\d{2})?"),
    ("a date", r"\d{4}-\d{2}-\d{2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}"),
    (
        "a date or a day",
        r"(?i)\b(?:mon|tues|wednes|thurs|fri|satur|sun)day\b"
        r"|\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
        r"|nov(?:ember)?|dec(?:ember)?)\b",
    ),
    ("an id", r"(?i)\b(?=[0-9a-f-]*\d)(?=[0-9a-f-]*[a-f])[0-9a-f-]{8,}\b"),
    ("a time stamp", r"\b\d{10,13}\b"),
    ("a number, such as a device's state", r"\d"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Where one part of two calls differs: characters `start` to `end` of `here`, and what stands there in either."""

    part: str
    start: int
    end: int
    here: str
    there: str
    around: str
    looks_like: str


def parts_of(dialect: Dialect, query: str, headers: Mapping[str, str], body: Mapping[str, Json]) -> dict[str, str]:
    """Every part of the space by its name, as text: all that counts but the compared words."""
    parts = {"endpoint": dialect.endpoint, "query": query}
    parts |= {f"header {name}": headers[name] for name in BEHAVIOUR_HEADERS if name in headers}
    reading = dialect.read(body)
    shell = reading.without_words if isinstance(reading, Reading) and reading.words is not None else body
    fields = counted(shell)
    beside, turns = _CONVERSATIONS.get(dialect.endpoint, ("", ""))
    if isinstance(fields.get(turns), list | str):
        spoken = fields.pop(turns)
        parts |= _turns(spoken) if not beside else _beside(fields.pop(beside, None), _turns(spoken))
    for name, value in fields.items():
        named = name in _NAMED
        parts[name if named else f"parameter {name}"] = value if named and isinstance(value, str) else _text(value)
    return {name: text for name, text in parts.items() if text}


def spans(here: Mapping[str, str], there: Mapping[str, str]) -> list[Span]:
    """Where the parts of two calls differ, each cut down to the stretch that does."""
    names = [*here, *(name for name in there if name not in here)]
    return [_span(name, here.get(name, ""), there.get(name, "")) for name in names if here.get(name) != there.get(name)]


def likeness(here: Mapping[str, str], there: Mapping[str, str]) -> tuple[int, float]:
    """Sorts calls by how much they are alike: those that differ in fewer parts first, then in shorter stretches."""
    differing = spans(here, there)
    length = sum(len(here.get(span.part, "")) for span in differing) or 1
    return len(differing), sum(max(span.end - span.start, len(span.there)) for span in differing) / length


def _turns(turns: Json) -> dict[str, str]:
    return _messages(turns) if isinstance(turns, list) else {"last message": _text(turns)}


def _beside(system: Json, parts: Mapping[str, str]) -> Mapping[str, str]:
    """The parts of the turns, with the system prompt that may stand beside them."""
    blocks = system if isinstance(system, list) and system and all(map(_is_text, system)) else []
    told = (system or '""') if isinstance(system, str) else "\n".join(block["text"] for block in blocks)
    # The text alone does not tell where each of them ends.
    ends = [{**block, "text": block["text"].count("\n")} for block in blocks] or system
    among = parts.get("system prompt", "")
    return {
        **parts,
        "system prompt": "\n".join(text for text in (told, among) if text),
        "system blocks": "" if isinstance(system, str | None) else _text(ends),
        "system messages": parts.get("system messages") or (f"lines: {len(among.splitlines())}" if among else ""),
    }


def _is_text(block: Json) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str)


def _messages(messages: Sequence[Json]) -> dict[str, str]:
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    is_system = [isinstance(role, str) and role in _SYSTEM for role in roles]
    system = [message for message, told in zip(messages[:-1], is_system, strict=False) if told]
    history = [message for message, told in zip(messages[:-1], is_system, strict=False) if not told]
    texts = [message.get("content") for message in system]
    plain = not system or (is_system[0] and system == [{"role": "system", "content": texts[0]}])
    return {
        "system prompt": "\n".join(text if isinstance(text, str) else _text(text) for text in texts),
        # The text alone does not tell how many there are, and where they stand.
        "system messages": "" if plain else _text([system, roles]),
        "history": _text(history) if history else "",
        "last message": _text(messages[-1]) if messages else "",
    }


def _text(value: Json) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    except RecursionError:
        return "(nested too deeply to be shown)"


def _span(part: str, here: str, there: str) -> Span:
    start = _shared(here, there)
    end = _shared(here[start:][::-1], there[start:][::-1])
    # Whole words and numbers: a clock that moved from 10:41 to 10:47 differs in "10:47".
    while start and _inside(here, start) and _inside(there, start):
        start -= 1
    while end and _inside(here, len(here) - end) and _inside(there, len(there) - end):
        end -= 1
    stop = len(here) - end
    mine, other = here[start:stop], there[start : len(there) - end]
    around = here[max(0, start - _AROUND) : stop + _AROUND] if len(mine) <= _SHOWN else here[start : start + _SHOWN]
    return Span(part, start, stop, mine[:_SHOWN], other[:_SHOWN], around, looks_of(mine) or looks_of(other))


def looks_of(text: str) -> str:
    """What a short stretch of text seems to be, "" where it is too long or nothing known."""
    if len(text) > _SHOWN:
        return ""
    return next((name for name, pattern in _LOOKS if re.search(pattern, text)), "")


def _inside(text: str, at: int) -> bool:
    return at < len(text) and not (text[at - 1].isspace() or text[at].isspace())


def _shared(a: str, b: str) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
