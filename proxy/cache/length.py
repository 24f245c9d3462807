"""How long a call lets its answer be, and whether an answer reached that, of servers that never say so. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PLAIN = "max_tokens"
_SPELLINGS = (_PLAIN, "max_completion_tokens", "max_output_tokens", "n_predict")
_RARE = ("max_completion_tokens", "max_output_tokens", "n_predict", "max_new_tokens", "num_predict")
_MOST_DIGITS = 15
_BYTES_PER_WORD = 5
"""Of UTF-8; English has 6 and more, the space included. Scripts without spaces have no other words to count."""
_TOKENS_OF_A_SIGN = 3
"""Tokens of a character beyond the Basic Multilingual Plane, an emoji mostly, of which a stream shows the last only."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tokens a call lets its answer have, None where it does not say.

    `plain` is `max_tokens`, which every server reads; `other` the least that fields say which not every server knows.
    """

    plain: int | None = None
    other: int | None = None

    def least(self, default: int | None) -> int | None:
        """The fewest tokens at which a server may have cut that cuts at `default` where it reads no limit."""
        known = [limit for limit in (self.plain or default, self.other) if limit is not None]
        return min(known, default=None)


NO_LIMITS = Limits()
"""Those of a call that states none."""


def limits_of(body: Mapping[str, Any]) -> Limits:
    """The limits that a request body states: zero, null and negative numbers state none."""
    options = body.get("options")
    fields = [*map(body.get, _RARE), *(map(options.get, _RARE) if isinstance(options, dict) else ())]
    stated = [limit for limit in map(_positive, fields) if limit is not None]
    return Limits(_positive(body.get(_PLAIN)), min(stated, default=None))


def is_limited(body: Mapping[str, Any]) -> bool:
    """Whether the body states how long the answer may be: a negative number says that it may be endless."""
    values = [body.get(name) for name in _SPELLINGS]
    return any(value is not None and not (isinstance(value, int | float) and value < 0) for value in values)


def reaches(limit: int, text: str, *, tokens: int | None, words: int | None, deltas: int | None) -> bool:
    """Whether `text` is as long as `limit` tokens allow, as far as can be told.

    `tokens` and `words` are what the server counted, `deltas` the pieces of text that its stream had; None where there
    is no such count. A word has two tokens at the most, give or take: half the limit in words is taken for all of it.
    """
    if tokens is not None:
        return tokens >= limit
    spaced = len(text.split())
    # A stream with fewer pieces than words does not send one token at a time.
    if deltas is not None and deltas >= spaced:
        signs = sum(char > "\uffff" for char in text)
        return deltas + (_TOKENS_OF_A_SIGN - 1) * signs >= limit
    size = len(text.encode("utf-8", "surrogatepass"))
    return 2 * max(words or 0, spaced, size // _BYTES_PER_WORD) >= limit


def _positive(value: Any) -> int | None:
    # Servers that validate with pydantic read numbers in texts, too.
    if isinstance(value, str) and value.strip().isdecimal() and len(value) <= _MOST_DIGITS:
        value = int(value)
    return int(value) if isinstance(value, int | float) and value >= 1 else None
