"""How far a server's own account of its answers can be believed, and what follows for keeping them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from proxy.cache.answer import Gist
from proxy.cache.dialects.call import Call
from proxy.cache.length import reaches
from proxy.cache.policy import Bypass


@dataclass(frozen=True, slots=True)
class Trust:
    """What holds for the answers of one kind of server; the defaults are those of an ordinary one.

    `tells_length`: an answer that was cut says so. Where it does not, `unit` is what the server's token counts count,
    and `default_limit` the tokens at which it cuts where a call states no limit (None: unknown, or never). An answer
    that ends where prompt and answer fill the `context` (tokens, 0: unknown) was cut, too; not every dialect says so.
    `honours_sampling`: temperature and seed of a call have an effect. `multi_turn`: answers to the later turns of a
    conversation may be kept; `cached`: any answer may. `keeps_responses`: the server keeps what it answers on
    `/v1/responses` unless told not to, for calls that go on from it.
    """

    tells_length: bool = True
    unit: Literal["tokens", "words"] = "tokens"
    default_limit: int | None = None
    context: int = 0
    honours_sampling: bool = True
    multi_turn: bool = True
    cached: bool = True
    keeps_responses: bool = False

    def bypass(self, call: Call) -> Bypass | None:
        """Why answers to this call are neither kept nor looked for."""
        if not self.cached:
            return Bypass.NOT_CACHED_HERE
        if call.left_to_store and self.keeps_responses:
            return Bypass.STORE_TRUE
        return Bypass.MULTI_TURN if call.later_turn and not self.multi_turn else None

    def samples(self, call: Call) -> bool:
        """Whether asking again would give another answer."""
        return call.sampled or not self.honours_sampling

    def seems_cut(self, call: Call, text: str, *, counted: int | None, deltas: int | None) -> bool:
        """Whether an answer that says that it is whole was cut all the same.

        `counted` is the server's `completion_tokens`; `deltas` see `reaches`.
        """
        limit = call.limits.least(self.default_limit)
        if self.tells_length or limit is None:
            return False
        in_words = self.unit == "words"
        tokens, words = (None, counted) if in_words else (counted, None)
        return reaches(limit, text, tokens=tokens, words=words, deltas=deltas)

    def fills(self, call: Call, gist: Gist) -> bool:
        """Whether an answer ends where the server cuts it by itself: not every dialect says so.

        A limit that the call states is part of what is compared, and need not be told from an end.
        """
        counted = gist.completion_tokens or 0
        limit = self.default_limit if call.limits.least(None) is None else None
        in_all = (gist.prompt_tokens or 0) + counted
        return (limit is not None and counted >= limit) or 0 < self.context <= in_all

    def is_limited(self, call: Call, counted: int | None) -> bool:
        """Whether an answer that was cut was cut where the call itself says."""
        if self.tells_length:
            return call.limited
        # A server that went beyond the limit has not read it. It has no fewer tokens than words.
        return call.limits.plain is not None and (counted is None or counted <= call.limits.plain)


ORDINARY = Trust()
"""A server that tells the truth."""


class Ending(StrEnum):
    """How the answer to a call that was sent ended."""

    WHOLE = "whole"
    """It is complete, and was not cut."""
    CUT = "cut"
    """It is complete, and was cut at a limit of its length, as the server says or as it seems."""
    UNKNOWN = "unknown"
    """It was given up, broke off, was not read along, or was nothing that could be kept."""


class Untracked:
    """For calls that nobody keeps an eye on; see `proxy.cache.ports.Sending`."""

    sent = True
    departed = 0.0
    tainted = False

    def wanted(self, *, wanted: bool) -> None:
        """See `Sending`."""

    def ended(self, ending: Ending) -> None:
        """See `Sending`."""


UNTRACKED = Untracked()
"""Calls of an ordinary server: sent at once, and independent of one another."""
