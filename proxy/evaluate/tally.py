"""Counting look-ups: how many hit, how many of these wrongly, and how sure that is. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Any

from proxy.evaluate.forms import Outcome
from proxy.evaluate.world import EXACT

MOST_SHOWN = 200
"""Cases that are kept of each set."""
NOT_FOUND = "not-found"
"""In place of a rule: no entry that should have answered was ever compared."""
UNNAMED = "(none)"
"""The kind or source of rows that name none."""

_Z = 1.96
_TIERS = (EXACT, "key", "sketch")


class Show(StrEnum):
    """Which cases to keep: false hits, or look-ups that missed an entry that should have answered."""

    FALSE = "false"
    MISSED = "missed"


@dataclass(slots=True)
class Counts:
    """Look-ups; `positives` are those for which some entry's answer was right."""

    lookups: int = 0
    positives: int = 0
    hits: int = 0
    false_hits: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        self.lookups += 1
        self.positives += outcome.positive
        self.hits += outcome.hit
        self.false_hits += outcome.false

    def as_json(self) -> dict[str, int]:
        """For programs."""
        return {
            "lookups": self.lookups,
            "positives": self.positives,
            "hits": self.hits,
            "false_hits": self.false_hits,
        }


@dataclass(frozen=True, slots=True)
class Case:
    """A look-up to show.

    `stored` and `asked` are the two texts, `differences` the words in which they differ. `rule` decided, or is
    `NOT_FOUND` or `EXACT`; `score` is None where nothing was compared.
    """

    line: int
    kind: str
    stored: str
    asked: str
    rule: str
    score: float | None
    tier: str | None
    differences: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "line": self.line,
            "kind": self.kind,
            "stored": self.stored,
            "asked": self.asked,
            "rule": self.rule,
            "score": self.score,
            "tier": self.tier,
            "differences": [list(pair) for pair in self.differences],
        }


@dataclass(slots=True)
class Tally:
    """The look-ups of one file in one form; `cases` has the first `MOST_SHOWN` of those asked for."""

    show: Show | None = None
    all: Counts = field(default_factory=Counts)
    by_kind: dict[str, Counts] = field(default_factory=dict)
    by_source: dict[str, Counts] = field(default_factory=dict)
    by_tier: Counter[str] = field(default_factory=Counter)
    by_rule: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    cases: list[Case] = field(default_factory=list)
    cases_left_out: int = 0
    near_us: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one look-up."""
        origin = outcome.origin
        self.all.add(outcome)
        self.by_kind.setdefault(origin.kind or UNNAMED, Counts()).add(outcome)
        self.by_source.setdefault(origin.source or UNNAMED, Counts()).add(outcome)
        if outcome.found.tier is not None:
            self.by_tier[outcome.found.tier] += 1
        if outcome.hit and outcome.judged is not None:
            self.by_rule[outcome.judged.verdict.rule.value] += 1
        if outcome.missed:
            self.refused[_rule(outcome)] += 1
        if outcome.found.near_us is not None:
            self.near_us.append(outcome.found.near_us)
        self._keep(outcome)

    def as_json(self) -> dict[str, Any]:
        """For programs; rates are None where there is nothing to divide by. Times are those of near look-ups."""
        counts, right = self.all, self.all.hits - self.all.false_hits
        kept = {"cases": [case.as_json() for case in self.cases], "cases_left_out": self.cases_left_out}
        return {
            **counts.as_json(),
            "recall": _share(right, counts.positives),
            "hit_rate": _share(counts.hits, counts.lookups),
            "possible_hit_rate": _share(counts.positives, counts.lookups),
            "false_per_hit": _share(counts.false_hits, counts.hits),
            "false_per_hit_upper95": self.upper,
            "false_per_lookup": _share(counts.false_hits, counts.lookups),
            "by_kind": {kind: of.as_json() for kind, of in sorted(self.by_kind.items())},
            "by_source": {source: of.as_json() for source, of in sorted(self.by_source.items())},
            "by_tier": {tier: self.by_tier[tier] for tier in _TIERS},
            "by_rule": dict(self.by_rule.most_common()),
            "refused": dict(self.refused.most_common()),
            "us_per_lookup_p50": percentile(self.near_us, 50),
            "us_per_lookup_p99": percentile(self.near_us, 99),
            **(kept if self.show else {}),
        }

    @property
    def upper(self) -> float | None:
        """The upper end of the 95 % interval of false hits per hit."""
        return wilson_upper(self.all.false_hits, self.all.hits) if self.all.hits else None

    def _keep(self, outcome: Outcome) -> None:
        if not {Show.FALSE: outcome.false, Show.MISSED: outcome.missed, None: False}[self.show]:
            return
        if len(self.cases) < MOST_SHOWN:
            self.cases.append(_case(outcome))
        else:
            self.cases_left_out += 1


def wilson_upper(count: int, of: int) -> float:
    """The upper end of the two-sided 95 % interval of a share (Wilson 1927), 0 to 1; `of` is at least 1."""
    share, square = count / of, _Z * _Z
    centre = share + square / (2 * of)
    margin = _Z * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return min(1.0, (centre + margin) / (1 + square / of))


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The smallest value that at least so many percent do not exceed, to a tenth; None where there are none."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)], 1)


def differences(stored: str, asked: str) -> tuple[tuple[str, str], ...]:
    """The stretches of words in which two texts differ, on either side."""
    a, b = stored.split(), asked.split()
    codes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return tuple((" ".join(a[i1:i2]), " ".join(b[j1:j2])) for tag, i1, i2, j1, j2 in codes if tag != "equal")


def _share(count: int, of: int) -> float | None:
    return round(count / of, 6) if of else None


def _rule(outcome: Outcome) -> str:
    if outcome.judged is not None:
        return outcome.judged.verdict.rule.value
    return EXACT if outcome.hit else NOT_FOUND


def _case(outcome: Outcome) -> Case:
    stored, asked = outcome.stored.shown if outcome.stored else "", outcome.asked.shown
    return Case(
        line=outcome.origin.line,
        kind=outcome.origin.kind,
        stored=stored,
        asked=asked,
        rule=_rule(outcome),
        score=round(outcome.judged.score, 3) if outcome.judged else None,
        tier=outcome.found.tier,
        differences=differences(stored, asked),
    )
