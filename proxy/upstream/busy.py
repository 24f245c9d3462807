"""Servers that refuse a call while they work on another: how they say it, and when to try again. Pure."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

MAX_BODY = 64 * 1024
"""Bytes of an error body that are looked at; a longer one says nothing."""

SHORTEST_S = 0.25
LONGEST_S = 8.0

_BUSY_TYPES = frozenset({"service_unavailable", "overloaded", "overloaded_error", "server_busy", "server_overloaded"})
_BUSY = re.compile(r"\bbusy\b|\boverload", re.IGNORECASE)
_NOT_UP = re.compile(r"\bloading\b|\b(not|no models?|un)[ -]?(loaded|available)\b", re.IGNORECASE)
"""A server that is not ready: waiting for it is for the one who watches its health."""
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def says_busy(status: int, body: bytes) -> bool:
    """Whether a response means: I work on something else, ask again.

    That is a 503 whose JSON says so. llama.cpp answers 503 while it loads, which is something else.
    """
    if status != 503 or len(body) > MAX_BODY:
        return False
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return False
    kind, message = _error(answer)
    if _NOT_UP.search(message):
        return False
    return kind in _BUSY_TYPES or _BUSY.search(message) is not None


def _error(answer: Any) -> tuple[str, str]:
    """Type and message: `{"error": {...}}` as OpenAI has it, `{"error": "text"}` (Ollama), `{"detail": "text"}`."""
    if not isinstance(answer, dict):
        return "", ""
    error = answer.get("error", answer.get("detail"))
    if isinstance(error, dict):
        kind, message = error.get("type"), error.get("message")
    else:
        kind, message = answer.get("error_type"), error
    return kind if isinstance(kind, str) else "", message if isinstance(message, str) else ""


def asked_delay(retry_after: str | None, now: datetime) -> float | None:
    """The seconds that a `Retry-After` field asks for (RFC 9110 section 10.2.3); None where it says nothing readable.

    It is either seconds or a date, which is compared with `now` (aware); 0 for one that is past.
    """
    value = (retry_after or "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


class Backoff:
    """Delays between attempts: longer each time, scattered, and in sum within a limit."""

    def __init__(self, limit_s: float, rng: random.Random) -> None:
        """`limit_s` bounds the sum of all delays."""
        self._left_s = limit_s
        self._rng = rng
        self._ceiling_s = 2 * SHORTEST_S

    def next_delay(self, asked_s: float | None = None) -> float | None:
        """Seconds to wait before the next attempt; None: give up.

        `asked_s` is what the server asked for. Where that is more than what is left, trying earlier is in vain.
        """
        if self._left_s < SHORTEST_S or (asked_s is not None and not asked_s <= self._left_s):
            return None
        delay = max(self._rng.uniform(self._ceiling_s / 2, self._ceiling_s), asked_s or 0.0)
        delay = min(delay, self._left_s)
        self._ceiling_s = min(LONGEST_S, 2 * self._ceiling_s)
        self._left_s -= delay
        return delay


def delays(limit_s: float, rng: random.Random) -> Iterator[float]:
    """The delays of a server that asks for none: 0.25 s to 8 s each, at most `limit_s` in sum."""
    backoff = Backoff(limit_s, rng)
    while (delay := backoff.next_delay()) is not None:
        yield delay
