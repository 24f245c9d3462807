"""The simulator of eviction: each policy drops what it says it drops, and the one that ships is worth shipping."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.eviction import CANDIDATES, SHIPPED, main, mean_saved, simulate
from bench.eviction_loads import made_up, timed
from bench.eviction_policies import OVERHEAD, Call, Clairvoyant, Decay, Fifo, GreedyDual, Lfu, Lru, Policy, logaddexp2
from bench.eviction_store import Bound, Store, TopK, footprint, replay

HOUR = 3600.0


def _calls(keys: str, *, costs: dict[str, float] | None = None, topics: dict[str, str] | None = None) -> list[Call]:
    """One call a second for each letter."""
    return [
        Call(key, (topics or {}).get(key, "all"), float(at), (costs or {}).get(key, 1.0), 100, _next(keys, at))
        for at, key in enumerate(keys)
    ]


def _next(keys: str, at: int) -> float:
    found = keys.find(keys[at], at + 1)
    return math.inf if found < 0 else float(found)


def _kept(policy: Policy, keys: str, entries: int, costs: dict[str, float] | None = None) -> str:
    store = Store(policy, Bound(entries=entries))
    replay(_calls(keys, costs=costs), store)
    return "".join(key for key in sorted(set(keys)) if key in store)


@pytest.mark.parametrize(
    ("policy", "keys", "kept"),
    [
        (Fifo(), "abac", "bc"),
        (Lru(), "abac", "ac"),
        (Lfu(), "aaabbcbb", "ab"),
        (GreedyDual(by_cost=False, by_size=False), "aabc", "ac"),
        (Decay(HOUR, by_cost=False, by_size=False), "aabc", "ac"),
        (Clairvoyant(), "abcb", "bc"),
    ],
    ids=["fifo", "lru", "lfu", "greedy-dual", "decay", "clairvoyant"],
)
def test_above_the_bound_goes_what_the_policy_says(policy: Policy, keys: str, kept: str) -> None:
    assert _kept(policy, keys, 2) == kept


@pytest.mark.parametrize("policy", [GreedyDual(), Decay(HOUR)], ids=["greedy-dual", "decay"])
def test_an_answer_that_took_long_outlives_a_newer_one_that_did_not(policy: Policy) -> None:
    assert _kept(policy, "abc", 2, costs={"a": 60.0}) == "ac"


def test_what_was_popular_once_goes_at_last() -> None:
    once, later = "a" * 20, "bcdefgh" * 40
    assert "a" in _kept(Lfu(), once + later, 3)
    assert "a" not in _kept(GreedyDual(), once + later, 3)
    assert "a" not in _kept(Decay(10.0), once + later, 3)


def test_scores_are_added_without_the_powers_that_would_overflow() -> None:
    assert logaddexp2(3.0, 3.0) == pytest.approx(4.0)
    assert logaddexp2(90_000.0, 10.0) == 90_000.0


def test_a_bound_in_bytes_holds_and_expired_entries_take_no_room() -> None:
    store = Store(Lru(), Bound(bytes=2 * (100 + OVERHEAD)), ttl=2.5)
    held = [(store.ask(call), len(store)) for call in _calls("aabcccc")]
    assert [hit for hit, _ in held] == [False, True, False, False, True, True, False]
    assert [count for _, count in held] == [1, 1, 2, 2, 2, 1, 1]


def test_the_best_of_a_topic_outlast_the_dear_answers_of_another() -> None:
    topics, costs = {"v": "voice"}, dict.fromkeys("abcdefgh", 60.0)
    calls = _calls("vvabcdefghv", topics=topics, costs=costs)
    alone, protected = Store(GreedyDual(), Bound(entries=4)), Store(GreedyDual(), Bound(entries=4), top=TopK(1, most=2))
    assert not [alone.ask(call) for call in calls][-1]
    assert [protected.ask(call) for call in calls][-1]


def test_topics_that_never_hit_are_not_protected() -> None:
    calls = _calls("vwvwabc", topics={key: key for key in "abc"})
    plain = Store(GreedyDual(), Bound(entries=4), top=TopK(1, hit_once=False))
    shipped = Store(GreedyDual(), Bound(entries=4), top=TopK(1, most=2))
    replay(calls, plain)
    replay(calls, shipped)
    assert [key for key in "vwabc" if key in plain] == list("wabc")
    assert [key for key in "vwabc" if key in shipped] == list("vwbc")


def test_no_policy_hits_more_often_than_the_clairvoyant() -> None:
    calls = timed(made_up()["zipf"], 72 * HOUR, near=False)
    bound = Bound(entries=footprint(calls).entries // 10)
    hits = {name: replay(calls, each.store(bound, bound.entries)).hits for name, each in CANDIDATES.items()}
    assert max(hits, key=hits.__getitem__) == "min"


def test_what_ships_saves_more_than_the_classics() -> None:
    loads = {name: load for name, load in made_up().items() if name in {"zipf", "shift", "clock", "many"}}
    candidates = {name: CANDIDATES[name] for name in ("fifo", "lru", "lfu", SHIPPED)}
    saved = mean_saved(simulate(loads, candidates, (10,), 72))
    assert max(saved, key=saved.__getitem__) == SHIPPED


def test_a_file_that_is_no_log_is_told_in_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"prompt": "Is it safe?"}) + "\n", encoding="utf-8")
    result = CliRunner().invoke(main, [str(log)])
    assert result.exit_code == 2
    assert "line 1" in result.output
    assert "Traceback" not in result.output
