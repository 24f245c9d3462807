"""Telling models apart that show the same: what they think comes next after a fixed run of tokens.

llama.cpp shows paths and shapes, never weights or the type of its KV cache. The logprobs of the likeliest next tokens
depend on both. They are the same to the bit after a restart on one machine, and nearly the same on a GPU that batches.
So they are kept as a *vector* and compared with a tolerance; what names a model is the vector that was kept first.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

from proxy.upstream.adapter import Loading, Locked, Probe, Seen, Silent, Unidentified, Unreachable, trouble

log = logging.getLogger("nearhit.upstream")

Json = Any

TOLERANCE = 0.02
"""How far a logprob may be off and still be the same model's."""

MAX_VECTORS = 8
"""Vectors kept for each static identity; the one that was used longest ago goes first."""

MAX_IDENTITIES = 8
"""Static identities of which vectors are kept, likewise."""

ASKS = 3
"""How often the question is put before an answer that differs is believed."""

LIMIT_S = 600.0
"""How long an answer may take: a small board reads a few tokens a second, and a long queue of calls may come first."""

PATIENCE_S = 30.0
"""How long to wait for an idle server before asking again."""

_QUIET_S = 0.1
_QUESTION = {
    # Small numbers, so that every vocabulary has them, and none of those that stand for bytes or control.
    "prompt": [311, 347, 389, 419, 457, 491, 523, 563, 601, 641, 677, 719, 757, 797, 839, 877],
    "n_predict": 1,
    "temperature": 0,
    "n_probs": 8,
    "cache_prompt": False,
    "post_sampling_probs": False,
    "stream": False,
}
_FORBIDDEN = 403
_PASSING = frozenset({408, 425, 429})
_NOT_IMPLEMENTED = 501


@dataclass(frozen=True, slots=True)
class Vector:
    """The likeliest next tokens, by id, with their logprobs: at least one, all finite."""

    logprobs: tuple[tuple[int, float], ...]

    @property
    def id(self) -> bytes:
        """32 bytes that name it: of its exact figures, so that servers which compute alike get the same name."""
        return hashlib.sha256(json.dumps(self.logprobs).encode()).digest()


@dataclass(frozen=True, slots=True)
class Refused:
    """The server cannot be asked this: it embeds only, has no such path, or tells no logprobs."""

    why: str


Heard = Vector | Refused | Unidentified | Unreachable | Silent | Loading | Locked
"""`Unidentified`: it went wrong, which says nothing of what runs there."""
Ask = Callable[[Probe], Awaitable[Heard]]


@dataclass(frozen=True, slots=True)
class Recognised:
    """What runs there, as far as can be told: 32 bytes."""

    fingerprint: bytes


Finding = Recognised | Unidentified | Unreachable | Silent | Loading | Locked


def alike(one: Vector, other: Vector, tolerance: float = TOLERANCE) -> bool:
    """Whether both may be the likeliest tokens of one model whose logprobs are off by no more than `tolerance`.

    Tokens that both hold must agree within it. At the end of the list near-ties may change places, and with them which
    token is listed at all: one that the other does not list must not be likelier, by more than `tolerance`, than the
    least likely token that the other lists. No list of a model can break that rule, however near the ties are. Half of
    the tokens at least must be in both: lists without that tell nothing, and are taken for different models.
    """
    first, second = dict(one.logprobs), dict(other.logprobs)
    shared = first.keys() & second.keys()
    if 2 * len(shared) < max(len(first), len(second)):
        return False
    if any(abs(first[token] - second[token]) > tolerance for token in shared):
        return False
    return _may_be_unlisted(first, second, tolerance) and _may_be_unlisted(second, first, tolerance)


def _may_be_unlisted(one: Mapping[int, float], other: Mapping[int, float], tolerance: float) -> bool:
    highest = min(other.values()) + tolerance
    return all(one[token] <= highest for token in one.keys() - other.keys())


def _distance(one: Vector, other: Vector) -> float:
    first, second = dict(one.logprobs), dict(other.logprobs)
    return max(abs(first[token] - second[token]) for token in first.keys() & second.keys())


@dataclass(frozen=True, slots=True)
class Known:
    """Vectors by static identity (the fingerprint of what the server shows), the one used last at the end. Pure."""

    vectors: Mapping[bytes, tuple[Vector, ...]] = field(default_factory=dict)

    def of(self, static: bytes) -> tuple[Vector, ...]:
        """The vectors of this static identity."""
        return self.vectors.get(static, ())

    def match(self, static: bytes, vector: Vector) -> Vector | None:
        """The one that `vector` is another reading of: the one used last where that fits, else the nearest."""
        # Where two models are less than two tolerances apart, a reading between them must not change sides each time.
        fitting = [kept for kept in self.of(static) if alike(kept, vector)]
        if not fitting or fitting[-1] == self.of(static)[-1]:
            return fitting[-1] if fitting else None
        return min(fitting, key=lambda kept: _distance(kept, vector))

    def used(self, static: bytes, vector: Vector) -> Known:
        """With `vector` as the one used last; the oldest go where there are too many."""
        mine = (*(kept for kept in self.of(static) if kept != vector), vector)
        others = {key: kept for key, kept in self.vectors.items() if key != static}
        return _bounded([*others.items(), (static, mine)])

    def with_older(self, older: Known) -> Known:
        """With what `older` knows besides."""
        names = [*(key for key in older.vectors if key not in self.vectors), *self.vectors]
        return _bounded(
            (key, (*(kept for kept in older.of(key) if kept not in self.of(key)), *self.of(key))) for key in names
        )

    def text(self) -> str:
        """As JSON, for `known_from`."""
        listed = [[key.hex(), [list(map(list, kept.logprobs)) for kept in mine]] for key, mine in self.vectors.items()]
        return json.dumps({"version": 1, "known": listed})


def _bounded(items: Iterable[tuple[bytes, tuple[Vector, ...]]]) -> Known:
    newest = list(items)[-MAX_IDENTITIES:]
    return Known({key: kept[-MAX_VECTORS:] for key, kept in newest})


def known_from(text: str | None) -> Known:
    """What `Known.text` wrote; nothing known where it is anything else."""
    try:
        told = json.loads(text or "")
        read = {bytes.fromhex(key): tuple(_vector(pairs) for pairs in mine) for key, mine in told["known"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return Known()
    return _bounded((key, mine) for key, mine in read.items() if mine)


def vector_in(answer: Json) -> Vector | None:
    """The vector in an answer of `/completion`; None where it tells none."""
    try:
        listed = answer["completion_probabilities"][0]["top_logprobs"]
        return _vector([(item["id"], item["logprob"]) for item in listed])
    except (ValueError, TypeError, KeyError, IndexError):
        return None


def _vector(pairs: Json) -> Vector:
    logprobs = tuple((_token(token), float(logprob)) for token, logprob in pairs)
    are_distinct = len(dict(logprobs)) == len(logprobs) > 0
    if not are_distinct or not all(math.isfinite(logprob) for _, logprob in logprobs):
        raise ValueError("no vector")
    return Vector(logprobs)


def _token(value: Json) -> int:
    if type(value) is not int:
        raise TypeError("no token id")
    return value


async def ask_llamacpp(probe: Probe) -> Heard:
    """Put the question to llama.cpp's `/completion`: one token after sixteen, nothing kept of it in the KV cache."""
    reply = await probe.within(LIMIT_S).post("/completion", _QUESTION)
    sighting = trouble(reply)
    if reply is None or sighting is None:
        vector = vector_in(reply.json) if reply is not None else None
        return Unreachable() if reply is None else vector or Refused("its answer holds no logprobs")
    match sighting:
        case Locked() if reply.status == _FORBIDDEN:
            # Whatever key is shown: llama.cpp itself says 401.
            return Refused(f"HTTP {reply.status}")
        case Unidentified() | Seen():
            passing = reply.status in _PASSING or (reply.status >= 500 and reply.status != _NOT_IMPLEMENTED)
            return _failed(f"HTTP {reply.status}") if passing else Refused(f"HTTP {reply.status}")
        case Unreachable() | Silent() | Loading() | Locked():
            return sighting
        case _:
            assert_never(sighting)


def _failed(how: str) -> Unidentified:
    return Unidentified(f"the upstream fails the check of its model: {how}; upstream.canary_s: 0 turns the check off")


class Vectors(Protocol):
    """Where known vectors outlive this process, as one text for each upstream. Neither method raises."""

    async def load(self) -> str | None:
        """The text kept last, None where there is none."""
        ...

    async def keep(self, text: str) -> None:
        """Keep it in the place of an earlier one."""
        ...


class Recogniser:
    """Finds out which of the models that show the same is running."""

    def __init__(self, vectors: Vectors | None, idle: Callable[[], bool]) -> None:
        """`idle` says whether the server works on nothing that we know of."""
        self._vectors = vectors
        self._idle = idle
        self._known = Known()
        self._complained = False

    async def recognise(self, ask: Ask, probe: Probe, static: bytes, doubt: Callable[[], None]) -> Finding:
        """What runs there. `doubt` is called as soon as it seems not to be what it was, before that is certain."""
        if self._vectors is not None:
            # Other processes learn, too.
            self._known = self._known.with_older(known_from(await self._vectors.load()))
        heard: list[Vector | Refused] = []
        while not heard or (len(heard) < ASKS and self._known.of(static)):
            if heard:
                doubt()
                await self._quiet()
            answer = await ask(probe)
            if not isinstance(answer, Vector | Refused):
                return answer
            same = self._known.match(static, answer) if isinstance(answer, Vector) else None
            if same is not None:
                return await self._recognised(static, same)
            heard.append(answer)
        return await self._settled(static, heard)

    async def _settled(self, static: bytes, heard: list[Vector | Refused]) -> Finding:
        last = heard[-1]
        if isinstance(last, Refused) and all(isinstance(answer, Refused) for answer in heard):
            self._complain(last.why)
            return Recognised(static)
        if isinstance(last, Vector) and all(isinstance(answer, Vector) and alike(answer, last) for answer in heard):
            return await self._recognised(static, last)
        return _failed("its answers differ each time")

    async def _recognised(self, static: bytes, vector: Vector) -> Recognised:
        self._complained = False
        before, self._known = self._known, self._known.used(static, vector)
        if self._vectors is not None and self._known.text() != before.text():
            await self._vectors.keep(self._known.text())
        return Recognised(hashlib.sha256(static + vector.id).digest())

    async def _quiet(self) -> None:
        for _ in range(round(PATIENCE_S / _QUIET_S)):
            if self._idle():
                return
            await asyncio.sleep(_QUIET_S)

    def _complain(self, why: str) -> None:
        if not self._complained:
            log.warning("the upstream tells no logprobs (%s): a model swapped under its name goes unnoticed", why)
        self._complained = True
