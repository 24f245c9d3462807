"""Which slot of a llama.cpp server holds which lead, and into which a lead should be restored. Pure.

What `GET /slots` tells of a slot, observed on build 2026.10:

- `id_task` is the number of the last task launched in it; numbers grow over the whole server. Saving, restoring and
  clearing leave it as it is. A slot without it was never used by a task, but may hold something restored.
- `n_prompt_tokens` is what the slot holds at this moment, answers included, also after a restore or a clearing: 0 after
  a restore that failed, and in idle slots that a server with a unified KV cache cleared when another slot was launched.
- A reply to a chat does not tell its slot.

The server runs a call in the idle slot that holds the longest beginning of its prompt. Where that is not a tenth of the
prompt, the slot unused for longest is taken, of those never used the one with the highest number. Targets are chosen in
the same order, so that a restored lead is found by either rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Any


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as listed: `task` None where it was never used, `tokens` None where the server does not tell."""

    id: int
    busy: bool
    task: int | None
    tokens: int | None


Slots = Mapping[int, Slot]


def slots_of(listing: Json) -> Slots | None:
    """What `GET /slots` lists, by id; None where it is no such list."""
    if not isinstance(listing, list) or not listing:
        return None
    slots = [_slot(item) for item in listing]
    return {slot.id: slot for slot in slots if slot is not None} if None not in slots else None


def _slot(item: Json) -> Slot | None:
    busy = item.get("is_processing") if isinstance(item, dict) else None
    if not isinstance(busy, bool) or not _is_count(item.get("id")):
        return None
    task, tokens = item.get("id_task"), item.get("n_prompt_tokens")
    return Slot(item["id"], busy, task if _is_count(task) else None, tokens if _is_count(tokens) else None)


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def newest_task(slots: Slots) -> int:
    """The number of the task launched last, -1 where there was none."""
    return max((slot.task for slot in slots.values() if slot.task is not None), default=-1)


@dataclass(frozen=True, slots=True)
class Resident:
    """The lead is in this idle slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Into:
    """The lead is nowhere, and this idle slot can be given up for it; `talk`: at the price of a conversation."""

    slot: int
    talk: bool


@dataclass(frozen=True, slots=True)
class Crowded:
    """No slot is idle."""


Choice = Resident | Into | Crowded


@dataclass(frozen=True, slots=True)
class _Belief:
    """A slot begins with a lead of so many tokens, as of its task `task` and the server's task `newest`."""

    lead: bytes
    tokens: int
    task: int | None
    newest: int


@dataclass(frozen=True, slots=True)
class _Claim:
    """A slot was prepared for a call that was not launched in it yet; `newest` is the server's last task then."""

    newest: int
    until: float


class Residency:
    """Beliefs about one run of a server. They err on the safe side: one that is in doubt is dropped."""

    def __init__(self, clock: Callable[[], float], claim_s: float = 10.0) -> None:
        """`claim_s` is how long a prepared slot waits for its call, in seconds of `clock`."""
        self._clock = clock
        self._claim_s = claim_s
        self._slots: Slots = {}
        self._beliefs: dict[int, _Belief] = {}
        self._claims: dict[int, _Claim] = {}

    @property
    def newest(self) -> int:
        """The last task seen to be launched, -1 for none."""
        return newest_task(self._slots)

    def observe(self, slots: Slots) -> None:
        """Take notice of the slots as they are now, and drop what they contradict."""
        now, newest = self._clock(), newest_task(slots)
        if newest < self.newest:
            # Numbers only grow: it is another run of the server.
            self.clear()
        self._slots = slots
        self._beliefs = {at: b for at, b in self._beliefs.items() if at in slots and _holds(b, slots[at], newest)}
        self._claims = {at: c for at, c in self._claims.items() if at in slots and _waits(c, slots[at], now)}

    def choose(self, lead: bytes) -> Choice:
        """Where a call with this lead should find it."""
        free = [slot for slot in self._slots.values() if not slot.busy and slot.id not in self._claims]
        holding = [slot for slot in free if slot.id in self._beliefs and self._beliefs[slot.id].lead == lead]
        if holding:
            return Resident(max(holding, key=_age).id)
        if not free:
            return Crowded()
        target = min(free, key=lambda slot: (self._loss(slot), *_age(slot), -slot.id))
        return Into(target.id, talk=self._loss(target) == _TALK)

    def may_hold(self, tokens: int) -> bool:
        """Whether an idle slot may hold a conversation that begins with a lead of so many tokens.

        That is one whose calls are not known, and which holds enough.
        """
        return any(
            slot.task is not None and (slot.tokens is None or slot.tokens >= max(tokens, 1))
            for slot in self._slots.values()
            if not slot.busy and slot.id not in self._beliefs and slot.id not in self._claims
        )

    def claim(self, slot: int) -> None:
        """A call that was prepared for this slot is sent next."""
        self._claims[slot] = _Claim(self.newest, self._clock() + self._claim_s)

    def release(self, slot: int, since: int) -> None:
        """The call for which the slot was claimed, when `since` was the newest task, is over or is not sent."""
        claim = self._claims.get(slot)
        if claim is not None and claim.newest == since:
            del self._claims[slot]

    def filled(self, slot: int, lead: bytes, tokens: int) -> None:
        """The slot, as observed last, was given just this lead. Nothing after `clear`, until slots are observed."""
        if slot in self._slots:
            self._beliefs[slot] = _Belief(lead, tokens, self._slots[slot].task, self.newest)

    def drop(self, slot: int) -> None:
        """What the slot holds is not known any more."""
        self._beliefs.pop(slot, None)

    def landed(self, lead: bytes, tokens: int, *, prompt: int, since: int, hint: int | None) -> None:
        """A call with this lead is over, which had `prompt` tokens and was launched after task `since`.

        Call `observe` first. `hint` is the slot it was prepared for. Where it cannot be told from others, nothing is
        believed. `prompt` 0: not known, as the answer was broken off; then it may be under way still.
        """
        known = {belief.task for at, belief in self._beliefs.items() if at != hint}
        fitting = {
            slot.id: slot
            for slot in self._slots.values()
            if slot.id not in self._claims
            and slot.task is not None
            and slot.task > since
            and slot.task not in known
            and (not prompt if slot.busy else slot.tokens is None or slot.tokens >= max(prompt, tokens))
        }
        found = fitting.get(hint) if hint is not None and hint in fitting else None
        if found is None and len(fitting) == 1:
            (found,) = fitting.values()
        if found is not None:
            self._beliefs[found.id] = _Belief(lead, tokens, found.task, self.newest)

    def clear(self) -> None:
        """Nothing is known any more."""
        self._slots, self._beliefs, self._claims = {}, {}, {}

    def _loss(self, slot: Slot) -> int:
        """How much is lost with what the slot holds."""
        belief = self._beliefs.get(slot.id)
        if belief is None and (slot.task is None or slot.tokens == 0):
            return _NEVER_USED if slot.task is None else _EMPTY
        bare = belief is not None and (slot.task is None or (slot.tokens or 0) == belief.tokens)
        return _PREFIX if bare else _TALK


_NEVER_USED, _EMPTY, _PREFIX, _TALK = range(4)


def _age(slot: Slot) -> tuple[int]:
    """Grows with the time of its last task."""
    return (-1 if slot.task is None else slot.task,)


def _holds(belief: _Belief, slot: Slot, newest: int) -> bool:
    if belief.task != slot.task:
        return False
    if slot.tokens is not None:
        # While its task runs, the tokens grow.
        return slot.busy or slot.tokens >= belief.tokens
    # Nothing is told of a slot that no task has used: another launch may have cleared it.
    return slot.task is not None or newest == belief.newest


def _waits(claim: _Claim, slot: Slot, now: float) -> bool:
    launched = slot.task is not None and slot.task > claim.newest
    return not launched and now < claim.until
