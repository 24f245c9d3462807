"""How much an entry is worth keeping: GreedyDual-Size-Frequency (Cherkasova, HP Labs technical report HPL-98-69, 1998).

What an entry gains is the upstream time that its uses have cost or saved, for each byte that it takes. Its worth is
that, on top of the floor of the moment at which it was last used; the floor is the worth of whatever last had to go. So
uses of long ago count less and less as others come, and no clock is needed. `docs/eviction.md` compares it with others.
"""

from __future__ import annotations

_ROW_BYTES = 3000
"""About what an entry takes on disk beside its answer."""

USED_SQL = f"(SELECT floor FROM ageing) + (1.0 + hits + ?) * max(cost_ms, 1) / (size + {_ROW_BYTES})"  # noqa: S608 - a number of ours
"""The worth of an entry after further uses, of which the number is to be bound."""


def gain(cost_ms: int, size: int, uses: int) -> float:
    """What `uses` (the first included) make of an answer of `size` bytes that took `cost_ms`; ms for each byte."""
    return uses * max(cost_ms, 1) / (size + _ROW_BYTES)
