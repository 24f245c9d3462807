"""Which leads are worth seeding."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.learning import Learning
from proxy.upstream.prefix import lead_of_prompt

LEADS = [lead_of_prompt(f"You are number {number}.") for number in range(40)]


def test_a_lead_is_worth_seeding_from_the_third_call_on() -> None:
    learning = Learning(after=3, most=10)
    assert [learning.note(LEADS[0]) for _ in range(4)] == [False, False, True, True]
    assert LEADS[0].id in learning
    assert LEADS[1].id not in learning
    assert [learning.calls(lead.id) for lead in LEADS[:2]] == [4, 0]


@given(st.lists(st.integers(0, 9)), st.integers(1, 4))
def test_where_there_is_room_calls_alone_decide(calls: list[int], after: int) -> None:
    learning = Learning(after, most=10)
    for number in calls:
        learning.note(LEADS[number])
    counts = Counter(calls)
    worth = [LEADS.index(lead) for lead in learning.worth()]
    assert set(worth) == {number for number, count in counts.items() if count >= after}
    assert [counts[number] for number in worth] == sorted((counts[number] for number in worth), reverse=True)


@given(st.lists(st.tuples(st.sampled_from(["note", "demand", "forget"]), st.integers(0, 39))), st.integers(0, 6))
def test_it_never_knows_more_leads_than_it_may(steps: list[tuple[str, int]], most: int) -> None:
    learning = Learning(after=2, most=most)
    for step, number in steps:
        lead = LEADS[number]
        if step == "note":
            assert learning.note(lead) == (lead.id in learning)
        elif step == "demand":
            learning.demand_more(lead.id)
        else:
            learning.forget(lead.id)
            assert lead.id not in learning
        assert len(learning) <= most
        assert len(learning.worth()) <= most


def test_a_flood_of_strangers_does_not_wash_out_what_is_used() -> None:
    learning = Learning(after=2, most=8)
    for lead in LEADS[:3] * 2:
        learning.note(lead)
    for lead in LEADS[3:]:
        learning.note(lead)
    assert learning.worth() == LEADS[:3]


def test_what_there_was_no_room_for_takes_twice_as_many_calls_each_time() -> None:
    learning = Learning(after=2, most=8)
    needed = []
    for _ in range(3):
        calls = 1
        while not learning.note(LEADS[0]):
            calls += 1
        needed.append(calls)
        learning.demand_more(LEADS[0].id)
    assert needed == [2, 4, 8]
    learning.forget(LEADS[0].id)
    assert [learning.note(LEADS[0]) for _ in range(2)] == [False, True]


def test_zero_learns_nothing() -> None:
    learning = Learning(after=0, most=8)
    assert not any(learning.note(LEADS[0]) for _ in range(100))
    assert len(learning) == 0
