"""What the language files say of the near tier."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.cache.language_files import raw_languages
from proxy.cache.near.slips import SHORTEST_SLIP

Phrase = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fillers:
    """`words` may come and go after one of `after`, `adverbs` after one of `adverbs_after`, `sounds` by themselves."""

    words: frozenset[str]
    after: frozenset[str]
    adverbs: frozenset[str]
    adverbs_after: frozenset[str]
    sounds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Articles:
    """Where an article may come and go; see the comments in en.yaml."""

    words: frozenset[str]
    indefinite: frozenset[str]
    swap_after: frozenset[str]
    after: frozenset[str]
    never_after: frozenset[str]
    unless_next: frozenset[str]
    unless_alone: frozenset[str]
    unless_last: frozenset[str]
    before_number: frozenset[str]
    after_if_of: frozenset[str]
    of: frozenset[str]


@dataclass(frozen=True, slots=True)
class Courtesy:
    """Phrases that ask nothing, longest first, by their first word (`tail`: by their last)."""

    lead: Mapping[str, tuple[Phrase, ...]]
    lead_before_request: Mapping[str, tuple[Phrase, ...]]
    lead_set_off: frozenset[str]
    you: frozenset[str]
    assistant_verbs: frozenset[str]
    device_verbs: frozenset[str]
    lead_words: frozenset[str]
    lead_courtesy: frozenset[str]
    telling: frozenset[str]
    tail: Mapping[str, tuple[Phrase, ...]]
    tail_words: frozenset[str]
    tail_courtesy: frozenset[str]
    tail_not_after: frozenset[str]


@dataclass(frozen=True, slots=True)
class Payload:
    """Words that say that a prompt works on its own wording, as phrases by their first word; `frame` goes with them.

    The name of one of `languages` after one of `into` is such a word, too. `slips` has the longer ones by letter.
    """

    text: Mapping[str, tuple[Phrase, ...]]
    leading: frozenset[str]
    word: Mapping[str, tuple[Phrase, ...]]
    title: Mapping[str, tuple[Phrase, ...]]
    frame: frozenset[str]
    languages: frozenset[str]
    into: frozenset[str]
    slips: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Rules:
    """What may differ between two prompts in one language, and the names of what may not."""

    code: str
    signs: str
    function_words: frozenset[str]
    fillers: Fillers
    articles: Articles
    courtesy: Courtesy
    payload: Payload
    request: frozenset[str]
    heads: Mapping[Phrase, Phrase]
    spellings: Mapping[str, str]
    contractions: Mapping[str, Phrase]
    contracted_endings: Mapping[str, str]
    prepositions: frozenset[str]
    unaccented_questions: frozenset[str]
    accent_free: frozenset[str]
    negations: frozenset[str]
    antonyms: frozenset[tuple[str, str]]
    units: frozenset[str]
    capitals_say_nothing: frozenset[str]
    joined: frozenset[str]
    thousands: str
    modals: frozenset[str]
    determiners: frozenset[str]
    statements: frozenset[str]
    heads_never_before: frozenset[str]
    clause_openers: frozenset[str]
    real_words: frozenset[str]
    inflections: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Languages:
    """All languages: `rules` by code where there are any, and what the strict rule needs of the others."""

    rules: Mapping[str, Rules]
    function_words: Mapping[str, frozenset[str]]
    lead: tuple[str, ...]
    tail: tuple[str, ...]
    unspaced_lead: tuple[str, ...]
    unspaced_tail: tuple[str, ...]
    joined_lead: tuple[str, ...]
    joined_lead_before: tuple[str, ...]
    joined_before: str
    questions: frozenset[str]
    unspaced_questions: tuple[str, ...]
    payload: tuple[str, ...]
    unspaced_payload: tuple[str, ...]
    digest: str


@functools.cache
def languages() -> Languages:
    """The lists, read once."""
    raw = raw_languages()
    rules = {code: _rules(code, file) for code, file in raw.items() if "heads" in file}
    spaced = [file for file in raw.values() if file["spaces"] == "true"]
    unspaced = [file for file in raw.values() if file["spaces"] != "true"]
    return Languages(
        rules=rules,
        function_words={code: frozenset(file.get("function_words", ())) for code, file in raw.items()},
        lead=_longest(phrase for file in spaced for phrase in _courtesy(file, "lead")),
        tail=_longest(phrase for file in spaced for phrase in _courtesy(file, "tail")),
        unspaced_lead=_longest(phrase for file in unspaced for phrase in _courtesy(file, "lead")),
        unspaced_tail=_longest(phrase for file in unspaced for phrase in _courtesy(file, "tail")),
        joined_lead=_longest(phrase for file in unspaced for phrase in _courtesy(file, "lead_joined")),
        joined_lead_before=_longest(p for file in unspaced for p in _courtesy(file, "lead_joined_before")),
        joined_before="".join(sorted({char for file in unspaced for char in file.get("joined_before", "")})) or "\x00",
        questions=frozenset(word for file in spaced for word in _questions(file)),
        unspaced_questions=_longest(word for file in unspaced for word in _questions(file)),
        payload=_longest(word for file in spaced for word in _payload_words(file)),
        unspaced_payload=_longest(word for file in unspaced for word in _payload_words(file)),
        digest=hashlib.sha256(repr(sorted(raw.items())).encode()).hexdigest()[:16],
    )


def fold_accents(word: str) -> str:
    """The word without its accents; ñ is a letter of its own and stays."""
    if word.isascii():
        return word
    kept = unicodedata.normalize("NFD", word.replace("ñ", "\x00"))
    return "".join(char for char in kept if not unicodedata.combining(char)).replace("\x00", "ñ")


def _rules(code: str, file: Mapping[str, Any]) -> Rules:
    articles, fillers, courtesy, payload = file["articles"], file["fillers"], file["courtesy"], file["payload"]
    pairs = [tuple(pair.split()) for pair in file["antonyms"]]
    return Rules(
        code=code,
        signs=file.get("signs", ""),
        function_words=frozenset(file["function_words"]),
        fillers=Fillers(**{name: frozenset(fillers[name]) for name in Fillers.__slots__}),
        articles=Articles(**{name: frozenset(articles[name]) for name in Articles.__slots__}),
        courtesy=Courtesy(
            lead=_by_first(courtesy["lead"]),
            lead_before_request=_by_first(courtesy["lead_before_request"]),
            lead_set_off=frozenset(courtesy["lead_set_off"]),
            you=frozenset(courtesy["you"]),
            assistant_verbs=frozenset(courtesy["assistant_verbs"]),
            device_verbs=frozenset(courtesy["device_verbs"]),
            lead_words=frozenset(courtesy["lead_words"]),
            lead_courtesy=frozenset(courtesy["lead_courtesy"]),
            telling=frozenset(courtesy["telling"]),
            tail=_by_last(courtesy["tail"]),
            tail_words=frozenset(courtesy["tail_words"]),
            tail_courtesy=frozenset(courtesy["tail_courtesy"]),
            tail_not_after=frozenset(courtesy["tail_not_after"]),
        ),
        payload=Payload(
            text=_by_first(payload["text"]),
            leading=frozenset(payload["leading"]),
            word=_by_first(payload["word"]),
            title=_by_first(payload["title"]),
            frame=frozenset(payload["frame"]),
            languages=frozenset(payload["languages"]),
            into=frozenset(payload["into"]),
            slips=_by_letter(word for kind in ("text", "leading", "word") for word in payload[kind]),
        ),
        request=frozenset(file["request"]),
        heads={tuple(other.split()): tuple(kept.split()) for kept, other in _equals(file["heads"])},
        spellings={other: kept for kept, other in _equals(file["spellings"])} | dict(file["numbers"]),
        contractions={short: tuple(long.split()) for short, long in file["contractions"].items()},
        contracted_endings=dict(file["contracted_endings"]),
        prepositions=frozenset(file["prepositions"]),
        unaccented_questions=frozenset(file.get("unaccented_questions", ())),
        accent_free=frozenset(file.get("accent_free", ())),
        negations=frozenset(file["negations"]),
        antonyms=frozenset((a, b) for a, b in pairs) | frozenset((b, a) for a, b in pairs),
        units=frozenset(file["units"]),
        capitals_say_nothing=frozenset(file.get("capitals_say_nothing", ())),
        joined=frozenset(file.get("joined", ())),
        thousands=file.get("thousands", ""),
        modals=frozenset(file.get("modals", ())),
        determiners=frozenset(file.get("determiners", ())),
        statements=frozenset(file.get("statements", ())),
        heads_never_before=frozenset(file.get("heads_never_before", ())),
        clause_openers=frozenset(file.get("clause_openers", ())),
        real_words=frozenset(file.get("real_words", ())),
        inflections={ending: tuple(forms) for ending, *forms in _split(file.get("inflections", ()))},
    )


def _courtesy(file: Mapping[str, Any], end: str) -> Iterable[str]:
    return (str(phrase) for phrase in file.get("courtesy", {}).get(end, ()))


def _payload_words(file: Mapping[str, Any]) -> list[str]:
    listed = file.get("payload", [])
    return list(listed["text"] + listed["leading"] + listed["word"] if isinstance(listed, dict) else listed)


def _questions(file: Mapping[str, Any]) -> list[str]:
    return list(file.get("questions", ()))


def _longest(phrases: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(phrases), key=lambda phrase: (-len(phrase), phrase)))


def _phrases(phrases: Iterable[str]) -> tuple[Phrase, ...]:
    return tuple(sorted({tuple(phrase.split()) for phrase in phrases}, key=lambda phrase: (-len(phrase), phrase)))


def _by_first(phrases: Iterable[str]) -> Mapping[str, tuple[Phrase, ...]]:
    found: dict[str, tuple[Phrase, ...]] = {}
    for phrase in _phrases(phrases):
        found[phrase[0]] = (*found.get(phrase[0], ()), phrase)
    return found


def _by_last(phrases: Iterable[str]) -> Mapping[str, tuple[Phrase, ...]]:
    found: dict[str, tuple[Phrase, ...]] = {}
    for phrase in _phrases(phrases):
        found[phrase[-1]] = (*found.get(phrase[-1], ()), phrase)
    return found


def _by_letter(words: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for word in words:
        if len(word) >= SHORTEST_SLIP and " " not in word:
            found[word[0]] = (*found.get(word[0], ()), word)
    return found


def _equals(lines: Iterable[str]) -> list[tuple[str, str]]:
    return [(kept, other) for kept, *others in _split(lines) for other in others]


def _split(lines: Iterable[str]) -> list[list[str]]:
    return [[part.strip() for part in line.split(" = ")] for line in lines]
