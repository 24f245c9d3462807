"""What several services ask one server: system prompts that share no beginning, new conversations, and those that grow.

Pure: equal arguments give equal texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.prompts import long_prompt, prompt

SERVICES = ("Archive", "Bakery", "Clinic", "Depot", "Estate", "Forum", "Garden", "Harbour")
"""First words of the system prompts: they share no token of their own."""
LONG_WORDS = 590
"""Words of a system prompt of about 700 tokens."""
SHORT_WORDS = 165
"""Words of one of about 200 tokens."""
PASTE_WORDS = 500
"""Words that a user adds to a conversation at once: more than three short system prompts."""

Message = dict[str, str]


def system_prompt(service: int, words: int, generation: int = 0) -> str:
    """The system prompt of a service, of so many words; another generation shares nothing but its first word."""
    number = service + generation * len(SERVICES)
    return f"{SERVICES[service]} {long_prompt(words - 1, number)}"


def question(number: int) -> str:
    """A question of about 25 tokens, like no other of another number."""
    return f"Case {number}: {prompt(number, seed=77).split('?')[0].rsplit('. ', 1)[-1]}?"


def pasted(number: int, words: int = PASTE_WORDS) -> str:
    """A long text that a user wants to hear about, like no other of another number."""
    return f"Here are the notes of case {number}. {long_prompt(words, 50_000 + number)} What follows from them?"


@dataclass(slots=True)
class Talk:
    """A conversation with a service: what is still to be said by its user, and all messages up to now."""

    service: int
    ahead: list[str]
    messages: list[Message] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether the model has not spoken yet."""
        return all(message["role"] != "assistant" for message in self.messages)

    def ask(self) -> list[Message]:
        """The user says what is next; the request's messages."""
        self.messages.append({"role": "user", "content": self.ahead.pop(0)})
        return self.messages

    def answered(self, text: str) -> None:
        """The model has spoken."""
        self.messages.append({"role": "assistant", "content": text})


def new_talk(service: int, words: int, says: Sequence[str], generation: int = 0) -> Talk:
    """A conversation in which nobody has spoken yet."""
    return Talk(service, list(says), [{"role": "system", "content": system_prompt(service, words, generation)}])


def growing_talks(chance: random.Random, numbers: Iterator[int]) -> list[Talk]:
    """One conversation with each service, in random order: a question, a long text, another question."""
    services = list(range(len(SERVICES)))
    chance.shuffle(services)
    return [
        new_talk(service, SHORT_WORDS, (question(next(numbers)), pasted(next(numbers)), question(next(numbers))))
        for service in services
    ]


def interleaved(talks: Sequence[Talk], chance: random.Random, at_once: int = 3) -> list[int]:
    """Whose turn it is, as indices into `talks`: `at_once` conversations are open, and any of them goes on next."""
    left = [len(talk.ahead) for talk in talks]
    order: list[int] = []
    while open_ones := [number for number, turns in enumerate(left) if turns][:at_once]:
        number = chance.choice(open_ones)
        left[number] -= 1
        order.append(number)
    return order


def random_services(chance: random.Random, count: int) -> list[int]:
    """So many numbers of services, each drawn by itself: a busy service may call twice in a row."""
    return [chance.randrange(len(SERVICES)) for _ in range(count)]
