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
_SMILEYS = re.compile(
    "(?:\\s*[\U0001f600-\U0001f64f\U0001f44b-\U0001f44f\U0001f917\u2764\u263a][\ufe0f\U0001f3fb-\U0001f3ff]?)+\\s*\\Z"
)


def fold_typography(text: str) -> str:
    """Fold spellings of the same characters, which is safe in every language.

    NFC; curly quotes, dashes, exotic spaces and full-width ASCII become plain, invisible characters go. Never NFKC: 10²
    is not 102.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY)


def collapse(text: str) -> str:
    """The text with one space for each run of white space, but not where there are code fences."""
    return text.strip() if _FENCE in text else _SPACE.sub(" ", text).strip()


def without_smileys(text: str) -> str:
    """The text without smileys at its end."""
    return text if text.isascii() else _SMILEYS.sub("", text)


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
    quotes. `name` says that it is capitalised in the middle of a sentence, `breaks` that punctuation follows (`comma`,
    `colon`: which), `start` and `end` where it stands in the text.
    """

    text: str
    kind: Kind
    exact: bool
    quoted: bool = False
    name: bool = False
    breaks: bool = False
    comma: bool = False
    colon: bool = False
    start: int = 0
    end: int = 0


_TOKEN = re.compile(
    r"""
   (?P<code>```.*?(?:```|\Z)|`[^`\n]+`)
 | (?P<url>https?://\S+|www\.\S+|\S+@\S+\.\w+)
 | (?P<path>(?:~|\.{1,2})?/[\w.\-/]+|[A-Za-z]:\\\S+|\w[\w\-]*/[\w.\-/]+\.\w+)
 | (?P<flag>(?<!\S)-{1,2}[A-Za-z][\w\-]*)
 | (?P<version>\b[vV]\d+(?:\.\d+)*\w*)
 | (?P<number>(?<![\w)])[-+](?=\d)|\d+(?:[.,:/]\d+)*)(?:(?P<unit>[A-Za-zµ°]+\b)|\s(?P<degrees>°[CF]\b))?
 | (?P<language>\b(?:[A-Za-z](?:\+\+|\#)|[A-Z]\*)(?!\w))
 | (?P<identifier>\b\w*(?:[a-z0-9][A-Z]|_|::)\w*(?:\(\))?|\b[A-Za-z]\w*(?:\.[A-Za-z]\w*)+(?:\(\))?
     |\b[A-Za-z]+\d\w*(?:-\w+)*|\b\d+[a-zA-Z]+\w*|\b\w+-\d\w*)
 | (?P<word>[^\W\d_]+(?:['][^\W\d_]+)*)
 | (?P<symbol>\S)
""",
    re.VERBOSE | re.DOTALL,
)
_QUOTE = re.compile(r'"[^"\n]{1,400}"|(?<!\w)\'[^\'\n]{2,400}\'(?!\w)')
_WORDS = re.compile(r"[^\W\d_]{2,}")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_PUNCTUATION = frozenset(".,;:?!¿¡\"'·•")
_SENTENCE_END = frozenset(".?!:")
_CASE_COUNTS_IN_UNITS = {"Kb": "kbit", "Mb": "mbit", "Gb": "gbit", "Tb": "tbit", "mW": "milliwatt", "MW": "megawatt"}
_LONGEST_UNIT = 4
_FOLDED = frozenset({"identifier", "version"})
_BARE_END = ".,;:?!"


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
    manner = _manner(text)
    quotes = quotations(text)
    out: list[Token] = []
    first = True
    for match in _TOKEN.finditer(text):
        group, found, at = match.lastgroup, match.group(0), match.start()
        quoted = bool(quotes) and any(a <= at < b for a, b in quotes)
        if match.group("number") is not None:
            out.extend(_number(match, quoted=quoted))
        elif group == "word":
            name = manner.is_name(found, first=first)
            lone = len(found) == 1 and name and found != "I"
            # "vitamin A", "plan B": a letter that is no article.
            kind = Kind.IDENTIFIER if lone else Kind.WORD
            out.append(Token(found, kind, lone, quoted, name, start=at, end=match.end()))
        elif group == "symbol":
            ends = _symbol(match, out, text, quoted=quoted)
            first = first or ends
            continue
        else:
            out.append(_verbatim(match, str(group), quoted=quoted))
        first = False
    return out


def _manner(text: str) -> _Manner:
    upper, lower = sum(map(str.isupper, text)), sum(map(str.islower, text))
    words = _WORDS.findall(text)
    titled = len(words) >= 4 and sum(word[0].isupper() for word in words) >= 0.8 * len(words)
    return _Manner(shouting=upper > 3 * lower and upper > 8, titled=titled)


def _number(match: re.Match[str], *, quoted: bool) -> list[Token]:
    number, unit = match.group("number"), match.group("unit") or match.group("degrees")
    start, end = match.start(), match.end()
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    if number in "+-":
        return [Token(number, Kind.SYMBOL, exact=True, quoted=quoted, start=start, end=end)]
    if unit and len(unit) > _LONGEST_UNIT:
        return [Token((number + unit).casefold(), Kind.IDENTIFIER, exact=True, quoted=quoted, start=start, end=end)]
    tokens = [Token(number, Kind.NUMBER, exact=True, quoted=quoted, start=start, end=end)]
    if unit:
        tokens.append(Token(unit, Kind.WORD, exact=False, quoted=quoted, start=start, end=end))
    return tokens


def _verbatim(match: re.Match[str], group: str, *, quoted: bool) -> Token:
    found = match.group(0)
    if group in _FOLDED:
        # Error codes, camelCase: case does not set answers apart. In flags, paths and code it does.
        found = found.casefold()
    if group == "language":
        found = found.upper()
    if group in ("path", "url"):
        found = found.rstrip(_BARE_END)
    kind = Kind.CODE if group == "code" else Kind.IDENTIFIER
    return Token(found, kind, exact=True, quoted=quoted, start=match.start(), end=match.end())


def _symbol(match: re.Match[str], out: list[Token], text: str, *, quoted: bool) -> bool:
    """Keep a symbol that counts; True where it ends a sentence."""
    symbol, at, end = match.group(0), match.start(), match.end()
    token = Token(symbol, Kind.SYMBOL, exact=True, quoted=quoted, start=at, end=end)
    if symbol in _PUNCTUATION:
        if symbol == "!" and text[end : end + 1].isalnum():
            out.append(token)
        elif out and symbol in ".,;:?!":
            out[-1].breaks = True
            out[-1].comma = symbol == ","
            out[-1].colon = symbol == ":"
        return symbol in _SENTENCE_END
    if symbol == "-":
        left, right = text[:at].rstrip()[-1:], text[end:].lstrip()[:1]
        if not ((left.isdigit() or left == ")") and (right.isdigit() or right == "(")):
            if out and text[at - 1 : at] == " " and text[end : end + 1] == " ":
                out[-1].breaks = True
            return False
    if symbol == "/" and out and out[-1].kind is Kind.WORD:
        return False
    out.append(token)
    return False


def unit_of(word: str, units: frozenset[str]) -> str:
    """What a unit after a number is compared as, "" where it is none; Mb is not MB, single letters keep their case."""
    if len(word) == 1:
        return word
    return _CASE_COUNTS_IN_UNITS.get(word) or (word.casefold() if word.casefold() in units else "")
