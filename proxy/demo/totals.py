"""What the requests cost, and what they would have cost without the cache. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

HITS = frozenset({"HIT", "NEAR", "STALE", "JOINED"})
"""Values of X-Cache for answers that the upstream was not asked for again."""


@dataclass(frozen=True)
class Row:
    """One request and how it went; times in milliseconds."""

    number: int
    question: str
    turn: int
    form: str
    outcome: str
    first_token_ms: float
    total_ms: float

    @property
    def is_hit(self) -> bool:
        """Whether the cache answered."""
        return self.outcome in HITS


@dataclass(frozen=True)
class Totals:
    """Sums over all requests; times in milliseconds, medians None where there is nothing to take one of."""

    requests: int
    hits: int
    misses: int
    outcomes: dict[str, int]
    spent_ms: float
    without_cache_ms: float
    saved_ms: float
    saved_percent: float
    median_hit_ms: float | None
    median_miss_ms: float | None


def totals(rows: Sequence[Row]) -> Totals:
    """Add up; without the cache, a hit counts with the measured time of the miss before it for the same question."""
    cost: dict[str, float] = {}
    without = 0.0
    for row in rows:
        if not row.is_hit:
            cost[row.question] = row.total_ms
        without += cost.get(row.question, row.total_ms)
    spent = sum(row.total_ms for row in rows)
    hits = [row.total_ms for row in rows if row.is_hit]
    misses = [row.total_ms for row in rows if not row.is_hit]
    return Totals(
        requests=len(rows),
        hits=len(hits),
        misses=len(misses),
        outcomes=dict(Counter(row.outcome for row in rows)),
        spent_ms=spent,
        without_cache_ms=without,
        saved_ms=without - spent,
        saved_percent=100 * (without - spent) / without if without else 0.0,
        median_hit_ms=median(hits) if hits else None,
        median_miss_ms=median(misses) if misses else None,
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The totals and every request, for JSON; times in milliseconds, to a thousandth."""
    values = asdict(totals(rows))
    return {**_rounded(values), "rows": [_rounded(asdict(row)) for row in rows]}


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
