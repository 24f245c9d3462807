"""`python -m bench eviction`: what goes first above a bound, simulated: how much upstream time each policy saves."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import click
from rich.console import Console
from rich.table import Table

from bench.eviction_loads import Load, in_one_topic, made_up, timed
from bench.eviction_policies import Call, Clairvoyant, Decay, Fifo, GreedyDual, Lfu, Lru, Policy
from bench.eviction_store import Bound, Outcome, Store, TopK, footprint, replay
from bench.load import Invalid
from bench.requests import read

TTL_S = 72 * 3600.0
SHIPPED = "nearhit"
_EXIT_INVALID = 2
_HOUR = 3600.0
_TOPICS = ("flood", "twice", "clock", "dated", "many", "moving")
"""Made-up loads with more than one topic, the only ones to which top-K matters."""
_WIDTH = 130


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy, and what is protected, with K as a share of the entries that the bound leaves."""

    policy: Callable[[], Policy]
    k: float | None = None
    hit_once: bool = True
    most: float = 0.5

    def store(self, bound: Bound, entries: float) -> Store:
        """An empty store; `entries`: about how many the bound leaves."""
        if self.k is None:
            return Store(self.policy(), bound, TTL_S)
        top = TopK(max(1, round(self.k * entries)), self.hit_once, round(self.most * entries))
        return Store(self.policy(), bound, TTL_S, top)


def _decay(hours: float, *, valued: bool = True) -> Callable[[], Policy]:
    return lambda: Decay(hours * _HOUR, by_cost=valued, by_size=valued)


CANDIDATES: Mapping[str, Candidate] = {
    "fifo": Candidate(Fifo),
    "lru": Candidate(Lru),
    "lfu": Candidate(Lfu),
    "lfu-da": Candidate(lambda: GreedyDual(by_cost=False, by_size=False)),
    "gdsf": Candidate(GreedyDual),
    SHIPPED: Candidate(GreedyDual, k=0.002),
    "gdsf 1/2": Candidate(lambda: GreedyDual(first=0.5)),
    "decay 6h": Candidate(_decay(6)),
    "24h": Candidate(_decay(24)),
    "72h": Candidate(_decay(72)),
    "24h uses": Candidate(_decay(24, valued=False)),
    "min": Candidate(Clairvoyant),
}
TOP_K: Mapping[str, Candidate] = {
    "none": Candidate(GreedyDual),
    **{f"{k} % all": Candidate(GreedyDual, k / 100, hit_once=False) for k in (1, 5)},
    **{f"{k} % hit": Candidate(GreedyDual, k / 100) for k in (0.2, 1, 5)},
}


@dataclass(frozen=True, slots=True)
class Run:
    """One candidate, on one load. `share`: percent of what a store takes that keeps everything."""

    load: str
    hits: str
    bound: str
    share: int
    policy: str
    outcome: Outcome


def simulate(
    loads: Mapping[str, Load], candidates: Mapping[str, Candidate], shares: Sequence[int], hours: float
) -> list[Run]:
    """Each candidate on each load, by exact and near hits, bound by entries and by bytes."""
    runs: list[Run] = []
    for name, load in loads.items():
        for hits in ("exact", "near"):
            calls = timed(load, hours * _HOUR, near=hits == "near")
            for bound in ("entries", "bytes"):
                for share in shares:
                    outcomes = _compared(calls, candidates, bound, share)
                    runs += (Run(name, hits, bound, share, policy, done) for policy, done in outcomes.items())
    return runs


def _compared(calls: Sequence[Call], candidates: Mapping[str, Candidate], kind: str, share: int) -> dict[str, Outcome]:
    whole = footprint(calls)
    entries = max(1, round(whole.entries * share / 100))
    bound = Bound(entries=entries) if kind == "entries" else Bound(bytes=whole.bytes * share / 100)
    return {name: replay(calls, each.store(bound, entries)) for name, each in candidates.items()}


def mean_saved(runs: Iterable[Run]) -> dict[str, float]:
    """Percent of upstream time saved by each policy, the mean over the runs."""
    return _means(runs, lambda outcome: outcome.saved)


def _means(runs: Iterable[Run], measure: Callable[[Outcome], float]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        values.setdefault(run.policy, []).append(100 * measure(run.outcome))
    return {policy: fmean(each) for policy, each in values.items()}


def by_load(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Percent of upstream time saved for each load, and over all."""
    loads = dict.fromkeys(run.load for run in runs)
    lines = {load: mean_saved(run for run in runs if run.load == load) for load in loads}
    return {**lines, "all": mean_saved(runs)}


def by_bound(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Percent of upstream time saved for each bound and kind of hits, and the percentage of hits."""
    bounds = dict.fromkeys((run.bound, run.share) for run in runs)
    lines = {
        f"{share} % of {bound}": mean_saved(run for run in runs if (run.bound, run.share) == (bound, share))
        for bound, share in bounds
    }
    kinds = {f"{hits} hits": mean_saved(run for run in runs if run.hits == hits) for hits in ("exact", "near")}
    return {**lines, **kinds, "hit rate": _means(runs, lambda outcome: outcome.hits)}


def _table(title: str, lines: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for policy in next(iter(lines.values())):
        table.add_column(policy, justify="right", no_wrap=True)
    for name, values in lines.items():
        table.add_row(name, *(f"{value:.1f}" for value in values.values()))
    return table


def _loads(files: Iterable[Path], *, mixed: bool) -> dict[str, Load]:
    logs = {path.stem: read(path, sys.maxsize) for path in files}
    if mixed:
        for log in logs.values():
            random.Random(0).shuffle(log)
    return {name: in_one_topic(log) for name, log in logs.items()} | made_up()


@click.command("eviction")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--hours", default=72.0, show_default=True, type=click.FloatRange(0.01), help="How long a load takes.")
@click.option("--share", "shares", multiple=True, default=(5, 10, 25), show_default=True, type=click.IntRange(1, 100))
@click.option("--mixed", is_flag=True, help="Shuffle the files, which are in no order of requests.")
@click.option("--json", "for_programs", is_flag=True, help="Print JSON, with every run.")
def main(*, files: tuple[Path, ...], hours: float, shares: tuple[int, ...], mixed: bool, for_programs: bool) -> None:
    """Simulate what goes first above a bound, on made-up loads and logs of requests.

    A log has one JSON object a line, in the order of the requests: {"prompt": "...", "cls": "..."}.
    """
    console = Console(highlight=False, width=_WIDTH)
    try:
        loads = _loads(files, mixed=mixed)
    except Invalid as error:
        click.echo(f"eviction says nothing: {error}", err=True)
        sys.exit(_EXIT_INVALID)
    runs = simulate(loads, CANDIDATES, shares, hours)
    in_topics = simulate({name: loads[name] for name in _TOPICS}, TOP_K, shares, hours)
    if for_programs:
        print(json.dumps([asdict(run) for run in runs + in_topics], indent=2))
        return
    console.print(_table("Upstream time saved, percent, by load", by_load(runs)))
    console.print(_table("\nThe same by bound and kind of hits; hit rate", by_bound(runs)))
    console.print(_table("\nThe same by K, in percent of the bound", by_load(in_topics)))


if __name__ == "__main__":
    main(prog_name="python -m bench.eviction")
