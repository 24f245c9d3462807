"""From tokens to canonical tokens: one spelling for each word, no courtesy, one of several equal beginnings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from proxy.cache.near.languages import Phrase, Rules
from proxy.cache.near.tokens import Kind, Token, unit_of

_CLAUSE = 9
_ROUNDS = 4


def fold(tokens: Sequence[Token], rules: Rules, *, shouting: bool) -> list[Token]:
    """Words in lower case, contractions apart, one of several spellings, numbers as digits, units by themselves."""
    out: list[Token] = []
    for token in tokens:
        if token.kind is not Kind.WORD:
            spelled = rules.spellings.get(token.text)
            out.append(replace(token, text=spelled, kind=Kind.WORD, exact=False) if spelled else token)
        elif token.quoted:
            out.append(_as(token, token.text.casefold()))
        elif out and out[-1].kind is Kind.NUMBER and (unit := unit_of(token.text, rules.units)):
            out.append(_as(token, rules.spellings.get(unit, unit)))
        elif token.text.isupper() and _counts_in_capitals(token, rules, shouting=shouting):
            out.append(replace(token, kind=Kind.IDENTIFIER, exact=True))
        else:
            _add_words(out, token, rules)
    return out


def _as(token: Token, text: str) -> Token:
    # `replace` would take most of the time of a fold.
    kind, exact = (Kind.NUMBER, True) if text.isdigit() else (token.kind, token.exact)
    place = token.start, token.end
    return Token(text, kind, exact, token.quoted, token.name, token.breaks, token.comma, token.colon, *place)


def _add_words(out: list[Token], token: Token, rules: Rules) -> None:
    word = token.text.casefold()
    parts = rules.contractions.get(word) or _apart(word, rules)
    out.extend(_as(token, rules.spellings.get(part, part)) for part in parts)
    for inner in out[len(out) - len(parts) : -1]:
        inner.breaks = inner.comma = inner.colon = False


def in_lower_case(tokens: Sequence[Token]) -> list[Token]:
    """The tokens with words in lower case and nothing else changed."""
    return [replace(token, text=token.text.casefold()) if token.kind is Kind.WORD else token for token in tokens]


def _counts_in_capitals(token: Token, rules: Rules, *, shouting: bool) -> bool:
    # US is not us, and WHO not who.
    text = token.text
    return len(text) > 1 and text.isupper() and not shouting and text.casefold() in rules.function_words


def _apart(word: str, rules: Rules) -> Phrase:
    if "'" in word:
        for ending, meaning in rules.contracted_endings.items():
            if word.endswith(ending) and len(word) > len(ending):
                return word.removesuffix(ending), meaning
    return (word,)


def without_courtesy(tokens: list[Token], rules: Rules, *, set_off: bool, tail: bool = True) -> list[Token]:
    """The tokens without phrases and clauses at their ends that ask nothing.

    With `set_off`, only what punctuation sets off; without `tail`, at the beginning only.
    """
    tokens = _without_clauses(tokens, rules, tail=tail)
    for _ in range(_ROUNDS):
        shorter = _without_lead(tokens, rules, set_off=set_off)
        if len(shorter) == len(tokens):
            break
        tokens = shorter
    for _ in range(_ROUNDS if tail else 0):
        shorter = _without_tail(tokens, rules, set_off=set_off)
        if len(shorter) == len(tokens):
            break
        tokens = shorter
    return tokens


def with_kept_head(tokens: list[Token], rules: Rules) -> list[Token]:
    """The tokens with the usual one of several beginnings that ask the same."""
    longest = max(map(len, rules.heads), default=0)
    for length in range(min(longest, len(tokens) - 1), 1, -1):
        kept = rules.heads.get(_texts(tokens[:length]))
        if kept is not None:
            model = tokens[length - 1]
            return [replace(model, text=word, breaks=False, name=False) for word in kept] + tokens[length:]
    return tokens


def _without_clauses(tokens: list[Token], rules: Rules, *, tail: bool) -> list[Token]:
    courtesy = rules.courtesy
    for _ in range(_ROUNDS):
        end = next((at for at, token in enumerate(tokens[:_CLAUSE]) if token.breaks), None)
        if end is None or end + 2 >= len(tokens) or not _all_in(tokens[: end + 1], courtesy.lead_words):
            break
        following = tokens[end + 1].text
        if following not in rules.request and following not in courtesy.lead_words:
            break
        tokens = tokens[end + 1 :]
    breaks = [at for at, token in enumerate(tokens[:-1]) if token.breaks] if tail else []
    if breaks and breaks[-1] >= 1 and len(tokens) - breaks[-1] <= _CLAUSE:
        clause = tokens[breaks[-1] + 1 :]
        if _all_in(clause, courtesy.tail_words) and any(token.text in courtesy.tail_courtesy for token in clause):
            tokens = tokens[: breaks[-1] + 1]
    return tokens


def _without_lead(tokens: list[Token], rules: Rules, *, set_off: bool) -> list[Token]:
    courtesy = rules.courtesy
    for phrases, free in ((courtesy.lead, True), (courtesy.lead_before_request, False)):
        for phrase in phrases.get(tokens[0].text, ()) if tokens else ():
            length = len(phrase)
            if len(tokens) <= length + 1 or not _matches(tokens[:length], phrase):
                continue
            following = tokens[length]
            asks = following.text in rules.request and not following.quoted
            greeted = length == 1 and tokens[0].breaks
            if asks or greeted or (free and not set_off):
                return tokens[length:]
    return tokens


def _without_tail(tokens: list[Token], rules: Rules, *, set_off: bool) -> list[Token]:
    for phrase in rules.courtesy.tail.get(tokens[-1].text, ()) if tokens else ():
        length = len(phrase)
        if len(tokens) <= length + 1 or not _matches(tokens[-length:], phrase):
            continue
        before = tokens[-length - 1]
        asked_about = set_off or (before.text in rules.courtesy.tail_not_after and not before.quoted)
        if before.breaks or not asked_about:
            return tokens[:-length]
    return tokens


def _matches(tokens: Sequence[Token], phrase: Phrase) -> bool:
    return _texts(tokens) == phrase and not any(token.quoted or token.exact for token in tokens)


def _all_in(tokens: Sequence[Token], words: frozenset[str]) -> bool:
    return all(token.text in words and not token.exact and not token.quoted for token in tokens)


def _texts(tokens: Sequence[Token]) -> Phrase:
    return tuple(token.text for token in tokens)
