"""Questions in files: lines of an OpenAI batch, or plain prompts. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from proxy.cache.dialects import DIALECTS, Dialect, NotCacheable
from proxy.cache.dialects.call import read_call
from proxy.cache.likely import SENT_ALONG

PATHS: Mapping[str, Dialect] = {path: dialect for dialect in DIALECTS for path in dialect.paths}
"""Where questions can be asked so that their answers are kept."""
_CHAT = "/v1/chat/completions"
_NOT_ASKED = ("stream", "stream_options")
"""Fields that change how an answer is sent, not which one it is."""
_TARGET = re.compile(r"[!-~]*")
"""What can stand in the first line of a request; RFC 3986 allows less, some servers more."""
_MARK = b"\xef\xbb\xbf"
_SHOWN = 60


class Kind(StrEnum):
    """What a file holds."""

    EXPORT = "export"
    BATCH = "batch"
    PROMPTS = "prompts"


@dataclass(frozen=True, slots=True)
class Question:
    """A request: where its line is in the file, the path it goes to, with a query where it has one, and its body."""

    line: int
    target: str
    body: bytes

    def headers(self, key: str) -> dict[str, str]:
        """What an official client would send along that counts, with this key or ""."""
        shown = {"Authorization": f"Bearer {key}"} if key else {}
        return {**SENT_ALONG.get(_dialect(self.target).endpoint, {}), **shown}


@dataclass(frozen=True, slots=True)
class Unusable:
    """A line that is no question, and why."""

    line: int
    why: str


@dataclass(frozen=True, slots=True)
class Form:
    """What is sent along with each plain prompt; a field that is None is left out."""

    model: str | None
    system: str | None
    temperature: float | None
    max_tokens: int | None


def kind_of(lines: Iterable[tuple[int, bytes | None]]) -> Kind:
    """What a file of these numbered lines holds, as far as its first line with something in it tells."""
    for number, line in lines:
        text = _without_mark(number, line or b"").strip()
        if not text:
            continue
        try:
            first = json.loads(text)
        except (ValueError, RecursionError):
            return Kind.PROMPTS
        if not isinstance(first, dict):
            return Kind.PROMPTS
        is_entry = "nearhit_export" in first or ("key" in first and "answer" in first)
        return Kind.EXPORT if is_entry else Kind.BATCH
    return Kind.PROMPTS


def read_questions(lines: Iterable[tuple[int, bytes | None]], kind: Kind, form: Form) -> Iterator[Question | Unusable]:
    """The questions of a batch file or a list of prompts; a line is None where it was too long."""
    for number, line in lines:
        if line is None:
            yield Unusable(number, "longer than any request may be")
            continue
        try:
            text = _without_mark(number, line).decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            yield Unusable(number, "expected text in UTF-8")
            continue
        if not text.strip():
            continue
        if kind is Kind.BATCH:
            yield _of_batch(number, text)
        elif not text.startswith("#"):
            yield Question(number, _CHAT, _encoded(_of_prompt(text, form)))


def _without_mark(number: int, line: bytes) -> bytes:
    return line.removeprefix(_MARK) if number == 1 else line


def _of_prompt(prompt: str, form: Form) -> dict[str, Any]:
    system = [] if form.system is None else [{"role": "system", "content": form.system}]
    fields = {"model": form.model, "temperature": form.temperature, "max_tokens": form.max_tokens}
    given = {name: value for name, value in fields.items() if value is not None}
    return {"messages": [*system, {"role": "user", "content": prompt}], **given}


def _of_batch(number: int, text: str) -> Question | Unusable:
    try:
        asked = json.loads(text)
    except (ValueError, RecursionError):
        return Unusable(number, "expected a line of JSON")
    if not isinstance(asked, dict):
        return Unusable(number, 'expected {"method": "POST", "url": ..., "body": {...}}')
    url, body = asked.get("url"), asked.get("body")
    if asked.get("method", "POST") != "POST":
        return Unusable(number, "method: expected POST")
    if not isinstance(url, str) or url.partition("?")[0] not in PATHS or not _TARGET.fullmatch(url):
        shown = f"; found {ascii(url)[1:-1][:_SHOWN]}" if isinstance(url, str) else ""
        return Unusable(number, f"url: expected one that is cached: {', '.join(PATHS)}{shown}")
    if not isinstance(body, dict):
        return Unusable(number, "body: expected the object that a client would send")
    try:
        question = Question(number, url, _encoded({name: body[name] for name in body if name not in _NOT_ASKED}))
    except (ValueError, RecursionError):
        return Unusable(number, "body: expected text that is valid Unicode, and numbers that are some")
    dialect, query = _dialect(url), url.partition("?")[2]
    call = read_call(dialect, query, SENT_ALONG.get(dialect.endpoint, {}), question.body)
    if isinstance(call, NotCacheable):
        return Unusable(number, f"body: expected one whose answer is kept; this is {call.reason}")
    return question


def _dialect(target: str) -> Dialect:
    return PATHS[target.partition("?")[0]]


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
