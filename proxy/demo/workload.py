"""What is asked: a handful of questions as a house's assistant and a help desk get them, each of them more than once.

Pure: the same rounds give the same list.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

MAX_TOKENS = 48
_ORDER = 11
"""Seed of the order, chosen so that the first hit comes early."""

_HOUSE = (
    "You are the assistant of a family's house. You know the kitchen, the garden, the lights and the heating. "
    "Answer in one or two short, friendly sentences."
)
_SHOP = (
    "You are the help desk of a shop that sells coffee machines. Orders are sent within two working days, returns are "
    "free for thirty days, repairs take about a week. Machines are descaled with 100 ml of citric acid in one litre of "
    "water. Answer politely and briefly, and only about orders, returns, repairs and coffee machines."
)
_EDITOR = "You rewrite what you are given in plain English. Reply with the new text only."


@dataclass(frozen=True)
class Question:
    """Something to ask. `after` is the question that comes before it in the same conversation."""

    text: str
    system: str = ""
    after: Question | None = None

    @property
    def turn(self) -> int:
        """1 for the first of a conversation."""
        return 1 + (self.after.turn if self.after else 0)


@dataclass(frozen=True)
class Ask:
    """One request: a question, and whether its answer is streamed."""

    question: Question
    streamed: bool

    @property
    def form(self) -> str:
        """How the answer is wanted: `stream` or `whole`."""
        return "stream" if self.streamed else "whole"


_EGG = Question("How long do I boil a soft egg?", _HOUSE)
_RETURN = Question("May I return it after three weeks?", _SHOP)

CONVERSATIONS: tuple[tuple[Question, ...], ...] = (
    (_EGG, Question("And how long a hard one?", _HOUSE, after=_EGG)),
    (Question("Which plants need the most water?", _HOUSE),),
    (_RETURN, Question("Who pays for the parcel?", _SHOP, after=_RETURN)),
    (Question("How do I descale my machine?", _SHOP),),
    (Question("Kindly refrain from using the lift.", _EDITOR),),
    (Question("What is the capital of Australia?"),),
)
"""Questions that follow each other."""


def asks(rounds: int) -> list[Ask]:
    """Every question once and `rounds` times again, mixed; repeats take turns between streamed and whole answers."""
    order = [index for index in range(len(CONVERSATIONS)) for _ in range(rounds + 1)]
    random.Random(_ORDER).shuffle(order)  # noqa: S311
    times = dict.fromkeys(order, 0)
    found: list[Ask] = []
    for index in order:
        found.extend(Ask(question, (index + times[index]) % 2 == 0) for question in CONVERSATIONS[index])
        times[index] += 1
    return found


def messages(question: Question, answers: Mapping[Question, str]) -> list[dict[str, str]]:
    """The conversation up to the question; `answers` holds those to the questions before it.

    Raises:
        KeyError: the question before it has no answer yet.
    """
    if question.after:
        before = question.after
        said = [*messages(before, answers), {"role": "assistant", "content": answers[before]}]
    else:
        said = [{"role": "system", "content": question.system}] if question.system else []
    return [*said, {"role": "user", "content": question.text}]
