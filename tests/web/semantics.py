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

TABLE: Mapping[str, tuple[str, ...]] = {
    "(none)": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "stale, tried",
        "stale",
        "error",
    ),
    "no-cache": (
        "miss, wanted",
        "miss, wanted",
        "miss, wanted",
        "miss, wanted",
        "error, wanted",
        "error, wanted",
        "error, wanted",
        "error, wanted",
    ),
    "no-store": (
        "bypass",
        "bypass",
        "bypass",
        "bypass",
        "error, bypass",
        "error, bypass",
        "error, bypass",
        "error, bypass",
    ),
    "only-if-cached": ("504", "504", "hit", "504", "hit", "504", "stale", "504"),
    "max-age=60": (
        "miss",
        "joined",
        "miss, wanted",
        "miss, stale",
        "error, wanted",
        "error, stale",
        "error, stale",
        "error",
    ),
    "max-age=1800": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "error, stale",
        "error, stale",
        "error",
    ),
    "min-fresh=60": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "error, stale",
        "error, stale",
        "error",
    ),
    "min-fresh=3500": (
        "miss",
        "joined",
        "miss, wanted",
        "miss, stale",
        "error, wanted",
        "error, stale",
        "error, stale",
        "error",
    ),
    "max-stale": ("miss", "joined", "hit", "stale", "hit", "stale", "stale", "error"),
    "max-stale=30": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "error, stale",
        "error, stale",
        "error",
    ),
    "max-stale=120": ("miss", "joined", "hit", "stale", "hit", "stale", "stale", "error"),
    "stale-if-error=0": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "error, stale",
        "error, stale",
        "error",
    ),
    "stale-if-error=30": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "error, stale",
        "error, stale",
        "error",
    ),
    "stale-if-error=120": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "stale, tried",
        "stale",
        "error",
    ),
    "max-age=1800, stale-if-error=3600": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "stale, tried",
        "stale",
        "error",
    ),
    "max-age, unknown=1": (
        "miss",
        "joined",
        "hit",
        "miss, stale",
        "hit",
        "stale, tried",
        "stale",
        "error",
    ),
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
