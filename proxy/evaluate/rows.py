"""Labelled prompts, read from JSON Lines: pairs (`a`, `b`, `same`) and logs (`prompt`, `cls`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.cache.dialects.call import NotCacheable, read_call
from proxy.cache.dialects.chat import CHAT
from proxy.evaluate.errors import EvaluationError

LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of a line, beyond which it is refused."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTED = 40


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as the proxy sees it; `digest`, `space` and `words` as in `Call`. `shown` is for people."""

    digest: bytes
    space: bytes
    words: str | None
    shown: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands, and what its author called it; empty where it says nothing."""

    line: int
    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Whether the answer to `a` is right for `b`; `class_a` and `class_b` name their answers, None where unknown."""

    origin: Origin
    a: Question
    b: Question
    same: bool
    class_a: str | None
    class_b: str | None


@dataclass(frozen=True, slots=True)
class Logged:
    """One request of a log, and which answer is right."""

    origin: Origin
    asked: Question
    answer: str


@dataclass(frozen=True, slots=True)
class Rows:
    """What a file has, in its order."""

    pairs: tuple[Pair, ...]
    log: tuple[Logged, ...]


def read(path: Path) -> Rows:
    """Read a file.

    Raises:
        EvaluationError: it cannot be read, has no rows, or one that is not understood.
    """
    pairs: list[Pair] = []
    log: list[Logged] = []
    line = 0
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                match _row(line, raw):
                    case Pair() as pair:
                        pairs.append(pair)
                    case Logged() as logged:
                        log.append(logged)
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from None
    except _NotUnderstood as error:
        raise EvaluationError(f"{path}, line {line}: {error}") from None
    if not pairs and not log:
        raise EvaluationError(f"{path} has no rows")
    return Rows(tuple(pairs), tuple(log))


class _NotUnderstood(Exception):
    """What is wrong with a row."""


def _row(line: int, raw: bytes) -> Pair | Logged | None:
    if len(raw) > LONGEST_LINE:
        raise _NotUnderstood(f"is longer than {LONGEST_LINE >> 20} MiB")
    text = _text(raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw)
    if not text.strip():
        return None
    row = _object(text)
    origin = Origin(line, _optional(row, "kind") or "", _optional(row, "source") or "")
    if "a" in row or "b" in row:
        a, b = _question(row, "a"), _question(row, "b")
        return Pair(origin, a, b, _truth(row, "same"), _optional(row, "ca"), _optional(row, "cb"))
    if "prompt" in row or "cls" in row:
        return Logged(origin, _question(row, "prompt"), _string(row, "cls"))
    raise _NotUnderstood("has neither `a`, `b` and `same` nor `prompt` and `cls`")


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _NotUnderstood(f"is not UTF-8 (byte {error.start + 1} of the line)") from None


def _object(text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise _NotUnderstood(f"is not JSON: {_start_of(text)}") from None
    if not isinstance(row, dict):
        raise _NotUnderstood(f"is not a JSON object: {_start_of(text)}")
    return row


def _start_of(text: str) -> str:
    shown = ascii(text.strip()[: _QUOTED + 1])[1:-1]
    return shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}..."


def _given(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise _NotUnderstood(f"`{name}` is missing")
    return row[name]


def _string(row: Mapping[str, Any], name: str) -> str:
    value = _given(row, name)
    if not isinstance(value, str):
        raise _NotUnderstood(f"`{name}` must be a string")
    return value


def _optional(row: Mapping[str, Any], name: str) -> str | None:
    return None if row.get(name) is None else _string(row, name)


def _truth(row: Mapping[str, Any], name: str) -> bool:
    value = _given(row, name)
    if not isinstance(value, bool):
        raise _NotUnderstood(f"`{name}` must be true or false")
    return value


def _question(row: Mapping[str, Any], name: str) -> Question:
    value = _given(row, name)
    if not isinstance(value, str | list):
        raise _NotUnderstood(f"`{name}` must be a string or a list of messages")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        call = read_call(CHAT, "", {}, json.dumps({"messages": messages}).encode("ascii"))
    except RecursionError:
        raise _NotUnderstood(f"`{name}` is nested too deeply") from None
    if isinstance(call, NotCacheable):
        raise _NotUnderstood(f"`{name}` is nothing that the cache understands ({call.reason})")
    if isinstance(value, str):
        return Question(call.digest, call.space_digest, call.words, value)
    ending = call.words if call.words is not None else json.dumps(messages[-1], ensure_ascii=False)
    return Question(call.digest, call.space_digest, call.words, f"[{len(messages)} messages] {ending}")
