"""Why a call is or is not answered from the cache: key parts, candidates, the rule that decided. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from hashlib import sha256
from typing import Any

from proxy.cache.near.matcher import Judged
from proxy.cache.near.prompt import Prompt
from proxy.cache.near.tier import Nearest, NearTier
from proxy.cache.parts import Span

_SHOWN_TEXT = 300
_MOST_TOKENS = 200
_BEFORE = 8


def told_parts(parts: Mapping[str, str]) -> list[dict[str, Any]]:
    """The key parts, each with a digest to compare by eye, its size in characters and how it begins."""
    return [
        {
            "name": name,
            "digest": sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12],
            "characters": len(text),
            "text": _shortened(text),
        }
        for name, text in parts.items()
    ]


async def told_words(words: str | None, near: NearTier | None) -> dict[str, Any] | None:
    """How the near tier reads the compared words; None where there are none or it is not loaded."""
    if words is None or near is None:
        return None
    prompt = await near.prepare(words)
    return {
        "text": _shortened(words),
        "rules": prompt.language or "strict",
        "compared": [token.text for token in prompt.tokens] or [prompt.strict],
        "payload": [token.text for token in prompt.tokens if token.kind == "payload"],
        "long": not near.matcher.band_keys(prompt, b""),
    }


async def told_candidates(words: str, nearest: Nearest, near: NearTier) -> list[dict[str, Any]]:
    """The candidates, the deciding one first, with scores, verdicts and differences."""
    asked = await near.prepare(words)
    ranked = sorted(nearest.judged, key=lambda one: (not one.verdict.same, -one.score))
    return [await _told(asked, one, near) for one in ranked]


async def _told(asked: Prompt, one: Judged, near: NearTier) -> dict[str, Any]:
    stored = await near.prepare(one.candidate.words)
    return {
        "id": one.candidate.key[:16].hex(),
        "words": _shortened(one.candidate.words),
        "score": round(one.score, 4),
        "same": one.verdict.same,
        "rule": one.verdict.rule.value,
        "asked": list(one.verdict.asked),
        "stored": list(one.verdict.stored),
        "difference": difference(_compared(asked), _compared(stored)),
    }


def told_spans(differing: Sequence[Span]) -> list[dict[str, Any]]:
    """Where a call differs from another one, part by part."""
    return [asdict(span) for span in differing]


def difference(asked: Sequence[str], stored: Sequence[str]) -> str:
    """Two lists of tokens as one text: [-what only the stored prompt has-] and {+what only the asked one has+}."""
    out: list[str] = []
    asked, stored, skipped = _differing(asked, stored)
    if skipped:
        out.append("…")
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, stored, asked, autojunk=False).get_opcodes():
        if tag == "equal":
            out.append(" ".join(stored[i1:i2]))
            continue
        if i1 < i2:
            out.append(f"[-{' '.join(stored[i1:i2])}-]")
        if j1 < j2:
            out.append(f"{{+{' '.join(asked[j1:j2])}+}}")
    return _shortened(" ".join(out))


def _differing(asked: Sequence[str], stored: Sequence[str]) -> tuple[Sequence[str], Sequence[str], bool]:
    """Long lists from shortly before the first difference on: comparing all of them would take seconds."""
    if max(len(asked), len(stored)) <= _MOST_TOKENS:
        return asked, stored, False
    pairs = enumerate(zip(asked, stored, strict=False))
    first = next((at for at, (a, b) in pairs if a != b), min(len(asked), len(stored)))
    start = max(0, first - _BEFORE)
    return asked[start : start + _MOST_TOKENS], stored[start : start + _MOST_TOKENS], start > 0


def _compared(prompt: Prompt) -> list[str]:
    return [token.text for token in prompt.tokens] or prompt.strict.split()


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}…"
