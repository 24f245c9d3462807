"""Which words a language has: pyspellchecker's lists, as sorted hashes in 8 bytes a word instead of a dictionary."""

from __future__ import annotations

import gzip
import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from itertools import chain

import numpy

_WORD = re.compile(rb'"((?:[^"\\]|\\.)+)":')


class Lexicon:
    """A set of words that cannot be listed, only asked."""

    def __init__(self, words: Iterable[str]) -> None:
        """Know these words, in lower case."""
        # Two words with one hash of 64 bits are not to be expected among a few hundred thousand. NumPy sorts them
        # without holding up other threads, which `sorted` would for a tenth of a second.
        hashes = numpy.unique(numpy.fromiter(map(hash, words), dtype=numpy.int64))
        self._hashes = array("q", hashes.tobytes())

    def __contains__(self, word: str) -> bool:
        """Whether the word is known."""
        sought = hash(word)
        at = bisect_left(self._hashes, sought)
        return at < len(self._hashes) and self._hashes[at] == sought

    def __len__(self) -> int:
        """How many words are known."""
        return len(self._hashes)


def load_lexicon(language: str, more: Iterable[str], inflections: Mapping[str, Sequence[str]]) -> Lexicon:
    """The list of a language (code as in "en"), with `more` words and inflected forms that it lacks.

    `inflections` has the endings that take the place of an ending. Takes about half a second: not in the loop.
    """
    packed = (resources.files("spellchecker") / "resources" / f"{language}.json.gz").read_bytes()
    text = gzip.decompress(packed)
    # Read word by word: as a dictionary it would take 30 MB for a moment, and the interpreter for a tenth of a second.
    words = (_decoded(match.group(1)) for match in _WORD.finditer(text))
    return Lexicon(chain(_inflected(words, inflections), more))


def _inflected(words: Iterable[str], inflections: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for word in words:
        yield word
        for ending, forms in inflections.items():
            if word.endswith(ending):
                stem = word.removesuffix(ending)
                yield from (stem + form for form in forms)


def _decoded(quoted: bytes) -> str:
    return json.loads(b'"%b"' % quoted) if b"\\" in quoted else quoted.decode("utf-8")
