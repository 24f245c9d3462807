"""Prompts of about thirty words by number: clauses that many prompts share, with words in them that few share."""

from __future__ import annotations

import random
import re

_OPENINGS = (
    "I run a small {shop} in {city} and our {adjective} {noun} has started to {fail} every {day}.",
    "My {relative} bought a {adjective} {noun} from a {shop} last {day} and does not know how to {use} it.",
    "We are planning a {adjective} {event} for {n} people in {city} with a budget of {money} dollars.",
    "For a school project about {topic} my {relative} has to fill {n} pages before {day}.",
    "After the last update our {system} on {host} began to {fail} whenever the {noun} is {state}.",
    "I am new to {topic} and saw a {adjective} leaflet about the {noun} in {city}.",
    "The {noun} in our {room} is {state} and the {shop} down the road cannot {use} it before {day}.",
    "Our team keeps {n} copies of the {system} and one of them is always {state} on {day}.",
)
_ASKS = (
    "What should I check first before I {use} the {noun} next to the {room}?",
    "How long does it usually take to {use} a {adjective} {noun} of that kind?",
    "Which {topic} book would you give to somebody who has {n} hours and a {adjective} {noun}?",
    "Why would a {system} {fail} only when {n} users {use} the same {noun}?",
    "How can I tell the {relative} that the {adjective} {noun} will be {state} until {day}?",
    "Where in {city} can we find a {shop} that knows how to {use} a {noun}?",
    "Is it better to {use} the {adjective} {noun} or to replace the {system} with a new one?",
    "What does the message {code} from the {system} say about the {adjective} {noun}?",
)
_DETAILS = (
    "Keep it under {n} sentences and mention the {adjective} {noun}.",
    "It costs about {money} dollars and weighs {n} kilograms.",
    "There is also a {adjective} {noun} in the {room}.",
    "The manual only talks about {topic}.",
    "We have {n} days left.",
    "My {relative} says that the {shop} is {state}.",
)
# ruff: noqa: SIM905 - lists of words are easier to read as texts
_WORDS: dict[str, tuple[str, ...]] = {
    "shop": tuple(
        "bakery bookshop workshop florist pharmacy brewery garage nursery gallery butcher grocer tailor".split()
    ),
    "city": tuple(
        "Lisbon Oslo Prague Vienna Porto Athens Dublin Warsaw Naples Ghent Turin Zagreb Malaga Leeds".split()
    ),
    "day": tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday morning evening weekend month".split()),
    "relative": tuple("sister brother uncle aunt neighbour daughter grandson teacher manager cousin landlord".split()),
    "event": tuple("wedding concert picnic reunion workshop exhibition birthday hike tournament auction".split()),
    "topic": tuple(
        "volcanoes bees glaciers chess sailing pottery astronomy medieval-trade genetics jazz tides".split()
    ),
    "room": tuple("kitchen attic cellar hallway bathroom garden balcony office garage library porch".split()),
    "system": tuple("database scheduler mail-server backup firewall printer website queue proxy registry".split()),
    "state": tuple("broken closed missing overloaded frozen locked flooded empty noisy unplugged dirty rented".split()),
    "fail": tuple("leak crash stall overheat rattle freeze slow-down restart complain vibrate".split()),
    "use": tuple("repair clean install move test calibrate paint replace measure inspect connect adjust".split()),
    "adjective": tuple(
        "wooden electric ancient cheap heavy portable fragile silent colourful rusty modern narrow digital round "
        "expensive foldable transparent yellow crooked hollow smooth greasy foreign compact".split()
    ),
    "noun": tuple(
        "boiler ladder clock violin kettle bicycle freezer antenna mirror compass carpet lantern engine pump mattress "
        "keyboard telescope faucet chimney radiator aquarium sewing-machine camera tent drawer lawnmower blender "
        "thermostat staircase projector curtain wardrobe scooter microscope barrel generator loom anvil turntable "
        "hammock".split()
    ),
}
_GAP = re.compile(r"\{(\w+)\}")
_SLIPPERY = 7
"""Letters of a word in which two may be exchanged."""
_COURTESY = ("Hello! {}", "{} Thanks!", "{} Thank you.", "Hi, {}", "Please tell me: {}")


def prompt(number: int, seed: int = 0) -> str:
    """The prompt of this number; another `seed` gives other ones of the same kind."""
    chance = random.Random(f"{seed} {number}")
    clauses = (chance.choice(_OPENINGS), chance.choice(_ASKS), *chance.sample(_DETAILS, chance.choice((0, 0, 0, 1))))
    return " ".join(_GAP.sub(lambda gap: _word(chance, gap[1]), clause) for clause in clauses)


def long_prompt(words: int, number: int) -> str:
    """A prompt of exactly so many words."""
    parts: list[str] = []
    while len(parts) < words:
        parts += prompt(len(parts), seed=number + 1_000).split()
    return " ".join(parts[:words])


def with_courtesy(text: str, chance: random.Random) -> str:
    """The same question in other words that have equal forms."""
    form = chance.choice(_COURTESY)
    inside = form[0] != "{" and not form.startswith("Hello!") and not text.startswith("I ")
    return form.format(text[0].lower() + text[1:] if inside else text)


def with_slip(text: str, chance: random.Random) -> str:
    """The same question with two letters of a long word exchanged, so that only sketches find it."""
    words = [word for word in re.findall(r"\b[a-z]+\b", text) if len(word) >= _SLIPPERY]
    word = chance.choice(words)
    at = chance.randrange(1, len(word) - 2)
    return text.replace(word, word[:at] + word[at + 1] + word[at] + word[at + 2 :], 1)


def _word(chance: random.Random, gap: str) -> str:
    match gap:
        case "n":
            return str(chance.randint(2, 60))
        case "money":
            return str(chance.randrange(50, 5_000, 50))
        case "code":
            return f"E{chance.randint(100, 999)}"
        case "host":
            return f"node{chance.randint(1, 40)}"
        case _:
            return chance.choice(_WORDS[gap])
