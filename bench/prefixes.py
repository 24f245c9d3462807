"""Time to the first token of calls that the cache cannot answer: with prefixes seeded, and without.

Arms get the same calls in turns, one at a time, so that whatever else the machine does falls on both alike. A round's
value is the median of its calls.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import quantiles
from typing import Any

from bench.first_token import Arm, First, arm, median_ms, seeds_of
from bench.lab import Lab
from bench.table import Row
from bench.talks import (
    LONG_WORDS,
    SERVICES,
    SHORT_WORDS,
    Talk,
    growing_talks,
    interleaved,
    new_talk,
    question,
    random_services,
    system_prompt,
)
from tests.llama_server import Flags

_OFF: Mapping[str, Any] = {"mode": "off"}
_BOUNDED = Flags(slots=2, context=4096, cache_ram_mib=0)
_DEFAULTS = Flags(slots=4, context=8192, cache_ram_mib=8192, kv_unified=True)
"""What llama-server takes where it is told nothing: `-np auto` is four slots that share the model's whole context."""
_CALLS = 8
"""Calls to services in one round, for each arm."""
_QUICK_CALLS = 40
"""The same where they are quick."""

Step = Callable[[Arm], object]


def restart(lab: Lab) -> list[Row]:
    """The first call after the server was away and started anew, with a system prompt that was learned before.

    One comes at once; nearhit cannot know by then whether the same model is back. One comes when it does.
    """
    numbers = itertools.count(10_000)
    taken: dict[str, list[_Taken]] = {"at once": [], "when it is known": []}
    with _arms(lab, _BOUNDED, {"learn_after": 1}) as arms:
        for each in arms:
            each.ask(_one_question(0, numbers, LONG_WORDS))
        arms[0].wait_until_seeded(1)
        for each in arms:
            each.taken()
        for round_number, when in itertools.product(range(lab.rounds), taken):
            step = _restarting(_one_question(0, numbers, LONG_WORDS), at_once=when == "at once")
            taken[when].append(_in_turns(lab, f"restart, {when}", round_number, arms, [step]))
        lab.say(f"restart: {arms[0].told()}")
    return [
        row for when, rounds in taken.items() for row in rows_of(f"restart: first call {when}", "cold", rounds, 0.2)
    ]


def services(lab: Lab) -> list[Row]:
    """More system prompts than slots, called in random order."""
    chance, numbers = random.Random(5), itertools.count(20_000)
    prompts = [system_prompt(service, LONG_WORDS) for service in range(len(SERVICES))]
    seeds = seeds_of(lab.new_folder("prompts"), prompts)
    taken = []
    with _arms(lab, _BOUNDED, {"seeds": seeds, "learn_after": 0}) as (on, off):
        lab.say(f"services: {len(seeds)} prompts are seeded")
        on.wait_until_seeded(len(seeds))
        for round_number in range(lab.rounds):
            order = random_services(chance, _CALLS)
            steps = [_asking(new_talk(service, LONG_WORDS, [question(next(numbers))]).ask()) for service in order]
            taken.append(_in_turns(lab, "services", round_number, (on, off), steps))
        lab.say(f"services: {on.told()}")
    return rows_of("services: 8 system prompts, 2 slots", "off", taken, 0.3)


def growing(lab: Lab) -> list[Row]:
    """Conversations that grow past four times their system prompt, and new ones in between; the server's defaults."""
    chance, numbers = random.Random(6), itertools.count(30_000)
    prompts = [system_prompt(service, SHORT_WORDS) for service in range(len(SERVICES))]
    seeds = seeds_of(lab.new_folder("prompts"), prompts)
    new: list[_Taken] = []
    every: list[_Taken] = []
    with ExitStack() as stack:
        off = stack.enter_context(arm(lab, "direct", _DEFAULTS, None))
        on = stack.enter_context(arm(lab, "nearhit", _DEFAULTS, {"seeds": seeds, "learn_after": 0}))
        lab.say(f"growing: {len(seeds)} prompts are seeded")
        on.wait_until_seeded(len(seeds))
        # Before the first round, each service has had a conversation that grew.
        for round_number in range(-1, lab.rounds):
            pairs = [(talk, _copy(talk)) for talk in growing_talks(chance, numbers)]
            order = interleaved([talk for talk, _ in pairs], chance)
            steps = [_talking(on, *pairs[at]) for at in order]
            taken = _in_turns(lab, "growing", round_number, (on, off), steps)
            if round_number >= 0:
                every.append(taken)
                new.append(_only(taken, first_turns_of(order)))
        lab.say(f"growing: {on.told()}")
    return [
        *rows_of("growing: new conversations", "defaults", new, 0.7),
        *rows_of("growing: all turns", "defaults", every, 0.7),
    ]


def miss(lab: Lab) -> list[Row]:
    """Calls for which nothing is restored: without a system prompt, and with one that a slot holds."""
    numbers = itertools.count(40_000)
    seeds = seeds_of(lab.new_folder("prompts"), [system_prompt(0, SHORT_WORDS)])
    without, resident = [], []
    with _arms(lab, _BOUNDED, {"seeds": seeds, "learn_after": 0}) as (on, off):
        on.wait_until_seeded(1)
        for round_number in range(lab.rounds):
            alone = [[{"role": "user", "content": question(next(numbers))}] for _ in range(_QUICK_CALLS)]
            without.append(_in_turns(lab, "miss", round_number, (on, off), [_asking(each) for each in alone]))
            for each in (on, off):
                each.ask(_one_question(0, numbers, SHORT_WORDS))
                each.taken()
            again = [_one_question(0, numbers, SHORT_WORDS) for _ in range(_QUICK_CALLS)]
            resident.append(_in_turns(lab, "miss", round_number, (on, off), [_asking(each) for each in again]))
        lab.say(f"miss: {on.told()}")
    return [
        *rows_of("miss: no system prompt", "off", without, 1.05, spread=True),
        *rows_of("miss: a resident system prompt", "off", resident, 1.05, spread=True),
    ]


SCENARIOS: Mapping[str, Callable[[Lab], list[Row]]] = {
    "restart": restart,
    "services": services,
    "growing": growing,
    "miss": miss,
}

_Taken = tuple[list[First], list[First]]
"""The answers of one round, with nearhit's prefixes and without, to the same calls."""


@contextmanager
def _arms(lab: Lab, flags: Flags, prefixes: Mapping[str, Any]) -> Iterator[tuple[Arm, Arm]]:
    """Two equal servers with nearhit in front: one that treats prefixes so, one that leaves them alone."""
    with ExitStack() as stack:
        off = stack.enter_context(arm(lab, "off", flags, _OFF))
        yield stack.enter_context(arm(lab, "on", flags, prefixes)), off


def _in_turns(lab: Lab, what: str, round_number: int, arms: tuple[Arm, Arm], steps: Sequence[Step]) -> _Taken:
    for number, step in enumerate(steps):
        for each in arms if (number + round_number) % 2 else reversed(arms):
            step(each)
    on, off = (each.taken() for each in arms)
    which = f"round {round_number + 1} of {lab.rounds}" if round_number >= 0 else "before the first round"
    lab.say(f"{what}: {which}: {_summary(on)}; {arms[1].name}: {_summary(off)}")
    return on, off


def _summary(firsts: Sequence[First]) -> str:
    knew = sum(first.cached for first in firsts) / sum(first.cached + first.computed for first in firsts)
    return f"{median_ms(firsts):,.0f} ms, {knew:.0%} of the prompts known"


def _asking(messages: Sequence[dict[str, str]]) -> Step:
    return lambda each: each.ask(messages)


def _restarting(messages: Sequence[dict[str, str]], *, at_once: bool) -> Step:
    def step(each: Arm) -> None:
        each.restart()
        if not at_once:
            each.wait_until("confirmed")
        each.ask(messages)
        # What nearhit still does about the restart must not fall on the other arm's call.
        each.wait_until("confirmed")

    return step


def _talking(on: Arm, talk: Talk, twin: Talk) -> Step:
    """The next turn of a conversation, which each arm has with its own answers."""

    def step(each: Arm) -> None:
        mine = talk if each is on else twin
        mine.answered(each.ask(mine.ask()).text)

    return step


def _copy(talk: Talk) -> Talk:
    return replace(talk, ahead=list(talk.ahead), messages=list(talk.messages))


def _one_question(service: int, numbers: Iterator[int], words: int) -> list[dict[str, str]]:
    return new_talk(service, words, [question(next(numbers))]).ask()


def first_turns_of(order: Sequence[int]) -> list[bool]:
    """For each turn, by whose it is, whether a conversation begins with it."""
    return [order.index(whose) == turn for turn, whose in enumerate(order)]


def _only(taken: _Taken, wanted: Sequence[bool]) -> _Taken:
    on, off = (list(itertools.compress(firsts, wanted)) for firsts in taken)
    return on, off


def rows_of(what: str, reference: str, rounds: Sequence[_Taken], limit: float, *, spread: bool = False) -> list[Row]:
    """Time against the target, and the prompt tokens that were computed, which no neighbour disturbs.

    With `spread`, how far the quartiles are apart: a difference much smaller than that cannot be told from chance.
    """
    rows = [
        _row(what, "ms", median_ms, rounds, reference, limit),
        _row(f"{what}, tokens computed", "a call", _computed, rounds, reference),
    ]
    return [*rows, _row(f"{what}, quartiles apart", "ms", _spread, rounds, reference)] if spread else rows


def _row(
    what: str,
    unit: str,
    value: Callable[[Sequence[First]], float],
    rounds: Sequence[_Taken],
    reference: str,
    limit: float | None = None,
) -> Row:
    on, off = tuple(value(firsts) for firsts, _ in rounds), tuple(value(firsts) for _, firsts in rounds)
    return Row(what, unit, on, off, reference, limit=limit)


def _computed(firsts: Sequence[First]) -> float:
    return sum(first.computed for first in firsts) / len(firsts)


def _spread(firsts: Sequence[First]) -> float:
    low, _, high = quantiles([first.ms for first in firsts], n=4)
    return high - low
