"""A prompt made ready for comparison: its canonical tokens, and the keys under which its like is found. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from proxy.cache.near import canonical
from proxy.cache.near.identify import Identifier
from proxy.cache.near.languages import Languages, Rules, fold_accents
from proxy.cache.near.lexicon import Lexicon
from proxy.cache.near.payload import Operation, Work, below_first_line, find_work
from proxy.cache.near.strict import StrictForm
from proxy.cache.near.tokens import (
    Kind,
    Token,
    collapse,
    fold_typography,
    is_uniform,
    quotations,
    tokenize,
    without_smileys,
)

NORMALISER = 1
"""Moves when the same text would get other canonical tokens, another skeleton or other keys than before."""

_OPENERS = " \t\n¿¡\"'(["
_END_MARKS = re.compile(r"[\s.!?…]+\Z")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    `plain` is its text with folded typography and white space, which outlives every change of the lists. `language`
    names the rules that apply, "" the strict one. `tokens` are its canonical tokens. `rigid` says that it names
    something, so that nothing in it is filler. `asks` tells a statement with a question mark from one without; None
    where its words tell. `cased` says that capitals stand where they belong. `strict` is the form that the strict rule
    compares, `strict_mark` what it ended with; `is_question` says that its words alone make it a question.
    """

    plain: str
    language: str
    tokens: tuple[Token, ...]
    rigid: bool
    asks: bool | None
    cased: bool
    strict: str
    strict_mark: str
    is_question: bool
    rules: Rules | None

    @cached_property
    def canonical(self) -> str:
        """The canonical tokens as one text: equal where they are equal."""
        if self.rules is None:
            return self.strict
        return "\x1f".join(f'"{token.text}' if token.quoted else token.text for token in self.tokens)

    @cached_property
    def skeleton(self) -> str:
        """The canonical tokens without what may come and go, and without accents."""
        rules = self.rules
        if rules is None:
            return self.strict.casefold()
        fillers = rules.fillers
        safe = rules.articles.words | fillers.words | fillers.adverbs | fillers.sounds
        kept = [token for token in self.tokens if token.exact or token.quoted or token.text not in safe]
        return " ".join(fold_accents(t.text) if t.kind is Kind.WORD else t.text for t in kept or self.tokens)

    @property
    def size(self) -> int:
        """About how many tokens it has; the characters of scripts without spaces are no words."""
        return len(self.strict.split())

    def digests(self) -> tuple[bytes, ...]:
        """Digests of the strict form, the canonical tokens and the skeleton."""
        forms = ("strict", self.strict), (self.language, self.canonical), (f"{self.language} skeleton", self.skeleton)
        return tuple(_digest(kind, text) for kind, text in forms)


def plain_form(text: str) -> str:
    """The text with folded typography and white space."""
    return collapse(fold_typography(text))


class Prompts:
    """Makes prompts ready; knows the lists."""

    def __init__(self, languages: Languages, lexicons: Mapping[str, Lexicon]) -> None:
        """`lexicons` has the words of every language with rules."""
        self.languages = languages
        self.lexicons = lexicons
        self._strict = StrictForm(languages)
        self._identifier = Identifier(languages, lexicons)

    def prepare(self, text: str) -> Prompt:
        """Make a prompt ready."""
        plain = fold_typography(text)
        strict = self._strict.of(text)
        tokens = tokenize(without_smileys(plain))
        telling = [token for token in tokens if token.kind is Kind.WORD and not token.quoted and not token.name]
        words = [word for token in telling for word in self._apart(token)]
        rules = self.languages.rules.get(
            self._identifier.identify(words, self._signed(plain)) if len(tokens) > 3 else ""
        )
        if rules is None:
            return Prompt(plain_form(text), "", (), False, None, False, strict.text, strict.mark, strict.asks, None)
        uniform = is_uniform(plain)
        cased = not uniform and (plain.lstrip(_OPENERS)[:1].isupper() or any(token.name for token in tokens))
        folded = canonical.fold(tokens, rules, self.lexicons[rules.code], uniform=uniform)
        bare = canonical.without_courtesy(folded, rules, set_off=False, tail=False)
        work = below_first_line(bare, plain, rules) or find_work(bare, rules, self.lexicons[rules.code])
        rigid = work is not None and work.operation is Operation.TITLE
        final = _final(canonical.in_lower_case(tokens) if rigid else bare, plain, work, rules)
        stated = bool(final) and work is None and not _asks(final[0].text, rules)
        asks = ("?" in plain[final[-1].end :] or "¿" in plain) if stated else None
        return Prompt(
            collapse(plain), rules.code, tuple(final), rigid, asks, cased, strict.text, strict.mark, strict.asks, rules
        )

    def _signed(self, plain: str) -> str:
        return next(
            (rules.code for rules in self.languages.rules.values() if not set(rules.signs).isdisjoint(plain)), ""
        )

    def _apart(self, token: Token) -> tuple[str, ...]:
        word = token.text.lower()
        return next((r.contractions[word] for r in self.languages.rules.values() if word in r.contractions), (word,))


def _asks(word: str, rules: Rules) -> bool:
    return word in rules.request and word not in rules.statements


def _final(bare: list[Token], plain: str, work: Work | None, rules: Rules) -> list[Token]:
    if work is None or work.quoted:
        tokens = canonical.with_kept_head(canonical.without_courtesy(bare, rules, set_off=False), rules)
        return tokens if work is None else _quoted_as_it_stands(tokens, plain)
    if work.operation is Operation.TITLE:
        return canonical.without_courtesy(bare, rules, set_off=True)
    if not work.head:
        return _payload(plain, work.operation, 0)
    end = len(plain)
    if work.operation is Operation.WORD:
        # Courtesy behind a word is none of it, as long as a word is left.
        kept = canonical.without_courtesy(bare, rules, set_off=False)
        end = kept[-1].end if work.head < len(kept) < len(bare) and kept[0] is bare[0] else end
    start = bare[work.head].start
    return [*bare[: work.head], *_payload(plain[start:end], work.operation, start)]


def _payload(text: str, operation: Operation, start: int) -> list[Token]:
    text = text.strip()
    if operation is Operation.WORD:
        text = collapse(_END_MARKS.sub("", without_smileys(text)) or text)
    if not text:
        return []
    return [Token(text, Kind.PAYLOAD, exact=True, start=start, end=start + len(text))]


def _quoted_as_it_stands(tokens: Sequence[Token], plain: str) -> list[Token]:
    """The tokens with one for each quotation, which has its text to the last mark."""
    out: list[Token] = []
    spans = quotations(plain)
    for token in tokens:
        if not token.quoted:
            out.append(token)
            continue
        start, end = next((a, b) for a, b in spans if a <= token.start < b)
        if not (out and out[-1].start == start and out[-1].kind is Kind.PAYLOAD):
            out.append(Token(plain[start + 1 : end - 1], Kind.PAYLOAD, exact=True, start=start, end=end))
    return out


def _digest(kind: str, text: str) -> bytes:
    return hashlib.sha256(f"{kind}\n{text}".encode("utf-8", "surrogatepass")).digest()[:16]
