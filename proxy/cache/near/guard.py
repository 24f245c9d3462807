"""The guard: decides on the ordered difference of two prompts whether one's answer is right for the other. Pure.

Only differences that are known to change nothing pass. Everything else refuses, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

from proxy.cache.near.languages import Rules, fold_accents
from proxy.cache.near.lexicon import Lexicon
from proxy.cache.near.prompt import Prompt
from proxy.cache.near.slips import SHORTEST_SLIP, is_one_slip
from proxy.cache.near.tokens import Kind, Token

_MOST_EDITS = 4
_WINDOW = 12
_SHORTEST_PART = 3
_LATEST_FRONT = 8
_ENDING = 3
_LINE = 80
_ENDINGS = frozenset(["s", "es", "d", "ed", "r", "er", "ing", "ly", "n", "st", "y", "al", "a", "o", "e", "as", "os"])


class Rule(StrEnum):
    """What decided. The first group lets pass, the second refuses."""

    EQUAL = "equal"
    FILLER = "filler"
    TYPO = "typo"
    ACCENT = "accent"
    JOINED = "joined"
    FRONTED = "fronted"

    NUMBER = "number"
    UNIT = "unit"
    NEGATION = "negation"
    ANTONYM = "antonym"
    NAME = "name"
    ORDER = "order"
    CODE = "code"
    IDENTIFIER = "identifier"
    SYMBOL = "symbol"
    QUOTED = "quoted"
    PAYLOAD = "payload"
    FUNCTION_WORD = "function-word"
    CONTENT_WORD = "content-word"
    ARTICLE = "article"
    PUNCTUATION = "punctuation"
    STATEMENT = "statement"
    LANGUAGE = "language"
    STRICT = "strict"
    TOO_MANY = "too-many-differences"
    SCORE = "score"
    VETOED = "vetoed"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the answers are the same, the rule that decided, and the tokens on either side that made it decide."""

    same: bool
    rule: Rule
    asked: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()


EQUAL = Verdict(same=True, rule=Rule.EQUAL)


class Guard:
    """Compares prompts; knows the words of the languages with rules."""

    def __init__(self, lexicons: Mapping[str, Lexicon]) -> None:
        """`lexicons` tell real words from slips."""
        self._lexicons = lexicons

    def compare(self, asked: Prompt, stored: Prompt) -> Verdict:
        """The verdict on a stored prompt for the one that is asked."""
        rules = asked.rules
        if rules is None or stored.rules is None or asked.language != stored.language:
            return _strictly(asked, stored)
        if asked.canonical != stored.canonical and _is_fronted(asked, stored, rules):
            return Verdict(same=True, rule=Rule.FRONTED)
        if {asked.asks, stored.asks} == {True, False}:
            return Verdict(same=False, rule=Rule.STATEMENT)
        return _Walk(asked, stored, rules, self._lexicons[rules.code]).verdict()


def _strictly(asked: Prompt, stored: Prompt) -> Verdict:
    if asked.strict == stored.strict:
        marks = {asked.strict_mark, stored.strict_mark}
        if "?" in marks and len(marks) > 1 and not asked.is_question:
            return Verdict(same=False, rule=Rule.STATEMENT)
        return EQUAL
    rule = Rule.STRICT if asked.language == stored.language else Rule.LANGUAGE
    left, right = _middles(asked.strict, stored.strict)
    return Verdict(False, rule, (left,), (right,))


def _middles(a: str, b: str) -> tuple[str, str]:
    """What is left of two texts without their common beginning and end; not more than a line of it."""
    start = _shared(a, b)
    end = _shared(a[start:][::-1], b[start:][::-1])
    return a[start : len(a) - end][:_LINE], b[start : len(b) - end][:_LINE]


def _shared(a: str, b: str) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_fronted(asked: Prompt, stored: Prompt, rules: Rules) -> bool:
    # "On my phone, how do I ..." asks what "How do I ... on my phone" asks.
    if asked.rigid or stored.rigid or len(asked.tokens) != len(stored.tokens):
        return False
    return _fronts(asked.tokens, stored.tokens, rules) or _fronts(stored.tokens, asked.tokens, rules)


def _fronts(fronted: Sequence[Token], plain: Sequence[Token], rules: Rules) -> bool:
    if len(fronted) < 2 or fronted[0].text not in rules.prepositions or fronted[1].text not in rules.determiners:
        # "In May, did he promise to pay" is about another May.
        return False
    end = next((at for at, token in enumerate(fronted[:_LATEST_FRONT]) if token.breaks), None)
    if end is None or end + 3 > len(fronted) or any(token.breaks for token in plain[:-1]):
        return False
    turned = [*fronted[end + 1 :], *fronted[: end + 1]]
    return all(_is_equal(a, b) for a, b in zip(turned, plain, strict=True))


def _is_equal(a: Token, b: Token) -> bool:
    return a.text == b.text and a.quoted == b.quoted and (a.kind is Kind.PAYLOAD) == (b.kind is Kind.PAYLOAD)


class _Walk:
    """One walk along two lists of tokens, side by side."""

    def __init__(self, asked: Prompt, stored: Prompt, rules: Rules, lexicon: Lexicon) -> None:
        self._asked = asked
        self._stored = stored
        self._rules = rules
        self._lexicon = lexicon
        self._edits: list[tuple[Rule, tuple[str, ...], tuple[str, ...]]] = []

    def verdict(self) -> Verdict:
        """Walk until something refuses."""
        a, b = self._asked.tokens, self._stored.tokens
        i = j = 0
        while i < len(a) or j < len(b):
            if i < len(a) and j < len(b) and _is_equal(a[i], b[j]):
                refusal = self._refuses_pair(a, i, b, j)
                if refusal is not None:
                    return refusal
                i, j = i + 1, j + 1
                continue
            step = self._step(a, i, b, j)
            if step is None:
                return self._refusal(a, i, b, j)
            rule, left, right = step
            self._edits.append((rule, _texts(a[i : i + left]), _texts(b[j : j + right])))
            i, j = i + left, j + right
        return self._conclusion()

    def _refuses_pair(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> Verdict | None:
        x, y = a[i], b[j]
        cased = self._asked.cased and self._stored.cased and x.kind is Kind.WORD and len(x.text) > 1
        if x.name != y.name and cased and x.quoted:
            return Verdict(False, Rule.QUOTED, (_shown(x),), (_shown(y),))
        if x.name != y.name and cased and x.text in self._lexicon:
            return Verdict(False, Rule.NAME, (_shown(x),), (_shown(y),))
        inner = i + 1 < len(a) and j + 1 < len(b)
        if inner and _mark_of(x) != _mark_of(y) and a[i + 1].text not in self._rules.clause_openers:
            return Verdict(False, Rule.PUNCTUATION, (f"{x.text}{x.mark}",), (f"{y.text}{y.mark}",))
        return None

    def _conclusion(self) -> Verdict:
        if not self._edits:
            return EQUAL
        if len(self._edits) > _MOST_EDITS:
            return Verdict(same=False, rule=Rule.TOO_MANY)
        # The weightiest of the differences names the verdict.
        order = (Rule.TYPO, Rule.JOINED, Rule.ACCENT, Rule.FILLER)
        rule, left, right = min(self._edits, key=lambda edit: order.index(edit[0]))
        return Verdict(True, rule, left, right)

    def _step(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> tuple[Rule, int, int] | None:
        if self._asked.rigid or self._stored.rigid:
            return None
        if self._may_go(a, i) and not self._swaps(a, i, b, j):
            return Rule.FILLER, 1, 0
        if self._may_go(b, j) and not self._swaps(a, i, b, j):
            return Rule.FILLER, 0, 1
        if i >= len(a) or j >= len(b):
            return None
        for rule, alike in ((Rule.ACCENT, self._is_accent), (Rule.TYPO, self._is_typo)):
            if alike(a, i, b, j):
                return rule, 1, 1
        if self._is_joined(a[i : i + 2], b[j]):
            return Rule.JOINED, 2, 1
        if self._is_joined(b[j : j + 2], a[i]):
            return Rule.JOINED, 1, 2
        return None

    def _swaps(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> bool:
        articles = self._rules.articles.words
        if i >= len(a) or j >= len(b) or a[i].text not in articles or b[j].text not in articles:
            return False
        return i == 0 or a[i - 1].text not in self._rules.articles.swap_after

    def _may_go(self, tokens: Sequence[Token], at: int) -> bool:
        """Whether the token is filler by its place."""
        if at >= len(tokens) - 1 or tokens[at].exact or tokens[at].quoted or tokens[at].name:
            return False
        token, fillers = tokens[at], self._rules.fillers
        if token.text in fillers.sounds:
            return token.breaks and (at == 0 or tokens[at - 1].breaks)
        if token.text in fillers.adverbs:
            return at > 0 and tokens[at - 1].text in fillers.adverbs_after and tokens[at + 1].kind is Kind.WORD
        if token.text in fillers.words:
            return at == 2 and tokens[1].text in fillers.after and tokens[0].text in self._rules.modals
        return token.text in self._rules.articles.words and at > 0 and self._article_may_go(tokens, at)

    def _article_may_go(self, tokens: Sequence[Token], at: int) -> bool:
        articles, before, following = self._rules.articles, tokens[at - 1], tokens[at + 1]
        if before.breaks or before.quoted or following.quoted or following.kind is Kind.PAYLOAD:
            return False
        rest = " ".join(token.text for token in tokens[at + 1 : at + 6]).split()
        if following.text in articles.before_number:
            return len(rest) > 1 and tokens[at + 2].kind is Kind.NUMBER
        definite = tokens[at].text not in articles.indefinite
        if len(rest) == 1 and (following.text in articles.unless_last or (definite and not self._is_plain(following))):
            return False
        if following.text in articles.unless_next or following.text in self._rules.function_words:
            return False
        if len(following.text) < 2 or following.text in articles.unless_alone:
            return False
        if following.kind is Kind.NUMBER or _is_plural(following):
            # "The doors" may be a band, and "the 5" those that were named before.
            return False
        if before.text in articles.never_after:
            # "What is the capital of ..." is a question about a capital, "what is the matrix" about a film.
            compound = len(rest) > 1 and rest[1] not in self._rules.function_words
            return before.text in articles.after_if_of and (compound or not articles.of.isdisjoint(rest[1:4]))
        return before.text in articles.after or before.text in self._rules.function_words

    def _is_plain(self, token: Token) -> bool:
        # A name may be a title: "The Who", "the Rock".
        return token.kind is Kind.WORD and token.text in self._lexicon and not token.name

    def _is_accent(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> bool:
        x, y = a[i], b[j]
        if not _are_words(x, y) or fold_accents(x.text) != fold_accents(y.text):
            return False
        if not self._rules.accent_free.isdisjoint((x.text, y.text)):
            return True
        if self._is_question_word(a, i) or self._is_question_word(b, j):
            # "Como come un perro" says how one eats, "¿Cómo come un perro?" asks.
            questions = all(tokens[-1].mark == "?" for tokens in (a, b))
            return questions and (i == j or {a[i - 1].text, b[j - 1].text} <= self._rules.prepositions)
        if x.name and y.name and x.text[-1] == y.text[-1]:
            return True
        return (x.text in self._lexicon) != (y.text in self._lexicon)

    def _is_question_word(self, tokens: Sequence[Token], at: int) -> bool:
        return at < 2 and tokens[at].text in self._rules.unaccented_questions

    def _is_typo(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> bool:
        x, y = a[i], b[j]
        if not _are_words(x, y) or x.name or y.name:
            return False
        short, long = sorted((x.text, y.text), key=len)
        if len(short) < SHORTEST_SLIP or short[0] != long[0] or not is_one_slip(short, long):
            return False
        if long.startswith(short) and long[len(short) :] in _ENDINGS:
            # An inflection, not a slip.
            return False
        if _is_another_ending(short, long):
            return False
        # One of the two is a word, the other is none.
        return (x.text in self._lexicon) != (y.text in self._lexicon)

    def _is_joined(self, parts: Sequence[Token], whole: Token) -> bool:
        if len(parts) < 2 or not all(_are_words(part, whole) for part in parts) or parts[0].breaks:
            return False
        if any(part.name for part in parts) or "".join(part.text for part in parts) != whole.text:
            return False
        listed = f"{parts[0].text} {parts[1].text}" in self._rules.joined
        hyphen = parts[0].hyphened and parts[1].hyphened and min(len(part.text) for part in parts) >= _SHORTEST_PART
        return listed or (hyphen and whole.text in self._lexicon)

    def _refusal(self, a: Sequence[Token], i: int, b: Sequence[Token], j: int) -> Verdict:
        left, right = _difference(_texts(a[i : i + _WINDOW]), _texts(b[j : j + _WINDOW]))
        changed_a, changed_b = list(a[i : i + max(len(left), 1)]), list(b[j : j + max(len(right), 1)])
        changed = [*changed_a[: len(left)], *changed_b[: len(right)]] or [*changed_a, *changed_b]
        rest = sorted(_texts(a[i:])), sorted(_texts(b[j:]))
        rule = _name_of(changed, left, right, self._rules, moved=rest[0] == rest[1])
        return Verdict(False, rule, tuple(left), tuple(right))


def _is_plural(token: Token) -> bool:
    return token.kind is Kind.WORD and token.text.endswith("s") and not token.text.endswith("ss")


def _mark_of(token: Token) -> str:
    # Which mark ends a sentence or a clause is a matter of taste, that one ends there is not.
    return {"!": ".", ";": ",", "-": ","}.get(token.mark, token.mark)


def _are_words(x: Token, y: Token) -> bool:
    return all(t.kind is Kind.WORD and not t.exact and not t.quoted for t in (x, y))


def _is_another_ending(short: str, long: str) -> bool:
    """Whether one vowel of the last letters stands for another: hexane and hexene, llegaré and llegará."""
    if len(short) != len(long):
        return False
    at = next(k for k, (p, q) in enumerate(zip(short, long, strict=True)) if p != q)
    changed = fold_accents(short[at]) + fold_accents(long[at])
    return at >= len(short.removesuffix("s")) - _ENDING and all(letter in "aeiouy" for letter in changed)


def _name_of(changed: Sequence[Token], left: Sequence[str], right: Sequence[str], rules: Rules, *, moved: bool) -> Rule:
    """What to call a difference that refuses."""
    kinds = {token.kind for token in changed}
    words = {token.text for token in changed}
    named = (
        (Kind.PAYLOAD in kinds, Rule.PAYLOAD),
        (Kind.CODE in kinds, Rule.CODE),
        (any(token.quoted for token in changed), Rule.QUOTED),
        (not words.isdisjoint(rules.negations), Rule.NEGATION),
        (Kind.NUMBER in kinds, Rule.NUMBER),
        (moved, Rule.ORDER),
        (any((p, q) in rules.antonyms for p in left for q in right), Rule.ANTONYM),
        (words <= rules.units, Rule.UNIT),
        (Kind.IDENTIFIER in kinds, Rule.IDENTIFIER),
        (Kind.SYMBOL in kinds, Rule.SYMBOL),
        (any(token.name and len(token.text) > 1 for token in changed), Rule.NAME),
        (words <= rules.articles.words, Rule.ARTICLE),
        (not words.isdisjoint(rules.function_words), Rule.FUNCTION_WORD),
    )
    return next((rule for holds, rule in named if holds), Rule.CONTENT_WORD)


def _difference(left: Sequence[str], right: Sequence[str]) -> tuple[list[str], list[str]]:
    """The first stretch in which two lists differ, on either side."""
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        if tag != "equal":
            return list(left[i1:i2]), list(right[j1:j2])
    return [], []


def _texts(tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(token.text for token in tokens)


def _shown(token: Token) -> str:
    return token.text.capitalize() if token.name else token.text
