"""Which language a prompt is in, where that is plain: word lists of one language are wrong in another. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from proxy.cache.near.languages import Languages, fold_accents
from proxy.cache.near.lexicon import Lexicon

_LEAST_WORDS = 2
_FEW_WORDS = 4
_LEAST_KNOWN = 0.6
_LEAST_FUNCTION_WORDS = 0.1
_MARGIN = 1.2
_NEARLY_ALL_KNOWN = 0.9
_MARGIN_WHEN_KNOWN = 1.1


class Identifier:
    """Knows a language by its function words, and the languages with rules also by their words."""

    def __init__(self, languages: Languages, lexicons: Mapping[str, Lexicon]) -> None:
        """Learn the lists."""
        self._lexicons = lexicons
        self._languages_of: dict[str, tuple[str, ...]] = {}
        for code, words in languages.function_words.items():
            # Typed in a hurry, accents are left out: that must not make a language with rules look less like itself.
            for word in words | {fold_accents(word) for word in words} if code in lexicons else words:
                self._languages_of[word] = (*self._languages_of.get(word, ()), code)

    def identify(self, words: Sequence[str], signed: str = "") -> str:
        """The code of the language with rules that these lower-case words are plainly in, else "".

        `signed` is the language whose signs the text has.
        """
        if len(words) < _LEAST_WORDS:
            return ""
        grammar = Counter(code for word in words for code in self._languages_of.get(word, ()))
        known = {code: self._known(code, words) for code in self._lexicons}
        score = {code: count + 0.5 * known.get(code, 0) for code, count in grammar.items()}
        best = max(self._lexicons, key=lambda code: score.get(code, 0.0))
        others = max((value for code, value in score.items() if code != best), default=0.0)
        share = (grammar[best] + known[best]) / len(words)
        if best == signed and grammar[best]:
            return best
        if len(words) < _FEW_WORDS and share < 1:
            return ""
        plain = grammar[best] >= max(1, _LEAST_FUNCTION_WORDS * len(words)) and share >= _LEAST_KNOWN
        margin = _MARGIN_WHEN_KNOWN if share >= _NEARLY_ALL_KNOWN else _MARGIN
        return best if plain and score[best] >= margin * others else ""

    def _known(self, code: str, words: Sequence[str]) -> int:
        lexicon = self._lexicons[code]
        return sum(code not in self._languages_of.get(word, ()) and word in lexicon for word in words)
