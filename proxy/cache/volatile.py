"""Whether a prompt speaks of the present, so that its answer is soon out of date. Pure but for reading its own data.

Every language's list is looked for in every prompt: taking one for volatile too often only shortens a lifetime.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml

_QUOTED = re.compile(
    r"```.*?```|`[^`]*`|\"[^\"]*\"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』|(?<!\w)'[^'\n]*'(?!\w)", re.DOTALL
)
_LANGUAGES = Path(__file__).parent / "languages"


def is_volatile(text: str) -> bool:
    """Whether the text, quotations and code left out, speaks of now, today, the latest, the weather and the like."""
    spoken = _QUOTED.sub(" ", text) if text else ""
    return bool(spoken) and _pattern().search(spoken) is not None


def load() -> None:
    """Read the lists now, so that no call waits for the disk."""
    _pattern()


@functools.cache
def _pattern() -> re.Pattern[str]:
    spaced: list[str] = []
    unspaced: list[str] = []
    for path in sorted(_LANGUAGES.glob("*.yaml")):
        language = yaml.safe_load(path.read_text(encoding="utf-8"))
        (spaced if language["spaces"] else unspaced).extend(language["volatile"])
    # Where words are not set apart by spaces, a phrase counts anywhere.
    words = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in spaced)
    return re.compile(rf"\b(?:{words})\b|{'|'.join(map(re.escape, unspaced))}", re.IGNORECASE)
