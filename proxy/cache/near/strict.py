"""The strict rule, for all languages without rules of their own: nothing may differ but what is safe everywhere. Pure.

That is the typography of the characters, white space, listed courtesy set off at the ends, and the final full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from proxy.cache.near.languages import Languages
from proxy.cache.near.tokens import collapse, fold_typography

_FINAL = re.compile(r"[\s.!?。؟।…、,،]+\Z")
_BREAK = r"\s*[,、.!。:;~…،।]+\s*"
_TAIL_BREAK = r"\s*[,、.!?。:;~…،؟।]+\s*"
_QUESTION = frozenset("?؟")
# Combining marks belong to their word: \w knows none of them.
_WORD = re.compile(r"[^\s!-/:-@\[-`{-~¡¿。、؟،।…]+")


@dataclass(frozen=True, slots=True)
class Strict:
    """`text` is what is compared; `mark` is "?" or "." or "" for what it ended with."""

    text: str
    mark: str


class StrictForm:
    """Makes the strict form of texts; knows the courtesies and operations of all languages."""

    def __init__(self, languages: Languages) -> None:
        """Learn the lists."""
        lead, tail = _any(languages.lead), _any(languages.tail)
        unspaced_lead, unspaced_tail = _any(languages.unspaced_lead), _any(languages.unspaced_tail)
        self._lead = re.compile(rf"\A(?:(?:{lead}){_BREAK}|(?:{unspaced_lead})(?:{_BREAK}|\s))+", re.IGNORECASE)
        self._joined = re.compile(rf"\A(?:{_any(languages.joined_lead)})(?![{languages.never_joined}])")
        self._tail = re.compile(
            rf"(?:(?P<mark>{_TAIL_BREAK})(?:{tail})|(?P<space>{_TAIL_BREAK}|\s)(?:{unspaced_tail}))\Z", re.IGNORECASE
        )
        self._operations: dict[str, list[tuple[str, ...]]] = {}
        for phrase in languages.payload:
            words = tuple(_WORD.findall(phrase))
            if words:
                self._operations.setdefault(words[0], []).append(words)
        self._unspaced_operations = languages.unspaced_payload

    def of(self, text: str) -> Strict:
        """The strict form of a text."""
        whole = collapse(fold_typography(text))
        if self._works_on_itself(whole):
            return Strict(unicodedata.normalize("NFC", text).strip(), "")
        mark, bare = _mark(whole), _FINAL.sub("", self._joined.sub("", self._lead.sub("", whole).lstrip("¿¡")))
        while (found := self._tail.search(bare)) and _says_something(bare[: found.start()]):
            bare, mark = bare[: found.start()], _mark(found.group("mark") or found.group("space"))
        # Nothing but courtesy: then it is what is said.
        return Strict(bare, mark) if bare else Strict(whole, "")

    def _works_on_itself(self, whole: str) -> bool:
        words = _WORD.findall(whole.lower())
        for at, word in enumerate(words):
            for phrase in self._operations.get(word, ()):
                if tuple(words[at : at + len(phrase)]) == phrase:
                    return True
        return not whole.isascii() and any(phrase in whole for phrase in self._unspaced_operations)


def _says_something(text: str) -> bool:
    # "Great, thanks!" thanks for something great.
    return " " in text.strip() or not text.isascii()


def _any(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, phrases)) or r"(?!)"


def _mark(text: str) -> str:
    found = _FINAL.search(text)
    end = found.group(0).strip(" ,、،") if found else ""
    return "?" if not _QUESTION.isdisjoint(end) else "." if end else ""
