"""The three ways to replay rows: each pair alone, all pairs in one cache, a log in its order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from proxy.cache.near.matcher import Judged, Matcher
from proxy.evaluate.labels import Labels
from proxy.evaluate.rows import Logged, Origin, Pair, Question
from proxy.evaluate.world import Found, open_world, small_world

Tick = Callable[[], None]
"""Called after each step, for whoever watches."""


class Form(StrEnum):
    """How rows are replayed.

    PAIR: each `a` alone in a cache, `b` is looked up. REPLAY: every `a` is stored first, then every `b` is looked up.
    TRACE: requests in their order, where every miss is stored.
    """

    PAIR = "pair"
    REPLAY = "replay"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One look-up.

    `stored` is the prompt of the entry that answered; after a miss, of an entry that should have, None where there is
    none. `positive` says that some entry's answer was right, `right` that this one's was. `judged` is what the near
    tier said of `stored`, None where it was not asked or did not come across it.
    """

    origin: Origin
    asked: Question
    stored: Question | None
    found: Found
    judged: Judged | None
    positive: bool
    right: bool

    @property
    def hit(self) -> bool:
        """Whether an entry answered."""
        return self.found.key is not None

    @property
    def false(self) -> bool:
        """Whether an entry answered whose answer is wrong."""
        return self.hit and not self.right

    @property
    def missed(self) -> bool:
        """Whether no entry answered though one should have."""
        return self.positive and not self.hit


async def pair_form(pairs: Sequence[Pair], matcher: Matcher, threshold: float, tick: Tick) -> AsyncIterator[Outcome]:
    """Look up each `b` where only its `a` is stored; the label of the pair itself counts, also for equal texts."""
    for pair in pairs:
        world = await small_world(pair.a, matcher, threshold)
        found = await world.look_up(pair.b)
        right = {pair.a.digest} if pair.same else set[bytes]()
        expected = pair.a if pair.same else None
        yield _outcome(pair.origin, pair.b, found, {pair.a.digest: pair.a}, expected, partial(_is_among, right))
        tick()


async def replay_form(pairs: Sequence[Pair], matcher: Matcher, threshold: float, tick: Tick) -> AsyncIterator[Outcome]:
    """Store every `a`, then look up every `b` among them; see `Labels` for what is right."""
    labels = Labels(pairs)
    entries = {pair.a.digest: pair.a for pair in pairs}
    async with open_world(matcher, threshold) as world:
        for entry in entries.values():
            await world.add(entry)
            tick()
        await world.settle()
        for pair in pairs:
            found = await world.look_up(pair.b)
            is_right = partial(labels.is_right, asked=pair.b)
            yield _outcome(pair.origin, pair.b, found, entries, labels.right_entry(pair.b), is_right)
            tick()


async def trace_form(log: Sequence[Logged], matcher: Matcher, threshold: float, tick: Tick) -> AsyncIterator[Outcome]:
    """Look up each request and store it where nothing answers."""
    entries: dict[bytes, Question] = {}
    answered: dict[str, set[bytes]] = defaultdict(set)
    latest: dict[str, Question] = {}
    async with open_world(matcher, threshold) as world:
        for logged in log:
            asked, answer = logged.asked, logged.answer
            found = await world.look_up(asked)
            is_right = partial(_is_among, answered[answer])
            yield _outcome(logged.origin, asked, found, entries, latest.get(answer), is_right)
            if found.key is None:
                await world.add(asked)
                entries[asked.digest] = latest[answer] = asked
                answered[answer].add(asked.digest)
            tick()


def _outcome(
    origin: Origin,
    asked: Question,
    found: Found,
    entries: Mapping[bytes, Question],
    expected: Question | None,
    is_right: Callable[[Question], bool],
) -> Outcome:
    """`expected` is an entry whose answer is right, None where there is none."""
    if found.key is not None:
        judged = found.nearest.found if found.nearest else None
        stored = entries[found.key]
        return Outcome(origin, asked, stored, found, judged, expected is not None, is_right(stored))
    known = found.nearest.judged if found.nearest and expected else ()
    # Of those that should have answered, the one that came closest tells best why it did not.
    closest = max((one for one in known if is_right(entries[one.candidate.key])), key=_score, default=None)
    stored_or_none = expected if closest is None else entries[closest.candidate.key]
    return Outcome(origin, asked, stored_or_none, found, closest, expected is not None, right=False)


def _is_among(digests: set[bytes], entry: Question) -> bool:
    return entry.digest in digests


def _score(judged: Judged) -> float:
    return judged.score
