"""Prompts that work on their own wording: where the operation ends and its data begins. Pure.

In "Correct the spelling: wether" every letter after the colon is the question. What such prompts are known by stands
in the language files; when in doubt, it is payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from proxy.cache.near.canonical import without_courtesy
from proxy.cache.near.languages import Payload, Phrase, Rules
from proxy.cache.near.lexicon import Lexicon
from proxy.cache.near.slips import SHORTEST_SLIP, is_one_slip
from proxy.cache.near.tokens import Kind, Token

_LONG = 60
_LONGEST_LINE = 15
_FEWEST_BELOW = 2
_ENDS = frozenset(".?!:")


class Operation(StrEnum):
    """What a prompt works on."""

    TEXT = "text"
    WORD = "word"
    TITLE = "title"


@dataclass(frozen=True, slots=True)
class Work:
    """An operation on the prompt's own text; `head` is how many tokens belong to the operation and hold no data.

    With `quoted`, all data stands between quotes, and what is around them is no data.
    """

    operation: Operation
    head: int
    quoted: bool


def find_work(tokens: Sequence[Token], rules: Rules, lexicon: Lexicon) -> Work | None:
    """The operation that a prompt asks for on its own wording, if it does.

    Tokens in folded form, without what is surely courtesy before them. A word that is none, but for one slip names an
    operation, names it.
    """
    payload = rules.payload
    spelled = [_spelled(token, rules, lexicon) for token in tokens]
    ways = (
        _first(spelled, payload.text, payload.word),
        _leading(spelled, rules),
        _into_language(spelled, rules),
    )
    found = min(filter(None, ways), default=_after_colon(tokens, rules))
    if found is None:
        # A title between quotes is set apart well enough.
        titled = _first(spelled, payload.title) and not any(token.quoted for token in tokens)
        return Work(Operation.TITLE, 0, quoted=False) if titled else None
    start, end, is_text = found
    operation = Operation.TEXT if is_text else Operation.WORD
    around = _around(spelled, rules, range(start, end))
    short = without_courtesy(spelled, rules, set_off=False)
    if _is_set_apart(short, rules, range(start, end)):
        return Work(operation, len(tokens), quoted=True)
    if operation is Operation.WORD and len(tokens) > _LONG and _is_about_all(short, rules):
        # A document and a question about all of it: no single word or letter of it is what is asked.
        return None
    head = _head_end(tokens, around, end)
    # Where something stands before the operation, or nothing behind it, that may be what it works on.
    return Work(operation, head if all(around[:start]) and not all(around[head:]) else 0, quoted=False)


def _spelled(token: Token, rules: Rules, lexicon: Lexicon) -> Token:
    if token.kind is not Kind.WORD or token.quoted or token.name or token.text in lexicon:
        return token
    if len(token.text) < SHORTEST_SLIP:
        return token
    meant = rules.payload.slips.get(token.text[0], ())
    name = next((word for word in meant if is_one_slip(*sorted((token.text, word), key=len))), None)
    return replace(token, text=name) if name else token


def below_first_line(tokens: Sequence[Token], plain: str, rules: Rules) -> Work | None:
    """A short first line with text below it says what to do with that text."""
    line_end = plain.find("\n", tokens[0].end) if tokens else -1
    first = sum(token.end <= line_end for token in tokens)
    if line_end < 0 or first > _LONGEST_LINE or len(tokens) - first < _FEWEST_BELOW:
        return None
    around = _around(tokens, rules, range(0))
    return Work(Operation.TEXT, first if all(around[:first]) else 0, quoted=False)


def _is_set_apart(tokens: Sequence[Token], rules: Rules, found: range) -> bool:
    """Whether all data stands between quotes or is code."""
    around = _around(tokens, rules, found)
    data = [token.quoted or token.kind is Kind.CODE for token in tokens]
    return any(data) and all(
        is_data or fits or token.kind is Kind.NUMBER for is_data, fits, token in zip(data, around, tokens, strict=True)
    )


def _around(tokens: Sequence[Token], rules: Rules, found: range) -> list[bool]:
    """Which tokens belong to the operation and are surely no data."""
    spans = _operations(tokens, rules.payload) | set(found)
    return [_is_frame(token, rules) or at in spans for at, token in enumerate(tokens)]


def _leading(tokens: Sequence[Token], rules: Rules) -> tuple[int, int, bool] | None:
    for at, token in enumerate(tokens[:3]):
        begins = at == 0 or tokens[at - 1].text in rules.fillers.after or tokens[at - 1].text in rules.fillers.words
        if begins and token.text in rules.payload.leading and not token.quoted:
            return at, at + 1, True
    return None


def _after_colon(tokens: Sequence[Token], rules: Rules) -> tuple[int, int, bool] | None:
    # "quick question: ..." says nothing, any other colon may have data behind it.
    for at, token in enumerate(tokens[:-1]):
        if token.mark == ":" and not all(before.text in rules.courtesy.lead_words for before in tokens[: at + 1]):
            return at, at + 1, True
    return None


def _first(tokens: Sequence[Token], *lists: Mapping[str, tuple[Phrase, ...]]) -> tuple[int, int, bool] | None:
    for at in range(len(tokens)):
        for number, phrases in enumerate(lists):
            length = _length_at(tokens, at, phrases)
            if length:
                return at, at + length, number == 0
    return None


def _into_language(tokens: Sequence[Token], rules: Rules) -> tuple[int, int, bool] | None:
    payload = rules.payload
    for at in range(1, len(tokens)):
        if tokens[at].text in payload.languages and tokens[at - 1].text in payload.into and not tokens[at].quoted:
            return at, at + 1, True
    return None


def _operations(tokens: Sequence[Token], payload: Payload) -> set[int]:
    found: set[int] = set()
    for at in range(len(tokens)):
        for phrases in (payload.text, payload.word, payload.title):
            found.update(range(at, at + _length_at(tokens, at, phrases)))
        if tokens[at].text in payload.languages or tokens[at].text in payload.leading:
            found.add(at)
    return found


def _length_at(tokens: Sequence[Token], at: int, phrases: Mapping[str, tuple[Phrase, ...]]) -> int:
    token = tokens[at]
    found = phrases.get(token.text)
    if found is None or token.quoted or token.kind is Kind.CODE:
        return 0
    for phrase in found:
        if len(phrase) == 1 or tuple(other.text for other in tokens[at : at + len(phrase)]) == phrase:
            return len(phrase)
    return 0


def _is_frame(token: Token, rules: Rules) -> bool:
    if token.quoted or token.exact or token.kind is not Kind.WORD:
        return False
    return any(token.text in words for words in (rules.function_words, rules.payload.frame, rules.request))


def _is_about_all(tokens: Sequence[Token], rules: Rules) -> bool:
    """Whether the last sentence asks for something and holds no data of its own."""
    ends = [at + 1 for at, token in enumerate(tokens[:-1]) if token.mark in _ENDS]
    last = tokens[ends[-1] if ends else 0 :]
    return all(
        frame or token.kind is Kind.NUMBER for frame, token in zip(_around(last, rules, range(0)), last, strict=True)
    )


def _head_end(tokens: Sequence[Token], around: Sequence[bool], end: int) -> int:
    """Where the data begins: after a colon that ends the frame, else right after the operation."""
    for at in range(end - 1, len(tokens)):
        if not around[at]:
            break
        if tokens[at].mark == ":":
            return at + 1
    return end
