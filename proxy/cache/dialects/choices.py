"""The two dialects whose answers are lists of choices: chat and completions. Pure.

Stream events are accumulated as the official clients accumulate them, so nothing is lost either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from proxy.cache.answer import (
    ABORTED,
    Gist,
    NotUnderstood,
    Pieces,
    Recorded,
    Wire,
    count,
    decode,
    fresh,
    in_one,
)
from proxy.cache.dialects.call import OF_THE_CALL, Json, NotCacheable, Readable, Reading
from proxy.cache.policy import Drop

_FINISHED = frozenset({"stop", "length", "tool_calls", "function_call", "eos", "eos_token", "stop_sequence"})
_ACTED = frozenset({"tool_calls", "function_call"})
_REPLACED = frozenset({"index", "type", "role", "id", "object", "format"})
_OUTSIDE = frozenset({"id", "created", "choices", "object", "obfuscation"})
_ON_EVERY_EVENT = ("model", "system_fingerprint", "service_tier")
_CREATED = "created"


class Form(Readable, Protocol):
    """What tells the two apart."""

    @property
    def whole_object(self) -> str:
        """The `object` of a non-streamed answer."""
        ...

    @property
    def stream_object(self) -> str:
        """The `object` of a stream event."""
        ...

    def finish_choice(self, choice: dict[str, Json]) -> dict[str, Json]:
        """Turn a choice accumulated from stream events into the form of a non-streamed answer."""
        ...

    def split_choice(self, choice: Mapping[str, Json], pieces: Pieces) -> list[dict[str, Json]]:
        """Turn a choice of a non-streamed answer into the choices of successive stream events."""
        ...

    def acts(self, choice: Mapping[str, Json]) -> bool:
        """Whether the choice calls a tool."""
        ...

    def refusal(self, choice: Mapping[str, Json]) -> str:
        """What it says where it refuses."""
        ...

    def reasoning(self, choice: Mapping[str, Json]) -> str:
        """What it thought before, as far as that is shown."""
        ...

    def text(self, choice: Mapping[str, Json]) -> str:
        """What the choice says."""
        ...


class Choices:
    """A dialect whose answers are lists of choices."""

    usage_on_request = True

    def __init__(self, form: Form) -> None:
        """Choices of this form."""
        self._form = form
        self.endpoint = form.endpoint
        self.paths = form.paths
        self.id_prefix = form.id_prefix

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        """See `Dialect`."""
        return self._form.read(body)

    def kept(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """See `Dialect`."""
        kept = {name: value for name, value in body.items() if name not in ("id", "created")}
        return kept | {name: none for name, none in OF_THE_CALL.items() if kept.get(name)}

    def judge(self, body: Mapping[str, Json]) -> Gist | Drop:
        """See `Dialect`."""
        return _examine(self._form, body) or _gist(self._form, body)

    def assembler(self) -> Assembler:
        """See `Dialect`."""
        return Assembler(self, self._form)

    def whole(self, body: Mapping[str, Json]) -> Wire:
        """See `Dialect`."""
        return Wire(fresh({"object": self._form.whole_object, **body}, created=_CREATED))

    def stream(self, body: Mapping[str, Json], *, include_usage: bool, pieces: Pieces = in_one) -> Wire:
        """See `Dialect`; ended by `[DONE]`, usage in an event of its own where asked for."""
        common = {name: body[name] for name in _ON_EVERY_EVENT if name in body}
        late = {k: v for k, v in body.items() if k not in _OUTSIDE and k not in common and k != "usage"}
        choices = [event for choice in body["choices"] for event in self._form.split_choice(choice, pieces)]
        events: list[dict[str, Json]] = [{"choices": [choice], **common} for choice in choices]
        if include_usage:
            events.append({"choices": [], **common, "usage": body.get("usage")})
        events[-1].update(late)
        texts = [fresh({"object": self._form.stream_object, **event}, created=_CREATED) for event in events]
        return Wire(b"".join(b"data: %b\n\n" % text for text in (*texts, b"[DONE]")))


class Assembler:
    """Puts a stream's events together; see `Assembling`."""

    def __init__(self, dialect: Choices, form: Form) -> None:
        """Begin an empty answer."""
        self._dialect = dialect
        self._form = form
        self._outside: dict[str, Json] = {}
        self._choices: dict[int, dict[str, Json]] = {}
        self._drop: Drop | None = None
        self.done = False
        """Whether the end mark has come."""
        self.spoke = False
        """Whether anything but roles has come: the end of the time to the first token."""
        self.deltas = 0
        """How many pieces of the answer have come: tokens, of servers that send each as it is generated."""

    def feed(self, data: str) -> None:
        """Take the data of one event."""
        if self.done or self._drop is not None:
            return
        if data == "[DONE]":
            self.done = True
            return
        try:
            self._take(decode(data))
        except (ValueError, RecursionError):
            self._drop = Drop.NOT_UNDERSTOOD

    def fail(self) -> None:
        """The stream carried an event that is no data: an error, as far as anyone can tell."""
        self._drop = self._drop or Drop.ERROR_IN_STREAM

    def finish(self, *, usage_asked: bool, usage_from_timings: bool) -> Recorded | Drop:
        """The answer, or why it cannot be kept."""
        if self._drop is not None:
            return self._drop
        if not self.done:
            return Drop.INCOMPLETE
        choices = [self._form.finish_choice(dict(self._choices[index])) for index in sorted(self._choices)]
        body = {**self._outside, "object": self._form.whole_object, "choices": choices}
        if usage_from_timings and body.get("usage") is None:
            body.update(usage_of_timings(body.get("timings")))
        body = self._dialect.kept(body)
        gist = self._dialect.judge(body)
        return gist if isinstance(gist, Drop) else Recorded(body, usage_asked or body.get("usage") is not None, gist)

    def _take(self, event: Json) -> None:
        if not isinstance(event, dict):
            raise NotUnderstood("an event is an object")
        if event.get("error") is not None:
            self._drop = Drop.ERROR_IN_STREAM
            return
        for name, value in event.items():
            if name not in _OUTSIDE and (value is not None or name not in self._outside):
                self._outside[name] = value
        for choice in event.get("choices") or ():
            self._take_choice(choice)

    def _take_choice(self, choice: Json) -> None:
        if not isinstance(choice, dict) or not isinstance(choice.get("index", 0), int):
            raise NotUnderstood("a choice is an object with a number")
        held = self._choices.setdefault(choice.get("index", 0), {})
        for name, value in choice.items():
            if name in ("delta", "logprobs", "text"):
                _merge(held, {name: value})
            elif value not in (None, {}) or name not in held:
                held[name] = value
        delta = choice.get("delta")
        said = delta if isinstance(delta, dict) else {"text": choice.get("text")}
        speaks = any(value for name, value in said.items() if name != "role")
        self.spoke = self.spoke or speaks
        # A token may end within a character, and bring no text yet.
        silent = choice.get("finish_reason") is None and "" in said.values() and "role" not in said
        self.deltas += speaks or silent


def _merge(held: dict[str, Json], delta: Mapping[str, Json], *, numbered: bool = True) -> None:
    """Accumulate as the official clients do: texts join, lists grow, indexed items merge, the rest is replaced."""
    for name, value in delta.items():
        before = held.get(name)
        if value is None:
            held.setdefault(name, None)
        elif isinstance(value, dict):
            held[name] = before = {} if before is None else before
            _same(before, dict)
            # The tokens in logprobs are names of fields there, "index" like any.
            _merge(before, value, numbered=numbered and name != "logprobs")
        elif isinstance(value, list):
            held[name] = before = [] if before is None else before
            _same(before, list)
            if numbered:
                _extend(before, value)
            else:
                before.extend(value)
        elif before is None or name in _REPLACED or not isinstance(value, str):
            held[name] = value
        else:
            _same(before, str)
            # Some servers repeat a tool's name in every fragment; nobody sends a name in pieces that are equal.
            held[name] = before if name == "name" and value == before else before + value


def _extend(held: list[Json], items: Iterable[Json]) -> None:
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("index"), int):
            _refuse_fragment(held, item)
            held.append(item)
            continue
        index = item["index"]
        if index > len(held) or index < 0:
            raise NotUnderstood(f"item {index} after {len(held)} items")
        if index == len(held):
            held.append({})
        _same(held[index], dict)
        _refuse_another(held[index], item)
        _merge(held[index], item)


def _refuse_fragment(held: list[Json], item: Json) -> None:
    # Without an index nobody can tell a further piece of a tool call from another call.
    if isinstance(item, dict) and "function" in item:
        identifiers = [call.get("id") for call in held if isinstance(call, dict)]
        if item.get("id") is None or item["id"] in identifiers:
            raise NotUnderstood("a piece of a tool call without an index")


def _refuse_another(held: Mapping[str, Json], item: Mapping[str, Json]) -> None:
    # Gemini numbers all parallel calls 0; whoever goes by their ids tells them apart. Other servers give each piece of
    # one call an id of its own.
    function = item.get("function")
    is_piece = isinstance(function, dict) and not function.get("name")
    if held.get("id") and item.get("id") and held["id"] != item["id"] and not is_piece:
        raise NotUnderstood("two items of one index")


def _same(value: Json, kind: type) -> None:
    if not isinstance(value, kind):
        raise NotUnderstood(f"{type(value).__name__} goes on as {kind.__name__}")


def _examine(form: Form, body: Mapping[str, Json]) -> Drop | None:
    """Why a complete answer is not worth keeping: servers report failures with status 200."""
    if body.get("error") is not None:
        return Drop.ERROR_IN_200
    choices = body.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return Drop.NOT_UNDERSTOOD
    reasons = [choice.get("finish_reason") for choice in choices]
    checks = (
        (Drop.EMPTY, not choices),
        (Drop.NO_FINISH, None in reasons),
        (Drop.FINISH_REASON, not all(isinstance(r, str) and r in _FINISHED for r in reasons)),
        (Drop.EMPTY, any(_is_empty(form, choice) for choice in choices)),
        (Drop.ZERO_TOKENS, count(body.get("usage"), "completion_tokens") == 0 or _predicted(body) == 0),
        (Drop.ABORTED, any(ABORTED in form.text(choice) for choice in choices)),
    )
    return next((drop for drop, applies in checks if applies), None)


def _is_empty(form: Form, choice: Mapping[str, Json]) -> bool:
    return not form.acts(choice) and not (form.text(choice) or form.refusal(choice)).strip()


def _gist(form: Form, body: Mapping[str, Json]) -> Gist:
    choices, usage = body["choices"], body.get("usage")
    return Gist(
        texts=tuple(f"{form.reasoning(choice)} {form.text(choice)}" for choice in choices),
        cut=any(choice["finish_reason"] == "length" for choice in choices),
        acts=any(form.acts(one) or form.refusal(one) or one["finish_reason"] in _ACTED for one in choices),
        prompt_tokens=count(usage, "prompt_tokens"),
        completion_tokens=count(usage, "completion_tokens"),
    )


def _predicted(body: Mapping[str, Json]) -> Json:
    timings = body.get("timings")
    return timings.get("predicted_n") if isinstance(timings, dict) else None


def usage_of_timings(timings: Json) -> dict[str, Json]:
    """llama.cpp's usage from its timings: prompt tokens are those computed plus those found in the KV cache."""
    names = ("cache_n", "prompt_n", "predicted_n")
    if not isinstance(timings, dict) or not all(isinstance(timings.get(name), int) for name in names):
        return {}
    cached, computed, predicted = (timings[name] for name in names)
    usage = {
        "completion_tokens": predicted,
        "prompt_tokens": cached + computed,
        "total_tokens": cached + computed + predicted,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"usage": usage}
