"""Logs of requests with labels: read from a file, or made up, the same ones each time."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as count_from
from itertools import product
from pathlib import Path
from string import Formatter

from bench.load import Invalid

_SEED = 20
_VERBATIM = 0.22
_VARIANTS = 0.35
_TRIES = 100
_SLIPPERY = 6
"""Letters of a word in which two may be exchanged."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and the name of the answer that is right for it."""

    prompt: str
    cls: str


def read(path: Path, most: int) -> list[Request]:
    """The first `most` requests of a log in JSON Lines, objects with `prompt` and `cls`.

    Raises:
        Invalid: it cannot be read, or is no such log.
    """
    requests: list[Request] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(requests) == most:
                    break
                if line.strip():
                    requests.append(_request(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} cannot be read: {error}") from error
    if not requests:
        raise Invalid(f"{path} has no requests")
    return requests


def _request(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
        prompt, cls = row["prompt"], row["cls"]
    except (ValueError, LookupError, TypeError) as error:
        raise Invalid(f'{where}: expected {{"prompt": "...", "cls": "..."}}') from error
    if not isinstance(prompt, str) or not isinstance(cls, str):
        raise Invalid(f"{where}: prompt and cls must be texts")
    return Request(prompt, cls)


@dataclass(frozen=True, slots=True)
class _Template:
    """What is asked, with a list of things to ask it of for each gap; every combination has an answer of its own."""

    text: str
    things: dict[str, tuple[str, ...]]


_ROOMS = ("kitchen", "hall", "attic", "bathroom", "guest room")
_DAYS = ("Monday", "Wednesday", "Friday", "Sunday")
_NUMBERS = ("3", "5", "8", "12", "30", "45")
_CITIES = ("Lisbon", "Oslo", "Prague", "Vienna", "Porto", "Athens")
_TEMPLATES = (
    _Template("Switch {state} the lamp in the {room}", {"state": ("on", "off"), "room": _ROOMS}),
    _Template("Set the heating in the {room} to {n} degrees", {"room": _ROOMS, "n": ("17", "19", "21", "23")}),
    _Template("Remind me on {day} to water the {plant}", {"day": _DAYS, "plant": ("ferns", "basil", "tomatoes")}),
    _Template("Start a countdown of {n} minutes", {"n": _NUMBERS}),
    _Template("How many grams are {n} ounces?", {"n": _NUMBERS}),
    _Template("How many ounces are {n} grams?", {"n": _NUMBERS}),
    _Template("How do I convert {n} miles to kilometres in my head?", {"n": _NUMBERS}),
    _Template("What is the fastest way to travel from {a} to {b}?", {"a": _CITIES[:3], "b": _CITIES[3:]}),
    _Template(
        "What is the weather usually like in {city} in {month}?", {"city": _CITIES, "month": ("March", "August")}
    ),
    _Template("Which museum should I visit first in {city}?", {"city": _CITIES}),
    _Template("Is it {kind} to freeze {food}?", {"kind": ("safe", "useless"), "food": ("cooked rice", "raw eggs")}),
    _Template("How long does {food} keep in the fridge?", {"food": ("cooked rice", "cream", "pesto", "smoked fish")}),
    _Template("Suggest a dinner for {n} people {how} meat", {"n": _NUMBERS, "how": ("with", "without")}),
    _Template(
        "Write a short note that thanks {name} for the {gift}", {"name": ("Ines", "Karl"), "gift": ("book", "soup")}
    ),
    _Template("Why does {tool} need so much memory?", {"tool": ("Chromium", "Postgres", "Docker", "Webpack")}),
    _Template("How do I {verb} the service {name}?", {"verb": ("start", "stop", "enable"), "name": ("cron", "nginx")}),
    _Template("What does the error {code} mean?", {"code": ("ENOSPC", "EACCES", "E1001", "E1010", "HTTP 502")}),
    _Template("Show the last {n} lines of {file}", {"n": _NUMBERS, "file": ("/var/log/syslog", "/var/log/mail.log")}),
    _Template("Explain {thing} to a ten year old", {"thing": ("gravity", "inflation", "a vaccine", "an eclipse")}),
    _Template("What is the difference between {a} and {b}?", {"a": ("jam", "honey"), "b": ("syrup", "marmalade")}),
    _Template("Which {what} grows {where} in the garden?", {"what": ("herb", "berry"), "where": ("best", "worst")}),
    _Template(
        "Translate the word {word} into {language}", {"word": ("bridge", "thunder"), "language": ("Dutch", "Polish")}
    ),
)


@dataclass(frozen=True, slots=True)
class _Question:
    """A filled template. `own` are its own words, in which a slip of the keyboard changes no sense."""

    text: str
    cls: str
    own: tuple[str, ...]


Variation = Callable[[random.Random, _Question], str]


def generated(count: int) -> list[Request]:
    """A log of questions to an assistant: a part asked again as they were, a part in other words of the same sense."""
    chance = random.Random(_SEED)
    repeats, variants = round(_VERBATIM * count), round(_VARIANTS * count)
    # Nothing can be repeated before something was asked.
    kinds = [_repeated] * repeats + [_varied] * variants + [_new] * (count - repeats - variants - 1)
    chance.shuffle(kinds)
    maker = _Maker(chance, _questions(chance))
    for kind in (_new, *kinds):
        kind(maker)
    return maker.log


class _Maker:
    """A log as it grows."""

    def __init__(self, chance: random.Random, fresh: Iterator[_Question]) -> None:
        self.chance = chance
        self.fresh = fresh
        self.asked: list[_Question] = []
        self.log: list[Request] = []

    def popular(self) -> _Question:
        """Some question that was asked before; some are asked far oftener than others."""
        return self.asked[min(int(self.chance.paretovariate(0.6)) - 1, len(self.asked) - 1)]


def _new(maker: _Maker) -> None:
    question = next(maker.fresh)
    maker.asked.append(question)
    maker.log.append(Request(question.text, question.cls))


def _repeated(maker: _Maker) -> None:
    cls = maker.popular().cls
    maker.log.append(maker.chance.choice([request for request in maker.log if request.cls == cls]))


def _varied(maker: _Maker) -> None:
    known = {request.prompt for request in maker.log}
    for _ in range(_TRIES):
        question = maker.popular()
        text = question.text
        for variation in maker.chance.sample(_VARIATIONS, maker.chance.choice((1, 1, 2))):
            text = variation(maker.chance, _Question(text, question.cls, question.own))
        if text not in known:
            maker.log.append(Request(text, question.cls))
            return
    _new(maker)


def _questions(chance: random.Random) -> Iterator[_Question]:
    """Every question there is, in some order, then with another number of the floor, and so on."""
    made = [_filled(template, values) for template in _TEMPLATES for values in product(*template.things.values())]
    chance.shuffle(made)
    yield from made
    for floor in count_from(2):
        yield from (_Question(f"On floor {floor}: {q.text}", f"{q.cls}|floor {floor}", q.own) for q in made)


def _filled(template: _Template, values: tuple[str, ...]) -> _Question:
    text = template.text.format(**dict(zip(template.things, values, strict=True)))
    literal = " ".join(part for part, *_ in Formatter().parse(template.text))
    own = tuple(word for word in re.findall(r"[a-z]+", literal) if len(word) >= _SLIPPERY)
    return _Question(text, "|".join((template.text, *values)), own)


def _polite(chance: random.Random, question: _Question) -> str:
    before = chance.choice(("please ", "Hello, ", "could you tell me: ", "Hey! ", ""))
    after = chance.choice((" please", ", thanks", " Thank you!", ", many thanks", ""))
    return f"{before}{question.text}{after or ' pls' if not before else after}"


def _cased(chance: random.Random, question: _Question) -> str:
    return question.text[0].lower() + question.text[1:] if chance.random() < 0.7 else question.text.upper()


def _ended(chance: random.Random, question: _Question) -> str:
    return question.text.rstrip("?.! ") + chance.choice(("", ".", "?", " ?", "!!", "..."))


def _spaced(chance: random.Random, question: _Question) -> str:
    return chance.choice((f"  {question.text}", f"{question.text}\n", question.text.replace(" ", "  ", 2)))


def _contracted(_chance: random.Random, question: _Question) -> str:
    return question.text.replace("What is ", "What's ").replace("Which is ", "Which's ")


def _slipped(chance: random.Random, question: _Question) -> str:
    if not question.own:
        return question.text
    word = chance.choice(question.own)
    at = chance.randrange(1, len(word) - 2)
    return question.text.replace(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :], 1)


_VARIATIONS: tuple[Variation, ...] = (_polite, _polite, _cased, _ended, _spaced, _contracted, _slipped)
