"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from typing import Any, assert_never

from rich.table import Table


class Judged(StrEnum):
    """What of a measurement a target speaks of."""

    RATIO = "ratio"
    """nearhit divided by the reference."""
    ADDED = "added"
    """nearhit minus the reference."""
    VALUE = "value"
    """nearhit alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: a value of each round, in the order of the rounds, in `unit`; no `limit`: for information."""

    what: str
    unit: str
    nearhit: tuple[float, ...]
    reference: tuple[float, ...] = ()
    reference_name: str = ""
    judged: Judged = Judged.RATIO
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """nearhit divided by the reference of the same round; the median over rounds."""
        return median(n / r for n, r in self._pairs) if self.reference else None

    @property
    def score(self) -> float | None:
        """The figure that the target limits."""
        match self.judged:
            case Judged.VALUE:
                return median(self.nearhit)
            case Judged.ADDED:
                return median(n - r for n, r in self._pairs)
            case Judged.RATIO:
                return self.ratio
            case _:
                assert_never(self.judged)

    @property
    def holds(self) -> bool | None:
        """Whether the target holds; None where there is none."""
        return None if self.limit is None or self.score is None else self.score <= self.limit

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        return list(zip(self.nearhit, self.reference, strict=True))


def table_of(rows: Sequence[Row]) -> Table:
    """One line for each row; the values are medians over the rounds."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("what", no_wrap=True)
    for title in ("reference", "nearhit", "ratio", "target", "ok"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        reference = f"{row.reference_name} {_number(median(row.reference))}" if row.reference else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        value = f"{_number(median(row.nearhit))} {row.unit}"
        table.add_row(row.what, reference, value, ratio, _target(row), _OK[row.holds])
    return table


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every value of every round, with score and verdict."""
    return [{**asdict(row), "ratio": row.ratio, "score": row.score, "holds": row.holds} for row in rows]


_OK = {True: "[green]yes[/green]", False: "[red]NO[/red]", None: ""}


def _target(row: Row) -> str:
    if row.limit is None:
        return ""
    match row.judged:
        case Judged.RATIO:
            return f"<= {row.limit:g}x"
        case Judged.ADDED:
            return f"<= +{row.limit:g} {row.unit} ({row.score:+.2f})"
        case Judged.VALUE:
            return f"<= {row.limit:g} {row.unit}"
        case _:
            assert_never(row.judged)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
