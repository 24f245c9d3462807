"""The near look-up: equal forms first, then sketches; the guard decides, and what was called wrong never matches."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Protocol

from proxy.cache.near.guard import Rule, Verdict
from proxy.cache.near.matcher import LONG_TEXT, Judged, Matcher
from proxy.cache.near.prompt import Prompt
from storage.base import Candidate, Sketch

_EQUAL_LIMIT = 8
_SIMILAR_LIMIT = 20
_PER_KEY = 32
_FEW = 4
_AT_ONCE = 3
"""Candidates judged before others get their turn; each may take half a millisecond."""


class Step(StrEnum):
    """What found a candidate: equal forms, or a sketch that is alike."""

    KEY = "key"
    SKETCH = "sketch"


class Findable(Protocol):
    """What the tier needs of storage; neither ever raises."""

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """Fresh entries of this space that share a key, those that share most first."""
        ...

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """Whether one of the pairs was called wrong, or that cannot be told now."""
        ...


@dataclass(frozen=True, slots=True)
class Nearest:
    """What a look-up came to: the entry that may answer, all that were judged, and the sketch of what was asked."""

    found: Judged | None
    step: Step | None
    judged: tuple[Judged, ...]
    sketch: Sketch

    @property
    def deciding(self) -> Judged | None:
        """The candidate that tells most about the outcome: the one found, else the most similar one."""
        return self.found or max(self.judged, key=lambda one: one.score, default=None)


class NearTier:
    """Finds the stored prompt that asks the same."""

    def __init__(self, store: Findable, matcher: Matcher) -> None:
        """Look in `store` with the lists of `matcher`."""
        self._store = store
        self.matcher = matcher

    async def find(self, space: bytes, namespace: bytes, words: str, *, threshold: float, now_ms: int) -> Nearest:
        """The nearest entry of `space` whose answer is right for `words`, fresh at `now_ms`.

        `threshold` is the least Jaccard similarity of what the guard is shown; equal forms count as 1.0.
        """
        prompt = await self.prepare(words)
        matcher = self.matcher
        equal = matcher.equal_keys(prompt, space)
        candidates = await self._store.candidates(space, equal, now_ms, per_key=_EQUAL_LIMIT, limit=_EQUAL_LIMIT)
        judged = await self._judge(prompt, words, namespace, candidates, threshold)
        if judged and judged[-1].verdict.same:
            return Nearest(judged[-1], Step.KEY, judged, Sketch(matcher.scheme, prompt.skeleton, equal))
        bands = matcher.band_keys(prompt, space)
        sketch = Sketch(matcher.scheme, prompt.skeleton, (*equal, *bands))
        if not bands:
            return Nearest(None, None, judged, sketch)
        seen = {one.candidate.key for one in judged}
        similar = await self._store.candidates(space, bands, now_ms, per_key=_PER_KEY, limit=_SIMILAR_LIMIT)
        fresh = [candidate for candidate in similar if candidate.key not in seen]
        more = await self._judge(prompt, words, namespace, fresh, threshold)
        found = more[-1] if more and more[-1].verdict.same else None
        return Nearest(found, Step.SKETCH if found else None, (*judged, *more), sketch)

    async def sketch(self, words: str, space: bytes) -> Sketch:
        """What an entry with these words is found by."""
        return self.matcher.sketch(await self.prepare(words), space)

    async def _is_vetoed(self, namespace: bytes, asked: Prompt, stored: Prompt) -> bool:
        either = (alone(namespace, asked.plain), alone(namespace, stored.plain))
        return await self._store.vetoed((*pairs(namespace, asked, stored), *either))

    async def prepare(self, words: str) -> Prompt:
        """The prompt; long ones in a thread, so that nobody else waits."""
        if len(words) > LONG_TEXT:
            return await asyncio.to_thread(self._prepare_all, words)
        return self.matcher.prepare(words)

    def _prepare_all(self, words: str) -> Prompt:
        prompt = self.matcher.prepare(words)
        # What is made when first asked for is made here, too.
        prompt.digests()
        return prompt

    async def _judge(
        self, prompt: Prompt, words: str, namespace: bytes, candidates: Sequence[Candidate], threshold: float
    ) -> tuple[Judged, ...]:
        """The candidates judged in turn, up to the first that may answer, which is the last."""
        judged: list[Judged] = []
        if not candidates:
            return ()
        in_order = self.matcher.judge(prompt, candidates, threshold)
        if sum(len(candidate.words) for candidate in candidates) > 2 * LONG_TEXT:
            # Of long prompts, the most alike are told apart by a detail or are the same: a few will do.
            most = _FEW if len(words) > LONG_TEXT else len(candidates)
            in_order = iter(await asyncio.to_thread(list, islice(in_order, most)))
        for one in in_order:
            if len(judged) >= _AT_ONCE:
                await asyncio.sleep(0)
            if one.stored is not None and one.verdict.same and await self._is_vetoed(namespace, prompt, one.stored):
                judged.append(replace(one, verdict=Verdict(same=False, rule=Rule.VETOED)))
                continue
            judged.append(one)
            if one.verdict.same:
                break
        return tuple(judged)


def pairs(namespace: bytes, asked: Prompt, stored: Prompt) -> tuple[bytes, bytes]:
    """Under which names the pair may be called wrong: as it stands, and in canonical form."""
    text = _pair(namespace, b"text", asked.plain, stored.plain)
    forms = (f"{prompt.language} {prompt.canonical}" for prompt in (asked, stored))
    return text, _pair(namespace, b"form", *forms)


def alone(namespace: bytes, plain: str) -> bytes:
    """The name under which a prompt, in its plain form, is called wrong for whatever it may be near to."""
    return _pair(namespace, b"alone", plain, "")


def _pair(namespace: bytes, kind: bytes, a: str, b: str) -> bytes:
    ends = sorted(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (a, b))
    return hashlib.sha256(b"\n".join((kind, namespace, *ends))).digest()
