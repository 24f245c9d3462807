"""What each Cache-Control directive comes to in each state: the table that the tests prove and the docs show.

`python -m tests.web.semantics` writes it into docs/http.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "http.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
TTL_S, AGE_S, LATE_S = 3600, 600, 60
"""How long answers live, how old the fresh one is, and for how long the stale one's time has been over."""


@dataclass(frozen=True)
class Result:
    """What the client sees, numbers of seconds as N; `asked` says that the upstream sees the request."""

    status: int
    outcome: str
    cache_status: str
    asked: bool


RESULTS: Mapping[str, Result] = {
    "hit": Result(200, "HIT", "nearhit; hit; ttl=N; detail=exact", asked=False),
    "joined": Result(200, "JOINED", "nearhit; fwd=miss; collapsed", asked=False),
    "stale": Result(200, "STALE", "nearhit; hit; ttl=-N; detail=stale", asked=False),
    "stale, tried": Result(200, "STALE", "nearhit; fwd=stale; fwd-status=503; detail=stale", asked=True),
    "miss": Result(200, "MISS", "nearhit; fwd=miss", asked=True),
    "miss, stale": Result(200, "MISS", "nearhit; fwd=stale", asked=True),
    "miss, wanted": Result(200, "MISS", "nearhit; fwd=request", asked=True),
    "bypass": Result(200, "BYPASS", "nearhit; fwd=bypass; detail=no-store", asked=True),
    "504": Result(504, "MISS", "nearhit; detail=only-if-cached", asked=False),
    "error": Result(503, "MISS", "nearhit; fwd=miss", asked=True),
    "error, stale": Result(503, "MISS", "nearhit; fwd=stale", asked=True),
    "error, wanted": Result(503, "MISS", "nearhit; fwd=request", asked=True),
    "error, bypass": Result(503, "BYPASS", "nearhit; fwd=bypass; detail=no-store", asked=True),
}

STATES: Mapping[str, str] = {
    "absent": "nothing is stored",
    "in flight": "nothing is stored, and an equal call is under way",
    "fresh": f"stored {AGE_S} s ago for {TTL_S} s",
    "stale": f"its time was over {LATE_S} s ago",
    "fresh, failing": "fresh, and the server says 503",
    "stale, failing": "stale, and the server says 503",
    "stale, away": "stale, and the server is known to be down or loading",
    "gone, failing": "its time and its grace are over, and the server says 503",
}

_Row = tuple[str, ...]


def _row(fresh: str, stale: str, *, failing: tuple[str, str, str, str]) -> _Row:
    return "miss", "joined", fresh, stale, *failing


_USUAL = _row("hit", "miss, stale", failing=("hit", "stale, tried", "stale", "error"))
_NOTHING_STALE = _row("hit", "miss, stale", failing=("hit", "error, stale", "error, stale", "error"))
_STALE_TOO = _row("hit", "stale", failing=("hit", "stale", "stale", "error"))
_NOT_EVEN_THIS = _row("miss, wanted", "miss, stale", failing=("error, wanted", "error, stale", "error, stale", "error"))

TABLE: Mapping[str, _Row] = {
    "(none)": _USUAL,
    "no-cache": ("miss, wanted",) * 4 + ("error, wanted",) * 4,
    "no-store": ("bypass",) * 4 + ("error, bypass",) * 4,
    "only-if-cached": ("504", "504", "hit", "504", "hit", "504", "stale", "504"),
    "max-age=60": _NOT_EVEN_THIS,
    "max-age=1800": _NOTHING_STALE,
    "min-fresh=60": _NOTHING_STALE,
    "min-fresh=3500": _NOT_EVEN_THIS,
    "max-stale": _STALE_TOO,
    "max-stale=30": _NOTHING_STALE,
    "max-stale=120": _STALE_TOO,
    "stale-if-error=0": _NOTHING_STALE,
    "stale-if-error=30": _NOTHING_STALE,
    "stale-if-error=120": _USUAL,
    "max-age=1800, stale-if-error=3600": _USUAL,
    "max-age, unknown=1": _USUAL,
}
"""By directive, for each of `STATES` in their order, one of `RESULTS`."""


def rendered() -> str:
    """The tables as Markdown."""
    return "\n".join([*_states(), "", *_table(), "", *_results(), ""])


def _states() -> Iterator[str]:
    yield "| state | meaning |"
    yield "|---|---|"
    yield from (f"| {state} | {meaning} |" for state, meaning in STATES.items())


def _table() -> Iterator[str]:
    yield f"| `Cache-Control` | {' | '.join(STATES)} |"
    yield "|---" * (len(STATES) + 1) + "|"
    for directive, cells in TABLE.items():
        name = directive if directive == "(none)" else f"`{directive}`"
        yield f"| {name} | {' | '.join(cells)} |"


def _results() -> Iterator[str]:
    yield "| result | status | `X-Cache` | `Cache-Status` | server asked |"
    yield "|---|---|---|---|---|"
    for name, result in RESULTS.items():
        asked = "yes" if result.asked else "no"
        yield f"| {name} | {result.status} | `{result.outcome}` | `{result.cache_status}` | {asked} |"


def page(text: str) -> str:
    """The page with the tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + rendered() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
