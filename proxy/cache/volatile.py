"""Whether a prompt speaks of the present, so that its answer is soon out of date. Pure but for reading its own data.

Every language's list is looked for in every prompt: taking one for volatile too often only shortens a lifetime.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from proxy.cache.language_files import raw_languages

_QUOTED = re.compile(
    r"```.*?```|`[^`]{0,500}`|\"[^\"]{0,500}\"|“[^”]{0,500}”|„[^“”]{0,500}[“”]|«[^»]{0,500}»"
    r"|「[^」]{0,500}」|『[^』]{0,500}』|(?<!\w)'[^'\n]{0,500}'(?!\w)",
    re.DOTALL,
)
_QUOTES = frozenset("`\"“„«「『'")
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_END_CHARACTERS = 10_000
"""Of longer prompts the beginning and the end are read: that is where questions stand."""


@dataclass(frozen=True, slots=True)
class _Phrases:
    """Phrases by their first word, as the words that follow it; and those of languages that set no words apart."""

    spaced: Mapping[str, tuple[tuple[str, ...], ...]]
    unspaced: tuple[str, ...]


def is_volatile(text: str) -> bool:
    """Whether the text, quotations and code left out, speaks of now, today, the latest, the weather and the like."""
    if len(text) > 2 * _END_CHARACTERS:
        text = f"{text[:_END_CHARACTERS]}\n{text[-_END_CHARACTERS:]}"
    if not _QUOTES.isdisjoint(text):
        text = _QUOTED.sub(" ", text)
    phrases = _phrases()
    words = _WORD.findall(text.lower())
    if not phrases.spaced.keys().isdisjoint(words) and _speaks(words, phrases.spaced):
        return True
    return _UNSPACED.search(text) is not None and any(phrase in text for phrase in phrases.unspaced)


def load() -> None:
    """Read the lists now, so that no call waits for the disk."""
    _phrases()


def _speaks(words: list[str], phrases: Mapping[str, tuple[tuple[str, ...], ...]]) -> bool:
    for place, word in enumerate(words, start=1):
        for rest in phrases.get(word, ()):
            if tuple(words[place : place + len(rest)]) == rest:
                return True
    return False


@functools.cache
def _phrases() -> _Phrases:
    spaced: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    unspaced: list[str] = []
    for language in raw_languages().values():
        if language["spaces"] != "true":
            # Where words are not set apart, a phrase counts anywhere.
            unspaced.extend(language["volatile"])
            continue
        for phrase in language["volatile"]:
            first, *rest = _WORD.findall(phrase.lower())
            spaced[first].append(tuple(rest))
    return _Phrases({first: tuple(rests) for first, rests in spaced.items()}, tuple(unspaced))
