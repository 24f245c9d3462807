"""Entries as lines of JSON and back, for export and import. Pure. docs/transfer.md tells every field."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct

from proxy import __version__
from proxy.cache.answer import NotUnderstood, Recorded
from proxy.cache.dialects import DIALECTS, Dialect
from proxy.cache.dialects.call import KEY_VERSION
from proxy.cache.dialects.dialect import read_whole
from proxy.cache.near.matcher import LONGEST_TEXT
from proxy.cache.policy import Drop
from storage.base import Entry, Put
from storage.listing import Listed

FORMAT = 1
"""Moves when an older nearhit would misread what a newer one writes."""

BEHIND_MS = 86_400_000
"""How far the clock of whoever wrote a file may have been ahead of ours."""

_DIGEST_BYTES = 32
_WORDS_ROOM = 16 * 1024 * 1024
_FIELDS_ROOM = 64 * 1024

_Count = Annotated[int, Meta(ge=0, le=1 << 53)]
"""Beyond, programs that keep numbers as doubles would change it."""
_Name = Annotated[str, Meta(max_length=4096)]


class _Line(Struct, forbid_unknown_fields=True, kw_only=True):
    mark: int = 0
    key: str
    key_version: int
    namespace: str
    space: str
    upstream: Annotated[str, Meta(min_length=1, max_length=4096)]
    fingerprint: str
    endpoint: _Name
    model: str
    words: str | None
    stored_ms: _Count
    expires_ms: _Count
    grace_ms: _Count
    cost_ms: _Count
    prompt_tokens: _Count | None
    completion_tokens: _Count | None
    usage_known: bool
    near: bool
    topic: str
    hits: _Count = 0
    sealed: bool
    answer: Raw


class Header(Struct, kw_only=True):
    """The first line: the number of the format, who wrote the file and when (ISO 8601), and what was chosen."""

    nearhit_export: int
    version: str = ""
    exported: str = ""
    filters: dict[str, str] = {}


class End(Struct):
    """The last line: how many entries the file has."""

    end: Literal[True]
    entries: _Count


class _Frame(Struct):
    nearhit_export: Any = UNSET
    end: Any = UNSET


class BadLine(ValueError):
    """The line is no entry that may be stored; the message says what was expected."""


class OtherFormat(BadLine):
    """What follows means something else than here."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What an entry must keep to.

    `now_ms` is the time, `max_answer_bytes` bounds an answer as it is stored. With `sealed_only`, nothing may be
    stored that can be read.
    """

    now_ms: int
    max_answer_bytes: int
    sealed_only: bool = False

    @property
    def max_line_bytes(self) -> int:
        """No line is longer that may be stored: an answer as others may spell it, words, and the rest."""
        return 2 * self.max_answer_bytes + _WORDS_ROOM + _FIELDS_ROOM


_encode = msgspec.json.Encoder().encode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_frame = msgspec.json.Decoder(_Frame).decode
_decode_header = msgspec.json.Decoder(Header).decode
_decode_end = msgspec.json.Decoder(End).decode
_decode_answer = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode

_DIALECTS: Mapping[str, Dialect] = {dialect.endpoint: dialect for dialect in DIALECTS}


def header_line(exported: str, filters: Mapping[str, str]) -> bytes:
    """The first line; `exported` in ISO 8601."""
    header = Header(nearhit_export=FORMAT, version=__version__, exported=exported, filters=dict(filters))
    return _encode(header) + b"\n"


def end_line(entries: int) -> bytes:
    """The last line."""
    return _encode(End(True, entries)) + b"\n"


def entry_line(listed: Listed) -> bytes | None:
    """The line of an entry, listed with its answer; None where the answer is damaged."""
    entry = listed.entry
    answer = Raw(_encode(base64.b64encode(entry.answer).decode())) if entry.sealed else _object(entry.answer)
    if answer is None:
        return None
    line = _Line(
        mark=listed.mark,
        key=entry.key.hex(),
        key_version=entry.key_version,
        namespace=entry.namespace.hex(),
        space=entry.space.hex(),
        upstream=entry.upstream,
        fingerprint=entry.fingerprint.hex(),
        endpoint=entry.endpoint,
        model=entry.model,
        words=entry.words,
        stored_ms=entry.stored_ms,
        expires_ms=entry.expires_ms,
        grace_ms=entry.grace_ms,
        cost_ms=entry.cost_ms,
        prompt_tokens=entry.prompt_tokens,
        completion_tokens=entry.completion_tokens,
        usage_known=entry.usage_known,
        near=entry.near,
        topic=entry.topic.to_bytes(8, "big", signed=True).hex(),
        hits=listed.hits,
        sealed=entry.sealed,
        answer=answer,
    )
    return _encode(line) + b"\n"


def _object(answer: bytes) -> Raw | None:
    try:
        _decode_answer(answer)
        # A line ends at its first line break.
        return Raw(answer if b"\n" not in answer else _encode(msgspec.json.decode(answer)))
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None


def read_line(line: bytes, terms: Terms) -> Put | Header | End:
    """What the line says; an entry as it may be stored.

    Raises:
        BadLine: it is none of these, or an entry that would serve nobody, or do harm.
        OtherFormat: the file is not for this nearhit.
    """
    try:
        found = _decode_line(line)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        frame = _frame(line)
        if frame is None:
            raise BadLine(_told(error)) from None
        return frame
    return Put(_entry(found, terms), None, found.hits)


def _frame(line: bytes) -> Header | End | None:
    try:
        kind = _decode_frame(line)
        if kind.nearhit_export is not UNSET:
            header = _decode_header(line)
        elif kind.end is not UNSET:
            return _decode_end(line)
        else:
            return None
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise BadLine(_told(error)) from None
    if header.nearhit_export != FORMAT:
        raise OtherFormat(f"nearhit_export: expected {FORMAT}, the format that this nearhit reads")
    return header


def _told(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "expected text in UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    problem, _, place = str(error).partition(" - at `$")
    if not isinstance(error, msgspec.ValidationError):
        return f"expected a line of JSON: {problem}"
    name, problem = place.strip(".`"), problem.removeprefix("Object ")
    return f"{name}: " * bool(name) + problem[:1].lower() + problem[1:]


def _entry(line: _Line, terms: Terms) -> Entry:
    if line.key_version != KEY_VERSION:
        raise BadLine(f"key_version: expected {KEY_VERSION}: nothing looks for keys of another version")
    if line.stored_ms > terms.now_ms + BEHIND_MS:
        raise BadLine("stored_ms: expected a time that is not more than a day ahead")
    if line.expires_ms < line.stored_ms:
        raise BadLine("expires_ms: expected a time that is not before stored_ms")
    if line.sealed and line.words is not None:
        raise BadLine("words: expected null, as the entry is sealed")
    if terms.sealed_only and not line.sealed:
        raise BadLine("sealed: expected true: this nearhit keeps nothing readable (cache.store_words: digest)")
    dialect = _DIALECTS.get(line.endpoint)
    if dialect is None:
        raise BadLine(f"endpoint: expected one of {', '.join(_DIALECTS)}")
    recorded = None if line.sealed else _recorded(dialect, line.answer)
    answer = _sealed(line.answer) if recorded is None else recorded.encoded()
    if len(answer) > terms.max_answer_bytes:
        raise BadLine(f"answer: expected at most {terms.max_answer_bytes} bytes (cache.max_answer_bytes)")
    return Entry(
        key=_digest("key", line.key),
        key_version=line.key_version,
        namespace=_digest("namespace", line.namespace) if line.namespace else b"",
        space=_digest("space", line.space),
        upstream=line.upstream,
        fingerprint=_digest("fingerprint", line.fingerprint),
        endpoint=line.endpoint,
        model=line.model,
        words=line.words,
        stored_ms=line.stored_ms,
        expires_ms=line.expires_ms,
        cost_ms=line.cost_ms,
        prompt_tokens=line.prompt_tokens,
        completion_tokens=line.completion_tokens,
        usage_known=line.usage_known,
        answer=answer,
        near=line.near and _may_be_near(line.words, recorded),
        topic=int.from_bytes(_digest("topic", line.topic, 8), "big", signed=True),
        grace_ms=line.grace_ms,
        sealed=line.sealed,
    )


def _digest(name: str, text: str, size: int = _DIGEST_BYTES) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != size or len(text) != 2 * size:
        raise BadLine(f"{name}: expected {2 * size} hexadecimal digits")
    return digest


def _sealed(answer: Raw) -> bytes:
    try:
        sealed = base64.b64decode(_decode_text(answer), validate=True)
    except (ValueError, binascii.Error, msgspec.MsgspecError):
        sealed = b""
    if not sealed:
        raise BadLine("answer: expected base64, as the entry is sealed")
    return sealed


def _recorded(dialect: Dialect, answer: Raw) -> Recorded:
    recorded = read_whole(dialect, bytes(answer))
    if isinstance(recorded, Drop):
        raise BadLine(f"answer: expected one that nearhit would have stored; this is {recorded}")
    try:
        # Whoever asks for it later can do nothing about it.
        dialect.whole(recorded.body)
        dialect.stream(recorded.body, include_usage=True)
    except (NotUnderstood, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise BadLine(f"answer: expected one that can be given as {dialect.endpoint}, whole and as a stream") from None
    return recorded


def _may_be_near(words: str | None, recorded: Recorded | None) -> bool:
    if words is None or recorded is None:
        return False
    return len(words) <= LONGEST_TEXT and recorded.may_be_near(limited=True)


class LineSplitter:
    """Cuts bytes as they come into lines without their ends; of those above `max_bytes` nothing is kept but None."""

    def __init__(self, max_bytes: int) -> None:
        """Nothing has come yet."""
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """Take the next bytes; the lines that they end."""
        first, *others = chunk.split(b"\n")
        lines: list[bytes | None] = []
        self._add(first)
        for piece in others:
            lines.append(self._line())
            self._add(piece)
        return lines

    def end(self) -> list[bytes | None]:
        """The last line, where no line break ended it."""
        return [self._line()] if self._size else []

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._max_bytes:
            self._parts.clear()
        elif piece:
            self._parts.append(piece)

    def _line(self) -> bytes | None:
        line = b"".join(self._parts) if self._size <= self._max_bytes else None
        self._parts.clear()
        self._size = 0
        return line
