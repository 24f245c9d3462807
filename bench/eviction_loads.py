"""Logs of calls to replay: read from files, or made up, the same ones each time."""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from statistics import NormalDist

from bench.eviction_policies import Call
from bench.requests import Request

_SEED = 20
_LENGTH = 4000
_QUESTIONS = 1000
_VERBATIM = 0.5
_WORDINGS = 5
_TOKENS_PER_S = 8.0
_PREFILL_S = 2.0
_BYTES_PER_TOKEN = 5
_ENVELOPE = 300
_SPREAD = 1.0
_SHORTEST, _LONGEST = 4, 2000
_SOON = 200


@dataclass(frozen=True, slots=True)
class Topic:
    """What shares namespace, model and system prompt. `tokens`: median length of its answers."""

    name: str = "all"
    tokens: float = 100.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in a topic."""

    request: Request
    topic: Topic


Load = Sequence[Asked]
"""Requests in their order."""


def timed(load: Load, span: float, *, near: bool) -> list[Call]:
    """The calls of a load that is spread evenly over `span` seconds; `near`: another wording is a hit as well."""
    calls: list[Call] = []
    following: dict[str, float] = {}
    for index in range(len(load) - 1, -1, -1):
        request, topic = load[index].request, load[index].topic
        key = f"{topic.name}|{request.cls if near else request.prompt}"
        tokens = _tokens(f"{topic.name}|{request.cls}", topic.tokens)
        at = span * index / len(load)
        calls.append(
            Call(
                key,
                topic.name,
                at,
                _PREFILL_S + tokens / _TOKENS_PER_S,
                _ENVELOPE + tokens * _BYTES_PER_TOKEN,
                following.get(key, math.inf),
            )
        )
        following[key] = at
    return calls[::-1]


@cache
def _tokens(cls: str, middle: float) -> int:
    """The length of an answer: drawn from a log-normal distribution, always the same for the same class."""
    digest = hashlib.blake2b(cls.encode(), digest_size=8).digest()
    chance = (int.from_bytes(digest, "big") + 0.5) / 2**64
    length = middle * math.exp(_SPREAD * NormalDist().inv_cdf(chance))
    return round(min(max(length, _SHORTEST), _LONGEST))


def in_one_topic(requests: Iterable[Request]) -> Load:
    """A log that says nothing of topics."""
    topic = Topic()
    return [Asked(request, topic) for request in requests]


def made_up() -> dict[str, Load]:
    """One load for each thing that a policy may be bad at."""
    makers: dict[str, Callable[[random.Random], Iterator[Asked]]] = {
        "zipf": _zipf,
        "shift": _shift,
        "daily": _daily,
        "scan": _scan,
        "flood": _flood,
        "twice": _twice,
        "clock": _clock,
        "dated": _dated,
        "many": _many,
        "moving": _moving,
    }
    return {name: list(maker(random.Random(f"{_SEED} {name}"))) for name, maker in makers.items()}


class _Popular:
    """Questions of a topic, of which a few are asked far oftener than the rest (Zipf)."""

    def __init__(self, chance: random.Random, topic: Topic, questions: int, exponent: float = 0.9) -> None:
        self._chance, self._topic = chance, topic
        self._order = list(range(questions))
        self._weights = list(accumulate(rank**-exponent for rank in range(1, questions + 1)))
        self.shuffle()

    def shuffle(self) -> None:
        """Other questions become the popular ones."""
        self._chance.shuffle(self._order)

    def asked(self) -> Asked:
        (question,) = self._chance.choices(self._order, cum_weights=self._weights)
        wording = 0 if self._chance.random() < _VERBATIM else self._chance.randrange(_WORDINGS)
        return Asked(Request(f"question {question}, wording {wording}", f"question {question}"), self._topic)


def _once(topic: Topic, number: int) -> Asked:
    return Asked(Request(f"once {number}", f"once {number}"), topic)


def _zipf(chance: random.Random) -> Iterator[Asked]:
    """Popularity that stays."""
    popular = _Popular(chance, Topic(), _QUESTIONS)
    for _ in range(_LENGTH):
        yield popular.asked()


def _shift(chance: random.Random) -> Iterator[Asked]:
    """Half-way other questions become popular."""
    popular = _Popular(chance, Topic(), _QUESTIONS)
    for index in range(_LENGTH):
        if index == _LENGTH // 2:
            popular.shuffle()
        yield popular.asked()


def _daily(chance: random.Random) -> Iterator[Asked]:
    """Two sets of questions take turns, three times each."""
    sets = [_Popular(chance, Topic(), _QUESTIONS) for _ in range(2)]
    for index in range(_LENGTH):
        yield sets[index * 6 // _LENGTH % 2].asked()


def _scan(chance: random.Random) -> Iterator[Asked]:
    """Three runs of questions that nobody repeats, each a tenth of all, in the same topic."""
    popular = _Popular(chance, Topic(), _QUESTIONS)
    for index in range(_LENGTH):
        tenth = index * 10 // _LENGTH
        yield _once(Topic(), index) if tenth in (2, 5, 8) else popular.asked()


def _flood(chance: random.Random, *, again: float = 0.0) -> Iterator[Asked]:
    """A batch job with long answers that nobody repeats, beside a voice assistant and home automation.

    It runs in two bursts and asks nine times as often as both others. It asks the share `again` once more, soon after.
    """
    voice = _Popular(chance, Topic("voice", 25), 200)
    home = _Popular(chance, Topic("home", 40), 100)
    batch = Topic("batch", 300)
    soon: deque[tuple[int, Asked]] = deque()
    for index in range(2 * _LENGTH):
        if index * 5 // (2 * _LENGTH) not in (1, 3) or chance.random() < 0.1:
            yield (voice if chance.random() < 0.6 else home).asked()
        elif soon and soon[0][0] <= index:
            yield soon.popleft()[1]
        else:
            fresh = _once(batch, index)
            if chance.random() < again:
                soon.append((index + _SOON, fresh))
            yield fresh


def _twice(chance: random.Random) -> Iterator[Asked]:
    """The same, where the batch job asks half of its prompts a second time, 200 calls later."""
    yield from _flood(chance, again=0.5)


def _clock(chance: random.Random) -> Iterator[Asked]:
    """Half of the calls have the time in their system prompt: each is a topic of its own and never comes again."""
    popular = _Popular(chance, Topic(), _QUESTIONS // 2)
    for index in range(_LENGTH):
        yield _once(Topic(f"clock {index}"), index) if chance.random() < 0.5 else popular.asked()


def _dated(chance: random.Random) -> Iterator[Asked]:
    """The system prompt has the date: six topics, one after the other, and none of them comes again."""
    for day in range(6):
        popular = _Popular(chance, Topic(f"day {day}"), _QUESTIONS // 4)
        for _ in range(_LENGTH // 6):
            yield popular.asked()


def _many(chance: random.Random, *, periods: int = 1) -> Iterator[Asked]:
    """Thirty topics, some busier than others, with answers from short to long."""
    topics = [_Popular(chance, Topic(f"topic {n}", 20 * 1.15**n), _QUESTIONS // 25) for n in range(30)]
    busy = list(accumulate(1 / rank for rank in range(1, 31)))
    for _ in range(periods):
        for _ in range(_LENGTH // min(periods, 2)):
            (popular,) = chance.choices(topics, cum_weights=busy)
            yield popular.asked()
        chance.shuffle(topics)
        for popular in topics:
            popular.shuffle()


def _moving(chance: random.Random) -> Iterator[Asked]:
    """The same in four periods, each with other busy topics and other popular questions."""
    yield from _many(chance, periods=4)
