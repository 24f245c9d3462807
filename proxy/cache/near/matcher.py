"""Everything that comparing prompts takes, loaded once: lists, dictionaries, permutations. Pure after loading."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from proxy.cache.near.guard import Guard, Rule, Verdict
from proxy.cache.near.languages import languages
from proxy.cache.near.lexicon import load_lexicon
from proxy.cache.near.prompt import NORMALISER, Prompt, Prompts
from proxy.cache.near.sketch import Sketcher, jaccard, shingles
from storage.base import Candidate, Sketch

MOST_TOKENS = 400
"""Longer prompts are found by equal forms only: there one changed detail is the worst case, and cost grows."""
LONG_TEXT = 800
"""Characters from which preparing takes milliseconds: not in the event loop."""
LONGEST_TEXT = 20_000
"""Longer words are left to the exact tier."""

_REMEMBERED = 2048
_MOST_WORDS_CHANGED = 8
"""More than the guard's most edits can change."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate with its similarity (Jaccard, 1.0 for equal forms) and the guard's verdict.

    `stored` is its prompt, where the guard was shown it.
    """

    candidate: Candidate
    score: float
    verdict: Verdict
    stored: Prompt | None = None


class Matcher:
    """Prepares prompts, sketches them and judges candidates."""

    def __init__(self, prompts: Prompts, guard: Guard, sketcher: Sketcher) -> None:
        """Use what `load` made."""
        self._prompts = prompts
        self._guard = guard
        self._sketcher = sketcher
        self._known: OrderedDict[str, Prompt] = OrderedDict()

    @property
    def scheme(self) -> int:
        """What sketches made here are marked with; others are never compared."""
        return self._sketcher.scheme

    @property
    def description(self) -> str:
        """The scheme in words."""
        return self._sketcher.description

    def prepare(self, text: str) -> Prompt:
        """The prompt, remembered for a while."""
        prompt = self._known.get(text)
        if prompt is None:
            prompt = self._prompts.prepare(text)
            if len(text) <= LONG_TEXT:
                self._known[text] = prompt
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        return prompt

    def equal_keys(self, prompt: Prompt, space: bytes) -> tuple[int, ...]:
        """Keys that prompts of equal forms share."""
        return self._sketcher.digest_keys(prompt.digests(), space)

    def band_keys(self, prompt: Prompt, space: bytes) -> tuple[int, ...]:
        """Keys of which similar prompts share some; none where the prompt is too long for them."""
        return self._sketcher.band_keys(prompt.skeleton, space) if prompt.size <= MOST_TOKENS else ()

    def sketch(self, prompt: Prompt, space: bytes) -> Sketch:
        """What the prompt is found by."""
        keys = (*self.equal_keys(prompt, space), *self.band_keys(prompt, space))
        return Sketch(self.scheme, prompt.skeleton, keys)

    def judge(self, asked: Prompt, candidates: Iterable[Candidate], threshold: float) -> Iterator[Judged]:
        """The candidates with their verdicts, the most similar first; each is judged when it is asked for.

        Those below `threshold` are not shown to the guard.
        """
        words, mine = frozenset(asked.skeleton.split()), shingles(asked.skeleton)
        scored = [(_score(asked.skeleton, words, mine, candidate.skeleton), candidate) for candidate in candidates]
        scored.sort(key=lambda pair: -pair[0])
        for score, candidate in scored:
            yield self._judged(asked, candidate, score, threshold)

    def _judged(self, asked: Prompt, candidate: Candidate, score: float, threshold: float) -> Judged:
        stored = None if score < threshold else self.prepare(candidate.words)
        if stored is None:
            return Judged(candidate, score, Verdict(same=False, rule=Rule.SCORE))
        if stored.strict == asked.strict:
            score = 1.0
        return Judged(candidate, score, self._guard.compare(asked, stored), stored)


def _score(skeleton: str, words: frozenset[str], mine: set[str], theirs: str) -> float:
    """The Jaccard similarity of shingles; of words, where these differ more than any guard lets pass.

    Nearly all candidates of a large space are of the second kind, and comparing words is ten times as fast.
    """
    if theirs == skeleton:
        return 1.0
    others = frozenset(theirs.split())
    shared = len(words & others)
    if max(len(words), len(others)) - shared > _MOST_WORDS_CHANGED:
        return shared / (len(words) + len(others) - shared)
    return jaccard(mine, shingles(theirs))


@functools.cache
def _parts() -> tuple[Prompts, Guard, Sketcher]:
    lists = languages()
    lexicons = {
        code: load_lexicon(code, rules.function_words | rules.real_words, rules.inflections)
        for code, rules in lists.rules.items()
    }
    sizes = ", ".join(f"{code} {len(lexicon)} words" for code, lexicon in sorted(lexicons.items()))
    normaliser = f"normaliser {NORMALISER}, lists {lists.digest}, pyspellchecker {version('pyspellchecker')} ({sizes})"
    return Prompts(lists, lexicons), Guard(lexicons), Sketcher(normaliser)


def load() -> Matcher:
    """Read lists and dictionaries and import datasketch: nearly two seconds once, so never in the event loop."""
    return Matcher(*_parts())
