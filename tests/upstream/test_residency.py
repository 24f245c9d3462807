"""Beliefs about which slot holds which lead, against a model of a server that takes slots as it likes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.upstream.residency import Crowded, Into, Residency, Resident, Slot, slots_of

LEADS = (b"shop", b"bank", b"post")
LEAD_TOKENS = 100

slot_numbers = st.integers(0, 3)
leads = st.sampled_from(LEADS)


@dataclass
class Held:
    """What a slot of the model really holds; `told`: and that a call prepared for it has landed in it."""

    task: int | None = None
    tokens: int = 0
    lead: bytes = b""
    busy: bool = False
    told: bool = False


@dataclass
class Call:
    """A call on its way: prepared, and perhaps launched."""

    lead: bytes
    since: int
    hint: int | None
    slot: int | None = None
    prompt: int = 0
    cached: int = 0


class Server(RuleBasedStateMachine):
    """A server with slots, other people's calls, and one of ours at a time."""

    @initialize(slots=st.integers(1, 4), unified=st.booleans())
    def start(self, slots: int, unified: bool) -> None:
        self.now = 0.0
        self.residency = Residency(lambda: self.now)
        self.slots = {number: Held() for number in range(slots)}
        self.unified = unified
        self.tasks = 0
        self.ours: Call | None = None

    def listing(self) -> list[dict[str, Any]]:
        return [
            {"id": number, "is_processing": held.busy}
            | ({} if held.task is None else {"id_task": held.task, "n_prompt_tokens": held.tokens})
            for number, held in self.slots.items()
        ]

    def look(self) -> None:
        seen = slots_of(self.listing())
        assert seen is not None
        self.residency.observe(seen)

    def launch(self, number: int, lead: bytes, tokens: int) -> None:
        self.tasks += 1
        self.slots[number] = Held(self.tasks, tokens, lead, busy=True)
        if self.unified:
            for other, held in self.slots.items():
                if other != number and not held.busy:
                    held.tokens, held.lead, held.told = 0, b"", False

    @rule(number=slot_numbers, tokens=st.integers(1, 400))
    def somebody_elses_call_begins(self, number: int, tokens: int) -> None:
        held = self.slots.get(number)
        if held is not None and not held.busy and (self.ours is None or self.ours.hint != number):
            self.launch(number, b"", tokens)

    @rule(number=slot_numbers)
    def somebody_elses_call_ends(self, number: int) -> None:
        held = self.slots.get(number)
        if held is not None and held.busy and (self.ours is None or self.ours.slot != number):
            held.busy = False

    @precondition(lambda self: self.ours is None)
    @rule(lead=leads)
    def a_call_of_ours_is_prepared(self, lead: bytes) -> None:
        self.look()
        idle = {number for number, held in self.slots.items() if not held.busy}
        known = {n for n in idle if self.slots[n].lead == lead and self.slots[n].told}
        choice = self.residency.choose(lead)
        match choice:
            case Resident(slot):
                assert slot in idle
                assert self.slots[slot].lead == lead
            case Into(slot, talk):
                assert slot in idle
                assert not known, "it was there"
                emptier = {n for n in idle if self.slots[n].task is None or self.slots[n].tokens == 0}
                assert not (talk and emptier), "a conversation was given up without need"
                task = self.slots[slot].task
                self.slots[slot] = Held(task, LEAD_TOKENS, lead, told=task is not None)
                self.residency.filled(slot, lead, LEAD_TOKENS)
            case Crowded():
                assert not idle
        hint = None if isinstance(choice, Crowded) else choice.slot
        if hint is not None:
            self.residency.claim(hint)
        self.ours = Call(lead, self.residency.newest, hint)

    @precondition(lambda self: self.ours is not None)
    @rule(lead=leads)
    def the_prepared_slot_is_not_given_to_another(self, lead: bytes) -> None:
        assert self.ours is not None
        self.look()
        choice = self.residency.choose(lead)
        launched = self.ours.slot is not None
        assert isinstance(choice, Crowded) or not self.slots[choice.slot].busy
        assert isinstance(choice, Crowded) or launched or choice.slot != self.ours.hint

    @precondition(lambda self: self.ours is not None and self.ours.slot is None)
    @rule(user=st.integers(1, 300))
    def our_call_begins(self, user: int) -> None:
        assert self.ours is not None
        idle = [number for number, held in self.slots.items() if not held.busy]
        holding = [number for number in idle if self.slots[number].lead == self.ours.lead]
        if idle:
            self.ours.slot = (holding or idle)[0]
            self.ours.cached = LEAD_TOKENS if holding else 0
            self.ours.prompt = LEAD_TOKENS + user
            self.launch(self.ours.slot, self.ours.lead, self.ours.prompt)

    @precondition(lambda self: self.ours is not None and self.ours.slot is not None)
    @rule(answer=st.integers(0, 50))
    def our_call_ends(self, answer: int) -> None:
        call, self.ours = self.ours, None
        assert call is not None
        assert call.slot is not None
        self.slots[call.slot].busy = False
        self.slots[call.slot].tokens += answer
        if call.hint is not None:
            self.residency.release(call.hint, call.since)
        self.look()
        if call.hint is not None and not call.cached:
            self.residency.drop(call.hint)
        else:
            self.residency.landed(call.lead, LEAD_TOKENS, prompt=call.prompt, since=call.since, hint=call.hint)
            self.slots[call.slot].told = call.hint == call.slot

    @precondition(lambda self: self.ours is None and self.tasks)
    @rule()
    def the_server_is_restarted(self) -> None:
        self.slots = {number: Held() for number in self.slots}
        self.tasks = 0

    @invariant()
    def whatever_is_believed_is_true(self) -> None:
        self.look()
        for lead in LEADS:
            choice = self.residency.choose(lead)
            assert not isinstance(choice, Resident) or self.slots[choice.slot].lead == lead


Server.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestServer = Server.TestCase


def residency_with(*slots: Slot) -> Residency:
    residency = Residency(lambda: 0.0)
    residency.observe({slot.id: slot for slot in slots})
    return residency


def test_fresh_slots_are_filled_in_the_order_in_which_the_server_takes_them() -> None:
    residency = residency_with(Slot(0, False, None, None), Slot(1, False, None, None), Slot(2, True, None, None))
    assert residency.choose(b"shop") == Into(1, talk=False)


def test_a_bare_prefix_is_given_up_before_a_conversation() -> None:
    residency = residency_with(Slot(0, False, 3, 300), Slot(1, False, 9, LEAD_TOKENS))
    residency.filled(1, b"bank", LEAD_TOKENS)
    assert residency.choose(b"shop") == Into(1, talk=False)


def test_of_conversations_the_oldest_is_given_up() -> None:
    residency = residency_with(Slot(0, False, 9, 300), Slot(1, False, 3, 300))
    assert residency.choose(b"shop") == Into(1, talk=True)


def test_a_slot_whose_call_never_came_is_free_again() -> None:
    now = [0.0]
    residency = Residency(lambda: now[0], claim_s=10)
    slots = {0: Slot(0, False, 3, 300)}
    residency.observe(slots)
    residency.claim(0)
    residency.observe(slots)
    assert residency.choose(b"shop") == Crowded()
    now[0] = 10.0
    residency.observe(slots)
    assert residency.choose(b"shop") == Into(0, talk=True)


def test_a_call_that_cannot_be_told_from_another_is_believed_nowhere() -> None:
    residency = residency_with(Slot(0, False, 5, 200), Slot(1, False, 6, 200))
    residency.landed(b"shop", LEAD_TOKENS, prompt=150, since=4, hint=None)
    assert isinstance(residency.choose(b"shop"), Into)


def test_a_call_in_a_slot_nobody_chose_is_found_by_its_tokens() -> None:
    residency = residency_with(Slot(0, False, 5, 90), Slot(1, False, 6, 200), Slot(2, False, 2, 900))
    residency.landed(b"shop", LEAD_TOKENS, prompt=150, since=4, hint=None)
    assert residency.choose(b"shop") == Resident(1)


def test_a_server_that_tells_no_tokens_is_believed_by_its_tasks() -> None:
    residency = residency_with(Slot(0, False, 5, None))
    residency.filled(0, b"shop", LEAD_TOKENS)
    residency.observe({0: Slot(0, False, 5, None)})
    assert residency.choose(b"shop") == Resident(0)
    residency.observe({0: Slot(0, False, 6, None)})
    assert residency.choose(b"shop") == Into(0, talk=True)


def test_nothing_is_believed_of_a_server_that_was_restarted_meanwhile() -> None:
    residency = residency_with(Slot(0, False, 5, 100))
    residency.clear()
    residency.filled(0, b"shop", LEAD_TOKENS)
    residency.observe({0: Slot(0, False, 5, 100)})
    assert isinstance(residency.choose(b"shop"), Into)


def test_nothing_is_believed_of_a_server_that_counts_anew() -> None:
    residency = residency_with(Slot(0, False, 5, 100), Slot(1, False, 9, 300))
    residency.filled(0, b"shop", LEAD_TOKENS)
    residency.claim(1)
    residency.observe({0: Slot(0, False, 5, 100), 1: Slot(1, False, 2, 300)})
    assert residency.choose(b"shop") == Into(1, talk=True)


def test_a_broken_off_call_is_believed_where_it_still_runs() -> None:
    residency = residency_with(Slot(0, True, 5, 20), Slot(1, False, 2, 300))
    residency.landed(b"shop", LEAD_TOKENS, prompt=0, since=4, hint=None)
    assert residency.choose(b"shop") == Into(1, talk=True)
    residency.observe({0: Slot(0, False, 5, 180), 1: Slot(1, False, 2, 300)})
    assert residency.choose(b"shop") == Resident(0)


def test_a_call_that_was_broken_off_before_its_lead_was_computed_is_believed_nowhere() -> None:
    residency = residency_with(Slot(0, True, 5, 20))
    residency.landed(b"shop", LEAD_TOKENS, prompt=0, since=4, hint=0)
    residency.observe({0: Slot(0, False, 5, LEAD_TOKENS - 1)})
    assert residency.choose(b"shop") == Into(0, talk=True)


def test_a_broken_off_call_that_cannot_be_told_from_another_is_believed_nowhere() -> None:
    residency = residency_with(Slot(0, True, 5, 200), Slot(1, False, 6, 200))
    residency.landed(b"shop", LEAD_TOKENS, prompt=0, since=4, hint=None)
    assert residency.choose(b"shop") == Into(1, talk=True)


@pytest.mark.parametrize(
    ("slot", "may"),
    [
        (Slot(1, False, 9, 300), True),
        (Slot(1, False, 9, None), True),
        (Slot(1, False, 9, LEAD_TOKENS - 1), False),
        (Slot(1, False, 9, 0), False),
        (Slot(1, False, None, None), False),
    ],
)
def test_what_no_lead_is_known_of_may_be_the_conversation(slot: Slot, may: bool) -> None:
    residency = residency_with(Slot(0, False, 5, 200), slot)
    residency.filled(0, b"bank", LEAD_TOKENS)
    assert residency.may_hold(LEAD_TOKENS) is may


@pytest.mark.parametrize(
    "listing",
    [
        None,
        {},
        [],
        ["slot"],
        [{"id": 0}],
        [{"id": -1, "is_processing": False}],
        [{"id": True, "is_processing": False}],
        [{"id": 0, "is_processing": "no"}],
        [{"id": 0, "is_processing": False}, {"is_processing": False}],
        {"error": {"code": 501}},
    ],
)
def test_what_lists_no_slots_is_no_list(listing: object) -> None:
    assert slots_of(listing) is None


def test_odd_counts_count_as_untold() -> None:
    listed = [{"id": 0, "is_processing": True, "id_task": -1, "n_prompt_tokens": "many"}]
    assert slots_of(listed) == {0: Slot(0, True, None, None)}
