"""What a reply tells of the upstream's KV cache, read from its bytes as they pass. Pure.

A reply is never parsed on its way. Its last bytes are kept, and its first (Anthropic's streams tell at the start); what
they hold is read once, when the reply has ended. Only keys that the server wrote count: everything a model says is
inside a JSON string, where quotes are escaped, or inside an array, which is not looked into.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from proxy.upstream.prefix import Evidence

TAIL = 16 * 1024
"""Bytes kept of the end: the figures of a finished reply, with room for what follows them."""
HEAD = 4 * 1024

Json = Any

_KEY = re.compile(r'(?<!\\)"(?:timings|usage)"\s*:\s*\{')
_FIGURES = re.compile(rb'"(?:timings|usage)"\s*:\s*\{')
_TRIED = 16
"""How many places in a reply that is known only in part are tried as the start of its last fields."""
_STREAM = re.compile(rb"\s*(?:data|event|id|retry)?:")
_LARGEST = 2**31
_DECODER = json.JSONDecoder()


class Tail:
    """Sees every chunk of one reply, and keeps the first and the last of them."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._head: list[bytes] = []
        self._head_size = 0
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._dropped = False

    def feed(self, chunk: bytes) -> None:
        """Remember the next chunk; copies nothing unless the chunk alone is more than is kept."""
        if self._head_size < HEAD:
            self._head.append(chunk[: HEAD - self._head_size])
            self._head_size += len(self._head[-1])
        if len(chunk) > TAIL:
            chunk = chunk[-TAIL:]
            self._dropped = True
        self._chunks.append(chunk)
        self._size += len(chunk)
        while self._size - len(self._chunks[0]) >= TAIL:
            self._size -= len(self._chunks.popleft())
            self._dropped = True

    def evidence(self) -> Evidence:
        """What the reply told; nothing where it told nothing, or is not plain JSON or a stream of it."""
        tail, head = b"".join(self._chunks), b"".join(self._head)
        if _STREAM.match(head):
            told = _newest(_events_backwards(tail, whole=not self._dropped))
            if told == Evidence() and self._dropped:
                told = _newest(_events_backwards(head.rpartition(b"\n")[0], whole=True))
            return told
        if self._dropped:
            return _newest(_last_fields(tail, levels=1))
        return _newest(_documents(tail))


def _newest(told: Iterator[Json]) -> Evidence:
    """The evidence of objects that come last first: the last `timings`, else the last `usage` that tells of reuse."""
    best = Evidence()
    for fields in (place for event in told for place in _places(event)):
        timings = _of_timings(fields.get("timings"))
        if timings.cached is not None:
            return timings
        if best.cached is None:
            usage = _of_usage(fields.get("usage"))
            best = usage if usage.cached is not None else max(best, timings, key=_told)
    return best


def _told(evidence: Evidence) -> bool:
    return evidence.computed is not None


def _places(event: dict[str, Json]) -> Iterator[dict[str, Json]]:
    """Where figures may be: at the top, under `response` (responses), under `message` (Anthropic)."""
    yield event
    yield from (inner for name in ("response", "message") if isinstance(inner := event.get(name), dict))


def _of_timings(timings: Json) -> Evidence:
    """llama.cpp: tokens reused and tokens computed."""
    if not isinstance(timings, dict):
        return Evidence()
    return Evidence(_count(timings.get("cache_n")), _count(timings.get("prompt_n")))


def _of_usage(usage: Json) -> Evidence:
    if not isinstance(usage, dict):
        return Evidence()
    read = _count(usage.get("cache_read_input_tokens"))
    if read is not None:
        # Anthropic counts as input what was neither read from the cache nor written to it.
        fresh = _count(usage.get("input_tokens"))
        written = _count(usage.get("cache_creation_input_tokens")) or 0
        return Evidence(read, None if fresh is None else fresh + written)
    for total, details in (("prompt_tokens", "prompt_tokens_details"), ("input_tokens", "input_tokens_details")):
        inner = usage.get(details)
        cached = _count(inner.get("cached_tokens")) if isinstance(inner, dict) else None
        if cached is not None:
            whole = _count(usage.get(total))
            return Evidence(cached, whole - cached if whole is not None and whole >= cached else None)
    return Evidence()


def _count(value: Json) -> int | None:
    """A number of tokens, None for what cannot be one."""
    return value if type(value) is int and 0 <= value < _LARGEST else None


def _documents(body: bytes) -> Iterator[dict[str, Json]]:
    """A body of one JSON document, or of one on each line: the last one first."""
    whole = _object(body)
    if whole is not None:
        yield whole
        return
    yield from (document for line in reversed(body.splitlines()) if (document := _object(line)) is not None)


def _events_backwards(stream: bytes, *, whole: bool) -> Iterator[dict[str, Json]]:
    """The data of a stream's events, last first; unless `whole`, the first line may lack its start."""
    first, *others = stream.split(b"\n")
    for line in reversed([first, *others] if whole else others):
        if line.startswith(b"data:") and (event := _object(line[5:])) is not None:
            yield event
    if not whole:
        yield from _last_fields(first, levels=2)


def _last_fields(part: bytes, *, levels: int) -> Iterator[dict[str, Json]]:
    """The last fields of an object that lacks its start, as if it began there.

    They begin at a key from which the text reads as fields up to the object's end. With two `levels`, the object may be
    a field of another one: of an event that holds a response.
    """
    text = part.decode("utf-8", "replace").rstrip()
    for match in reversed(deque(_KEY.finditer(text), _TRIED)):
        fields = _fields_to_end(text[match.start() :], levels)
        if fields is not None:
            yield fields


def _fields_to_end(rest: str, levels: int) -> dict[str, Json] | None:
    found: dict[str, Json] = {}
    for level in range(1, levels + 1):
        try:
            fields, end = _DECODER.raw_decode("{" + rest)
        except (ValueError, RecursionError):
            return None
        found = {**fields, **found}
        rest = rest[end - 1 :].lstrip()
        if not rest:
            return found
        if level == levels:
            return None
        if rest == "}":
            return found
        rest = rest.removeprefix(",").lstrip()
    return None


def _object(text: bytes) -> dict[str, Json] | None:
    """The object, where it is one and may hold figures."""
    if not _FIGURES.search(text):
        return None
    try:
        value = json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
