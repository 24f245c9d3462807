"""A prompt's text as tokens: what may be folded, and what counts as it stands. Pure."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum

_TYPOGRAPHY = {
    # Single quotes, prime, acute accent; double quotes and guillemets; hyphens, dashes, minus.
    **dict.fromkeys([0x2018, 0x2019, 0x201A, 0x2032, 0xB4], "'"),
    **dict.fromkeys([0x201C, 0x201D, 0x201E, 0xAB, 0xBB], '"'),
    **dict.fromkeys([*range(0x2010, 0x2015), 0x2212], "-"),
    **dict.fromkeys([0xA0, 0x202F, 0x3000, *range(0x2000, 0x200B)], " "),
    # Zero-width space, byte order mark, soft hyphen, word joiner. Not ZWJ and ZWNJ: some scripts need them.
    **dict.fromkeys([0x200B, 0xFEFF, 0xAD, 0x2060], ""),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    ord("…"): "...",
}
_FENCE = "```"
_SPACE = re.compile(r"\s+")
_SMILEYS = frozenset("🙂😊😀😃😄😁😉🤗🙏👋❤☺")
_SMILEY_TAIL = "\ufe0f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff \n\t"
_NEEDS_WHAT_FOLLOWS = re.compile(
    r"(?:\b(?:with|a|an|the|by|of|as|send|sends?|sent|say|me|con|un|una|el|la|de|react|emoji)|[:=])\s*\Z", re.IGNORECASE
)


def fold_typography(text: str) -> str:
    """Fold spellings of the same characters, which is safe in every language.

    NFC; curly quotes, dashes, exotic spaces and full-width ASCII become plain, invisible characters go. Never NFKC: 10²
    is not 102.
    """
    if text.isascii():
        return text
    # Twice: what an invisible character kept apart may belong together.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY))


def collapse(text: str) -> str:
    """The text with one space for each run of white space, but not where there are code fences."""
    return text.strip() if _FENCE in text else _SPACE.sub(" ", text).strip()


def without_smileys(text: str) -> str:
    """The text without friendly smileys at its end, where they are no part of a sentence."""
    if text.isascii():
        return text
    end = text.rstrip(_SMILEY_TAIL)
    while end and end[-1] in _SMILEYS:
        end = end[:-1].rstrip(_SMILEY_TAIL)
    return text if len(end) == len(text) or not end or _NEEDS_WHAT_FOLLOWS.search(end[-24:]) else end


class Kind(StrEnum):
    """What a token is."""

    WORD = "word"
    NUMBER = "number"
    IDENTIFIER = "identifier"
    CODE = "code"
    SYMBOL = "symbol"
    PAYLOAD = "payload"


@dataclass(slots=True)
class Token:
    """One token.

    `text` is what is compared, `kind` what it is. `exact` tokens count as they stand; `quoted` ones stand between
    quotes, `inside` ones in brackets, `hyphened` ones beside a hyphen that is none of their own. `name` says that it is
    capitalised in the middle of a sentence. `mark` is the punctuation that follows, "" where there is none. `start` and
    `end` are where it stands in the text.
    """

    text: str
    kind: Kind
    exact: bool
    quoted: bool = False
    name: bool = False
    mark: str = ""
    inside: bool = False
    hyphened: bool = False
    start: int = 0
    end: int = 0

    @property
    def breaks(self) -> bool:
        """Whether punctuation follows."""
        return self.mark != ""


# Every quantifier that could make a long run be read again from each of its places is anchored or bounded.
_TOKEN = re.compile(
    r"""
   (?P<code>```.*?(?:```|\Z)|`[^`\n]{1,2000}`)
 | (?P<url>https?://\S+|www\.\S+|(?<![\w.+\-])[\w.+\-]{1,64}@[\w\-]{1,63}(?:\.[\w\-]{1,63}){1,8})
 | (?P<path>(?<![\w)])(?:~|\.{1,2})?/[\w.\-]+(?:/[\w.\-]*)*|[A-Za-z]:\\\S+
     |(?<![\w\-])\w[\w\-]{0,255}/[\w.\-/]{1,255}\.\w+)
 | (?P<flag>(?<!\S)-{1,2}[A-Za-z][\w\-]*)
 | (?P<version>\b[vV]\d+(?:\.\d+)*\w*)
 | (?P<number>(?:(?<![\w)])[-+](?=\d)|(?<![\w.])\.\d+|\d+(?:[.,:/]\d+)*))
     (?:(?P<unit>[A-Za-zµ°]+\b)|\s(?P<degrees>°[CF]\b))?
 | (?P<language>\b(?:[A-Za-z](?:\+\+|\#)|[A-Z]\*)(?!\w))
 | (?P<identifier>\b(?=\w{0,80}(?:[a-z0-9][A-Z]|_)|\w{1,80}::)\w+(?:::\w+){0,8}(?:\(\))?
     |\b[A-Za-z]\w{0,80}(?:\.[A-Za-z]\w{0,80}){1,8}(?:\(\))?
     |\b[A-Za-z]{1,80}\d\w*(?:-\w+){0,8}|\b\d{1,80}[a-zA-Z]+\w*|(?<![\w\-])\w{1,80}-\d\w*)
 | (?P<word>[^\W\d_]+(?:['][^\W\d_]+)*)
 | (?P<symbol>\S)
""",
    re.VERBOSE | re.DOTALL,
)
_QUOTE = re.compile(r'"[^"\n]{1,400}"|(?<!\w)\'[^\'\n]{2,400}\'(?!\w)')
_WORDS = re.compile(r"[^\W\d_]{2,}")
_MARKS = frozenset(".,;:?!")
_SENTENCE_END = frozenset(".?!:")
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_BARE_END = ".,;:?!"
_LONGEST_UNIT = 4


@dataclass(frozen=True, slots=True)
class _Manner:
    """How the writer of a text uses capitals: all of it in capitals, or every word with one, tells nothing."""

    shouting: bool
    titled: bool

    def is_name(self, word: str, *, first: bool) -> bool:
        return word[0].isupper() and not (first or self.shouting or self.titled)


def quotations(text: str) -> list[tuple[int, int]]:
    """Where quotations begin and end, their marks included."""
    return [match.span() for match in _QUOTE.finditer(text)] if '"' in text or "'" in text else []


def is_uniform(text: str) -> bool:
    """Whether the writer's capitals tell nothing: all of it in capitals, or every word with one."""
    manner = _manner(text)
    return manner.shouting or manner.titled


def tokenize(text: str) -> list[Token]:
    """The tokens of a text whose typography is folded. Words come as they are spelled, case included."""
    return _Tokenizer(text).tokens()


class _Tokenizer:
    """One pass over one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._manner = _manner(text)
        self._quotes = quotations(text)
        self._delimiters = {place for start, end in self._quotes for place in (start, end - 1)}
        self._at_quote = 0
        self._depth = 0
        self._first = True
        self._out: list[Token] = []

    def tokens(self) -> list[Token]:
        for match in _TOKEN.finditer(self._text):
            group = match.lastgroup
            if match.group("number") is not None:
                self._number(match)
            elif group == "word":
                self._word(match)
            elif group == "symbol":
                self._symbol(match)
                continue
            else:
                self._verbatim(match, str(group))
            self._first = False
        return self._out

    def _add(self, text: str, kind: Kind, match: re.Match[str], *, exact: bool = True, name: bool = False) -> None:
        at, end = match.span()
        quoted, inside = self._is_quoted(at), self._depth > 0
        beside = self._text[at - 1 : at] == "-" or self._text[end : end + 1] == "-"
        self._out.append(Token(text, kind, exact, quoted, name, "", inside, beside, at, end))

    def _is_quoted(self, at: int) -> bool:
        while self._at_quote < len(self._quotes) and self._quotes[self._at_quote][1] <= at:
            self._at_quote += 1
        return self._at_quote < len(self._quotes) and self._quotes[self._at_quote][0] <= at

    def _word(self, match: re.Match[str]) -> None:
        word = match.group(0)
        name = self._manner.is_name(word, first=self._first)
        # "vitamin A", "plan B": a letter that is no article.
        lone = len(word) == 1 and name and word != "I"
        self._add(word, Kind.IDENTIFIER if lone else Kind.WORD, match, exact=lone, name=name)

    def _number(self, match: re.Match[str]) -> None:
        number, unit = match.group("number"), match.group("unit") or match.group("degrees")
        if number in "+-":
            self._add(number, Kind.SYMBOL, match)
        elif unit and len(unit) > _LONGEST_UNIT:
            self._add((number + unit).casefold(), Kind.IDENTIFIER, match)
        else:
            self._add(number, Kind.NUMBER, match)
            if unit:
                self._add(unit, Kind.WORD, match, exact=False)

    def _verbatim(self, match: re.Match[str], group: str) -> None:
        found = match.group(0)
        if group == "version" or (group == "identifier" and "." not in found):
            # Error codes, camelCase: case does not set answers apart. In flags, paths, file names and code it does.
            found = found.casefold()
        if group == "language":
            found = found.upper()
        if group in ("path", "url"):
            found = found.rstrip(_BARE_END) or found
        self._add(found, Kind.CODE if group == "code" else Kind.IDENTIFIER, match)

    def _symbol(self, match: re.Match[str]) -> None:
        """Keep a symbol, unless it is punctuation of a sentence or joins two words."""
        symbol, at, end = match.group(0), match.start(), match.end()
        before, after = self._text[at - 1 : at], self._text[end : end + 1]
        if symbol in _MARKS and not self._is_operator(symbol, before, after):
            if self._out:
                self._out[-1].mark = symbol
            self._first = self._first or symbol in _SENTENCE_END
            return
        if symbol in "¿¡•" or at in self._delimiters:
            return
        if symbol == "-" and self._out and before == " " and after == " " and self._out[-1].kind is Kind.WORD:
            self._out[-1].mark = "-"
            return
        if symbol == "-" and self._joins_words(at, end):
            return
        self._depth = max(0, self._depth + (symbol in _OPENING) - (symbol in _CLOSING))
        self._add(symbol, Kind.SYMBOL, match)

    def _is_operator(self, symbol: str, before: str, after: str) -> bool:
        """Whether a mark is no punctuation: 5!, !x, and a mark that stands alone, unless it only ends the text."""
        if symbol == "!" and (after.isalnum() or self._may_be_factorial(before)):
            return True
        alone = (before in " \n(" or before == "") and bool(self._out)
        if symbol in "?!":
            return alone and after not in ("", " ", "\n", "?", "!")
        return alone

    def _may_be_factorial(self, before: str) -> bool:
        # 5! and n!, but not "in 2021!".
        last = self._out[-1] if self._out and before.isalnum() else None
        return last is not None and len(last.text) <= (2 if last.kind is Kind.NUMBER else 1)

    def _joins_words(self, at: int, end: int) -> bool:
        # two-factor: both sides are words of at least two letters.
        return self._text[max(0, at - 2) : at].isalpha() and self._text[end : end + 2].isalpha() and at >= 2


def _manner(text: str) -> _Manner:
    words = _WORDS.findall(text)
    shouting = len(words) > 1 and sum(map(str.isupper, words)) > 0.75 * len(words)
    titled = len(words) >= 4 and sum(word[0].isupper() for word in words) >= 0.8 * len(words)
    return _Manner(shouting=shouting, titled=titled)


_HAS_PREFIX = re.compile(r"[munpkMGT](?:Pa|J|V|A|W|T|F|g|Hz|eV|bps|Bps|Ω|m|s|cal)|[KC]al|cal")
_CASE_COUNTS_IN_UNITS = {"Kb": "kbit", "Mb": "mbit", "Gb": "gbit", "Tb": "tbit"}
_CASE_SAYS_NOTHING = frozenset(
    "kb mb gb tb km kg cm mm ml lb lbs oz min mins hr hrs sec secs am pm mph kmh usd eur gbp tsp tbsp".split()  # noqa: SIM905
)


def unit_of(word: str, units: frozenset[str], *, uniform: bool) -> str:
    """What a unit after a number is compared as, "" where it is none.

    In short units case counts, but for the few that people write either way: MW is not mW, Mb is not MB. With
    `uniform`, capitals tell nothing.
    """
    folded = word.casefold()
    if uniform:
        return folded if folded in units or len(word) == 1 else ""
    if word in _CASE_COUNTS_IN_UNITS:
        return _CASE_COUNTS_IN_UNITS[word]
    if folded in _CASE_SAYS_NOTHING or (len(word) > _LONGEST_UNIT and folded in units):
        return folded
    short = len(word) <= _LONGEST_UNIT and (folded in units or _HAS_PREFIX.fullmatch(word) is not None)
    return word if short or len(word) == 1 else ""
