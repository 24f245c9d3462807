"""From tokens to canonical tokens: one spelling for each word, no courtesy, one of several equal beginnings. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from proxy.cache.near.languages import Phrase, Rules
from proxy.cache.near.lexicon import Lexicon
from proxy.cache.near.tokens import Kind, Token, unit_of

_CLAUSE = 9
_TENS = frozenset(["20", "30", "40", "50", "60", "70", "80", "90"])
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ROUNDS = 4


def fold(tokens: Sequence[Token], rules: Rules, lexicon: Lexicon, *, uniform: bool) -> list[Token]:
    """Words in lower case, contractions apart, one of several spellings, numbers as digits, units by themselves.

    With `uniform`, capitals tell nothing.
    """
    out: list[Token] = []
    for at, token in enumerate(tokens):
        if token.kind is Kind.NUMBER:
            out.append(_without_separators(token, rules))
        elif token.kind is not Kind.WORD:
            spelled = rules.spellings.get(token.text) if _stands_for_a_word(tokens, at, rules) else None
            out.append(replace(token, text=spelled, kind=Kind.WORD, exact=False) if spelled else token)
        elif token.quoted:
            out.append(replace(token, text=token.text.casefold(), name=token.text[:1].isupper()))
        elif out and out[-1].kind is Kind.NUMBER and (unit := unit_of(token.text, rules.units, uniform=uniform)):
            out.append(_as(token, rules.spellings.get(unit, unit)))
        elif not uniform and _counts_in_capitals(token, rules, lexicon):
            out.append(replace(token, kind=Kind.IDENTIFIER, exact=True))
        else:
            _add_words(out, token, rules)
    return out


def _without_separators(token: Token, rules: Rules) -> Token:
    # In brackets, commas set arguments and coordinates apart.
    if token.inside or not rules.thousands or not _THOUSANDS.fullmatch(token.text):
        return token
    return replace(token, text=token.text.replace(",", ""))


def _is_one_number(tens: Token, unit: Token) -> bool:
    """Whether two number words are one, as in "twenty-five"; "twenty five-year-olds" are twenty."""
    if tens.kind is not Kind.NUMBER or unit.kind is not Kind.NUMBER or tens.end + 1 != unit.start:
        return False
    return tens.hyphened and unit.hyphened and tens.text in _TENS and len(unit.text) == 1 and unit.text != "0"


def _stands_for_a_word(tokens: Sequence[Token], at: int, rules: Rules) -> bool:
    """Whether a symbol is used in a word's place: "salt & pepper", "5 %"; not where it is what is asked about."""
    before = tokens[at - 1] if at else None
    if before is None or before.quoted:
        return False
    if tokens[at].text == "%":
        return before.kind is Kind.NUMBER
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    if after is None or not all(t.kind is Kind.WORD and len(t.text) > 1 for t in (before, after)):
        return False
    return before.text.casefold() not in rules.function_words and after.text not in rules.prepositions


def _as(token: Token, text: str) -> Token:
    # `replace` would take most of the time of a fold.
    kind, exact = (Kind.NUMBER, True) if text.isdigit() else (token.kind, token.exact)
    about = token.inside, token.hyphened, token.start, token.end
    return Token(text, kind, exact, token.quoted, token.name, token.mark, *about)


def _add_words(out: list[Token], token: Token, rules: Rules) -> None:
    word = token.text.casefold()
    parts = rules.contractions.get(word) or _apart(word, rules)
    # The Labour Party is not the Labor Party.
    spelled = {} if token.name and not token.text.isupper() else rules.spellings
    if word in rules.capitals_say_nothing:
        token = replace(token, name=False)
    for part in parts:
        number = _as(token, spelled.get(part, part))
        if out and _is_one_number(out[-1], number):
            out[-1] = replace(number, text=str(int(out[-1].text) + int(number.text)), start=out[-1].start)
            return
        out.append(number)
    for inner in out[len(out) - len(parts) : -1]:
        inner.mark = ""


def in_lower_case(tokens: Sequence[Token]) -> list[Token]:
    """The tokens with words in lower case and nothing else changed."""
    return [replace(token, text=token.text.casefold()) if token.kind is Kind.WORD else token for token in tokens]


def _counts_in_capitals(token: Token, rules: Rules, lexicon: Lexicon) -> bool:
    # US is not us, a PIN is no pin.
    folded = token.text.casefold()
    if len(folded) < 2 or not token.text.isupper() or folded in rules.capitals_say_nothing:
        return False
    return folded in rules.function_words or folded in lexicon


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
    whole = tokens
    tokens = _without_clauses(tokens, rules, tail=tail)
    for _ in range(_ROUNDS):
        shorter = _without_lead(tokens, rules)
        if len(shorter) == len(tokens):
            break
        tokens = shorter
    for _ in range(_ROUNDS if tail else 0):
        shorter = _without_tail(tokens, rules, set_off=set_off)
        if len(shorter) == len(tokens):
            break
        tokens = shorter
    if tokens and tokens[0] is not whole[0]:
        # What begins a sentence has a capital, name or not.
        tokens = [replace(tokens[0], name=False), *tokens[1:]]
    return tokens


def with_kept_head(tokens: list[Token], rules: Rules) -> list[Token]:
    """The tokens with the usual one of several beginnings that ask the same."""
    longest = max(map(len, rules.heads), default=0)
    for length in range(min(longest, len(tokens) - 1), 1, -1):
        kept = rules.heads.get(_texts(tokens[:length]))
        if kept is not None and tokens[length].text not in rules.heads_never_before:
            model = tokens[length - 1]
            return [replace(model, text=word, mark="", name=False) for word in kept] + tokens[length:]
    return tokens


def _without_clauses(tokens: list[Token], rules: Rules, *, tail: bool) -> list[Token]:
    courtesy = rules.courtesy
    for _ in range(_ROUNDS):
        end = next((at for at, token in enumerate(tokens[:_CLAUSE]) if token.breaks), None)
        if end is None or end + 2 >= len(tokens) or not _all_in(tokens[: end + 1], courtesy.lead_words):
            break
        if not any(token.text in courtesy.lead_courtesy for token in tokens[: end + 1]):
            break
        following = tokens[end + 1].text
        if following not in rules.request and following not in courtesy.lead_words:
            break
        tokens = tokens[end + 1 :]
        if tokens[0].text in courtesy.lead_set_off and len(tokens) > 1:
            # "Sorry to bother you, but how do I ..."
            tokens = tokens[1:]
    breaks = [at for at, token in enumerate(tokens[:-1]) if token.breaks] if tail else []
    told = any(token.text in courtesy.telling and not token.quoted for token in tokens)
    if breaks and not told and breaks[-1] >= 1 and len(tokens) - breaks[-1] <= _CLAUSE:
        clause = tokens[breaks[-1] + 1 :]
        if _all_in(clause, courtesy.tail_words) and any(token.text in courtesy.tail_courtesy for token in clause):
            tokens = tokens[: breaks[-1] + 1]
    return tokens


def _without_lead(tokens: list[Token], rules: Rules) -> list[Token]:
    courtesy = rules.courtesy
    if tokens and tokens[0].breaks and tokens[0].text in courtesy.lead_set_off and _is_sentence(tokens[1:], rules):
        return tokens[1:]
    for phrases in (courtesy.lead, courtesy.lead_before_request):
        for phrase in phrases.get(tokens[0].text, ()) if tokens else ():
            length = len(phrase)
            if len(tokens) <= length + 1 or not _matches(tokens[:length], phrase):
                continue
            rest = tokens[length:]
            asks = rest[0].text in rules.request and not rest[0].quoted
            set_apart = tokens[length - 1].breaks
            if phrase[-1] in courtesy.you and not _is_asked_to_act(phrase, rest, rules):
                continue
            if asks or (set_apart and _is_sentence(rest, rules)):
                return rest
    return tokens


def _is_sentence(tokens: Sequence[Token], rules: Rules) -> bool:
    # "Good morning Vietnam" is a film.
    return len(tokens) >= 3 and any(token.text in rules.function_words for token in tokens)


def _is_asked_to_act(phrase: Phrase, rest: Sequence[Token], rules: Rules) -> bool:
    """Whether "can you ..." asks for something to be done, and not whether one can."""
    if rest[0].text in rules.courtesy.assistant_verbs or "please" in phrase:
        return True
    device = rest[0].text in rules.courtesy.device_verbs
    return device and rest[-1].mark != "?"


def _without_tail(tokens: list[Token], rules: Rules, *, set_off: bool) -> list[Token]:
    courtesy = rules.courtesy
    for phrase in courtesy.tail.get(tokens[-1].text, ()) if tokens else ():
        length = len(phrase)
        if len(tokens) <= length + 1 or not _matches(tokens[-length:], phrase):
            continue
        before = tokens[-length - 1]
        asked_about = before.text in courtesy.tail_not_after and not before.quoted
        told = any(token.text in courtesy.telling and not token.quoted for token in tokens)
        if not told and (before.breaks or not (set_off or asked_about)):
            # Who asked with a question mark behind the courtesy asked the question with it.
            return [*tokens[: -length - 1], replace(before, mark=tokens[-1].mark or before.mark)]
    return tokens


def _matches(tokens: Sequence[Token], phrase: Phrase) -> bool:
    return _texts(tokens) == phrase and not any(token.quoted or token.exact or token.name for token in tokens)


def _all_in(tokens: Sequence[Token], words: frozenset[str]) -> bool:
    return all(token.text in words and not token.exact and not token.quoted for token in tokens)


def _texts(tokens: Sequence[Token]) -> Phrase:
    return tuple(token.text for token in tokens)
