"""Answers in any dialect: what is known of them, how they are kept, and how they are given again. Pure.

An answer is kept in the form of its dialect's non-streamed object, without what every replay makes anew: its id and the
time of its creation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from proxy.cache.policy import Drop
from proxy.cache.strict_json import Json
from proxy.cache.strict_json import decode as decode

ABORTED = "Aborted inference by Timeout ("
"""What stands in the texts that rkllama gives in place of an answer, perhaps behind the end of another answer."""

_MAX_COUNT = 1 << 53
"""Token counts beyond are nobody's, and no database holds them all."""
_ID, _CREATED = b"\x00", b"\x01"
"""Stand for the id and the time of a replay: encoded JSON has no control characters of its own."""


class NotUnderstood(ValueError):
    """The upstream sent something that cannot be put together without guessing."""


_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Gist:
    """What a complete answer comes to, whatever its dialect.

    `texts` hold all that was generated, as far as it is shown, one for each choice, reasoning before what it led to.
    `cut` says that one was cut at a limit of its length, `acts` that one calls a tool or refuses, or ended as only
    such answers end. Tokens are those of the prompt and of the answer, None where the upstream did not say.
    """

    texts: tuple[str, ...]
    cut: bool
    acts: bool
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """A complete answer that may be kept. `usage_known`: token usage is in `body`, or this upstream never gives any.

    `seems_cut`: it was cut by all appearances, whatever it says itself.
    """

    body: dict[str, Json]
    usage_known: bool
    gist: Gist
    seems_cut: bool = False

    @property
    def was_cut(self) -> bool:
        """Whether it was cut at a limit of its length, as it says or as it seems."""
        return self.seems_cut or self.gist.cut

    def may_be_near(self, *, limited: bool) -> bool:
        """Whether it may answer other words than its own: it calls no tool, and nothing but the caller cut it short.

        `limited` says that the call itself stated how long an answer may be, and that it is no longer.
        """
        return not self.gist.acts and (limited or not self.was_cut)

    def encoded(self) -> bytes:
        """The form in which storage keeps it.

        Raises:
            NotUnderstood: it holds text that is not valid Unicode.
        """
        return encoded(self.body)


def decode_body(answer: bytes) -> dict[str, Json]:
    """The answer that `Recorded.encoded` stored."""
    body: dict[str, Json] = json.loads(answer)
    return body


@dataclass(frozen=True, slots=True)
class Wire:
    """A rendered answer, with marks where each replay puts an id and a time of its own."""

    template: bytes

    @property
    def size(self) -> int:
        """Bytes held."""
        return len(self.template)

    def render(self, answer_id: str, created: int) -> bytes:
        """The bytes to send; `created` in seconds since the epoch."""
        return self.template.replace(_ID, answer_id.encode("ascii")).replace(_CREATED, b"%d" % created)


def fresh(value: Mapping[str, Json], *, created: str = "") -> bytes:
    """A JSON object that begins with the `id` of a replay and, under the name `created`, its time.

    Raises:
        NotUnderstood: see `encoded`.
    """
    time = b',"%b":%b' % (created.encode("ascii"), _CREATED) if created else b""
    rest = encoded(value)[1:]
    return b'{"id":"%b"%b%b%b' % (_ID, time, b"" if rest == b"}" else b",", rest)


Pieces = Callable[[str], Sequence[str]]
"""Cuts a text into what successive events of a stream say."""


def in_one(text: str) -> Sequence[str]:
    """The whole text at once."""
    return (text,)


class Assembling(Protocol):
    """Puts a stream's events together."""

    @property
    def done(self) -> bool:
        """Whether the answer has said that it is over."""
        ...

    @property
    def spoke(self) -> bool:
        """Whether the first of the answer has come: the end of the time to the first token."""
        ...

    @property
    def deltas(self) -> int:
        """How many pieces of the answer have come: tokens, of servers that send each as it is generated."""
        ...

    def feed(self, data: str) -> None:
        """Take the data of one event."""
        ...

    def fail(self) -> None:
        """The stream carried an event that is no data: an error, as far as anyone can tell."""
        ...

    def finish(self, *, usage_asked: bool, usage_from_timings: bool) -> Recorded | Drop:
        """The answer, or why it cannot be kept."""
        ...


def count(usage: Json, name: str) -> int | None:
    """A number of tokens in an object of usage, where it can be believed."""
    number = usage.get(name) if isinstance(usage, dict) else None
    plausible = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _MAX_COUNT
    return number if plausible else None


def encoded(value: Json) -> bytes:
    """JSON, as short as it can be.

    Raises:
        NotUnderstood: text that is not valid Unicode, or a number that few can read.
    """
    try:
        return _encoder.encode(value)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise NotUnderstood("text that is not valid Unicode, or a number that few can read") from error
