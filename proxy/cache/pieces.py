"""Texts cut into what a model says at a time, for replays that take their time. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Japanese syllables
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese characters
    "\uac00-\ud7af"  # Korean
    "\U00020000-\U0003ffff"  # rarer Chinese characters
)
"""Scripts of which a token holds a character or two, most of them without blanks between words."""

_cut = re.compile(
    rf"""
    \s?(?: [{_UNSPACED}]{{1,2}} | [^\W\d_{_UNSPACED}]{{1,8}} | \d{{1,3}} | (?: [^\w\s{_UNSPACED}] | _ ){{1,3}} )
    | \s{{1,16}}
    | .
    """,
    re.VERBOSE | re.DOTALL,
).findall


def pieces(text: str) -> Sequence[str]:
    """The text in pieces of about one token each: words with the blank before them, long ones in parts.

    Joined they are the text. There is always one, an empty one of an empty text: an answer may have an empty text,
    which is not the same as none.
    """
    found: list[str] = _cut(text)
    return found or ("",)
