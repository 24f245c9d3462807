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

_MARKS = ".!?。؟।…、,،"
_BREAK = r"\s*[,、.!。:;~…،।]+\s*"
_TAIL_BREAK = r"\s*[,、.!?。:;~…،؟।]+\s*"
_ROUNDS = 4
_LOOSE_MARKS = frozenset("?! \t\n" + "\uff1f\uff01\u061f")
_LONGEST_COURTESY = 80
_CLOSING = frozenset("\"'»)]" + "\u201d\u2019\uff09\u300d\u300f")
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af].{3}", re.DOTALL)
_QUESTION = frozenset("?؟")
# Combining marks belong to their word: \w knows none of them.
_WORD = re.compile(r"[^\s!-/:-@\[-`{-~¡¿。、؟،।…]+")


@dataclass(frozen=True, slots=True)
class Strict:
    """`text` is what is compared.

    `mark` is "?" or "." or "" for what it ended with; `asks` says that its words alone make it a question.
    """

    text: str
    mark: str
    asks: bool


class StrictForm:
    """Makes the strict form of texts; knows the courtesies and operations of all languages."""

    def __init__(self, languages: Languages) -> None:
        """Learn the lists."""
        lead, tail = _any(languages.lead), _any(languages.tail)
        unspaced_lead, unspaced_tail = _any(languages.unspaced_lead), _any(languages.unspaced_tail)
        self._lead = re.compile(rf"\A(?:(?:{lead}){_BREAK}|(?:{unspaced_lead})(?:{_BREAK}|\s))", re.IGNORECASE)
        joined, before = _any(languages.joined_lead), _any(languages.joined_lead_before)
        self._joined = re.compile(rf"\A(?:(?:{joined})(?![题題])|(?:{before})(?=[{languages.joined_before}]))")
        self._tail = re.compile(
            rf"(?:(?P<mark>{_TAIL_BREAK})(?:{tail})|(?P<space>{_TAIL_BREAK}|\s)(?:{unspaced_tail}))\Z", re.IGNORECASE
        )
        self._questions = languages.questions
        self._unspaced_questions = languages.unspaced_questions
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
            return Strict(unicodedata.normalize("NFC", text).strip(), "", asks=False)
        bare, mark = _without_mark(self._without_lead(whole).lstrip("¿¡"))
        for _ in range(_ROUNDS):
            # Courtesy is short: looking at the end of a text finds it.
            start = max(0, len(bare) - _LONGEST_COURTESY)
            found = self._tail.search(bare, start)
            if not found or not _says_something(bare[: found.start()]):
                break
            bare, mark = bare[: found.start()], _mark(found.group("mark") or found.group("space"))
        # Nothing but courtesy: then it is what is said.
        return Strict(bare, mark, self._is_question(bare)) if bare else Strict(whole, "", asks=False)

    def _without_lead(self, whole: str) -> str:
        for _ in range(_ROUNDS):
            found = self._lead.match(whole)
            if not found or not _says_something(whole[found.end() :]):
                break
            whole = whole[found.end() :]
        return self._joined.sub("", whole)

    def _is_question(self, text: str) -> bool:
        words = _WORD.findall(text[:_LONGEST_COURTESY].lower())[:2]
        return not self._questions.isdisjoint(words) or any(word in text for word in self._unspaced_questions)

    def _works_on_itself(self, whole: str) -> bool:
        words = _WORD.findall(whole.lower())
        for at, word in enumerate(words):
            for phrase in self._operations.get(word, ()):
                if tuple(words[at : at + len(phrase)]) == phrase:
                    return True
        return not whole.isascii() and any(phrase in whole for phrase in self._unspaced_operations)


def _says_something(text: str) -> bool:
    # "Great, thanks!" thanks for something great, and "Hey, Jude" is a song.
    text = text.strip()
    return text.count(" ") >= 2 or (not text.isascii() and _UNSPACED.search(text) is not None)


def _without_mark(text: str) -> tuple[str, str]:
    """The text without the marks that end it, and what they say; behind a space or a symbol they are no punctuation."""
    bare = text.rstrip(_MARKS + " \t\n")
    ending = text[len(bare) :]
    if not bare or not (bare[-1].isalnum() or bare[-1] in _CLOSING or unicodedata.category(bare[-1])[0] == "M"):
        return text, ""
    if ending[:1].isspace() and not set(ending) <= _LOOSE_MARKS:
        return text, ""
    # 5! is no exclamation.
    if "!" in ending and bare[-1].isdigit():
        return text, ""
    return bare, _mark(ending)


def _any(phrases: Iterable[str]) -> str:
    return "|".join(map(re.escape, phrases)) or r"(?!)"


def _mark(ending: str) -> str:
    said = ending.strip(" ,、،\t\n")
    return "?" if not _QUESTION.isdisjoint(said) else "." if said else ""
