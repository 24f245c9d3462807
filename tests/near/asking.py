"""Asks one prompt where another is stored, and the labelled pairs of prompts."""

# ruff: noqa: RUF001 - prompts in many scripts

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.cache.near.guard import Verdict
from proxy.cache.near.matcher import Judged, Matcher
from proxy.cache.near.sketch import jaccard, shingles
from storage.base import Candidate

SPACE = bytes(16)
THRESHOLD = 0.6
CASES = sorted((Path(__file__).parent / "cases").glob("*.jsonl"))

# Prompts that do not work on their own wording, without courtesy; to be edited by properties.
ENGLISH = (
    "How do I drive from the harbour to the old bridge?",
    "Set a timer for 25 minutes in the kitchen",
    "What is the difference between a lake and a pond?",
    "Can I take the dog on the train to Oslo with me?",
    "Why does the pump in our cellar start at 3 in the night?",
    "Which tram goes to the museum after 10:30 in the evening?",
    "Remind me to call my sister about the 2 tickets",
    "How long do potatoes need in an oven at 180 degrees?",
    "Turn off the lamp in the hall when I leave the house",
    "Is there a bakery near the station that opens before 7?",
    "How many people live on the island of Malta in the winter?",
    "What should I do if the engine of my boat gets too hot?",
)
SPANISH = (
    "¿Cómo llego de la estación al puerto sin coche?",
    "Pon un temporizador de 25 minutos en la cocina",
    "¿Puedo llevar el perro en el tren a Lisboa conmigo?",
    "¿Por qué la bomba del sótano arranca a las 3 de la noche?",
    "Recuérdame que llame a mi hermana por las 2 entradas",
    "¿Cuánto tardan las patatas en el horno a 180 grados?",
    "Apaga la luz del pasillo cuando salga de la casa",
    "¿Hay una panadería cerca de la plaza que abra antes de las 7?",
)
OTHER = (
    "Wann fährt der Zug nach Hamburg ab, und wie viel kostet er?",
    "Où est la gare de Lyon, et combien de trains partent à midi ?",
    "上海有什么好吃的特产？",
    "東京から大阪まで何時間かかりますか？",
    "Где находится ближайшая аптека на этой улице?",
    "Tren İzmir'e kaçta varıyor?",
    "कल दिल्ली में कितनी गर्मी थी?",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts and whether the answer of one is right for the other."""

    a: str
    b: str
    same: bool
    kind: str


def pairs(file: Path) -> list[Pair]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Pair(row["a"], row["b"], row["same"], row["kind"]) for row in rows]


class Asking:
    """Looks at two prompts the way a cache does: one is stored, the other is asked."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher

    def verdict(self, asked: str, stored: str) -> Verdict:
        """The guard's verdict, however similar the two are."""
        return self._judged(asked, stored, 0.0).verdict

    def is_hit(self, asked: str, stored: str) -> bool:
        """Whether the stored prompt is found and passes."""
        return self.is_found(asked, stored) and self.verdict(asked, stored).same

    def is_found(self, asked: str, stored: str) -> bool:
        """Whether the two share a key of equal forms, or are similar enough."""
        a, b = self.matcher.prepare(asked), self.matcher.prepare(stored)
        similar = jaccard(shingles(a.skeleton), shingles(b.skeleton)) >= THRESHOLD
        return similar or self.share_a_key(asked, stored)

    def share_a_key(self, asked: str, stored: str) -> bool:
        return not self.keys(asked).isdisjoint(self.keys(stored))

    def keys(self, text: str, space: bytes = SPACE) -> set[int]:
        """The keys of equal forms."""
        return set(self.matcher.equal_keys(self.matcher.prepare(text), space))

    def candidate(self, text: str) -> Candidate:
        return Candidate(text.encode("utf-8", "surrogatepass"), text, self.matcher.prepare(text).skeleton, 1)

    def judged(self, asked: str, stored: list[Candidate], threshold: float) -> list[Judged]:
        return list(self.matcher.judge(self.matcher.prepare(asked), stored, threshold))

    def _judged(self, asked: str, stored: str, threshold: float) -> Judged:
        return self.judged(asked, [self.candidate(stored)], threshold)[0]
