"""Answers: assembled from an upstream's bytes, judged, and rendered again as one object or as a stream. Pure.

An answer is kept in the form of its dialect's non-streamed object, without `id` and `created`, which every replay
makes anew. Stream events are accumulated as the official clients accumulate them, so nothing is lost either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from proxy.cache.dialects.call import Dialect, Json, finite
from proxy.cache.policy import Drop

_FINISHED = frozenset({"stop", "length", "tool_calls", "function_call", "eos", "eos_token", "stop_sequence"})
_SAID_ALL = frozenset({"stop", "eos", "eos_token", "stop_sequence"})
_REPLACED = frozenset({"index", "type", "role", "id", "object", "format"})
_OUTSIDE = frozenset({"id", "created", "choices", "object"})
_ON_EVERY_EVENT = ("model", "system_fingerprint", "service_tier")
_ABORTED = "Aborted inference by Timeout ("
"""What stands in the texts that rkllama gives in place of an answer, perhaps behind the end of another answer."""


_MAX_COUNT = 1 << 53
"""Token counts beyond are nobody's, and no database holds them all."""


class NotUnderstood(ValueError):
    """The upstream sent something that cannot be put together without guessing."""


def _refuse_constant(literal: str) -> Json:
    raise NotUnderstood(f"{literal} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=finite).decode
_encoder = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Recorded:
    """A complete answer that may be kept. `usage_known`: token usage is in `body`, or this upstream never gives any.

    `seems_cut`: it was cut by all appearances, whatever it says itself.
    """

    body: dict[str, Json]
    usage_known: bool
    seems_cut: bool = False

    @property
    def was_cut(self) -> bool:
        """Whether it was cut at a limit of its length, as it says or as it seems."""
        return self.seems_cut or any(choice.get("finish_reason") == "length" for choice in self.body["choices"])

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt, where the upstream said so."""
        return _count(self.body, "prompt_tokens")

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of the answer, where the upstream said so."""
        return _count(self.body, "completion_tokens")

    def may_be_near(self, *, limited: bool) -> bool:
        """Whether it may answer other words than its own: it calls no tool, and nothing but the caller cut it short.

        `limited` says that the call itself stated how long an answer may be, and that it is no longer.
        """
        return (limited or not self.seems_cut) and all(
            _says_all(choice, limited=limited) for choice in self.body["choices"]
        )

    def encoded(self) -> bytes:
        """The form in which storage keeps it.

        Raises:
            NotUnderstood: it holds text that is not valid Unicode.
        """
        return _encoded(self.body)


def decode_body(answer: bytes) -> dict[str, Json]:
    """The answer that `Recorded.encoded` stored."""
    body: dict[str, Json] = json.loads(answer)
    return body


def _says_all(choice: Mapping[str, Json], *, limited: bool) -> bool:
    message = choice.get("message") or {}
    acts = message.get("tool_calls") or message.get("function_call") or message.get("refusal")
    return not acts and (choice.get("finish_reason") in _SAID_ALL or (limited and choice["finish_reason"] == "length"))


@dataclass(frozen=True, slots=True)
class Wire:
    """A rendered answer, cut where each replay puts an id and a time of its own."""

    parts: tuple[bytes, ...]
    stream: bool

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(map(len, self.parts))

    def render(self, answer_id: str, created: int) -> bytes:
        """The bytes to send; `created` in seconds since the epoch."""
        head = f'{{"id":"{answer_id}","created":{created},'
        return (f"data: {head}" if self.stream else head).encode("ascii").join(self.parts)


def render_whole(dialect: Dialect, body: Mapping[str, Json]) -> Wire:
    """The answer as one JSON object."""
    return Wire((b"", _encoded({"object": dialect.whole_object(), **body})[1:]), stream=False)


def render_stream(dialect: Dialect, body: Mapping[str, Json], *, include_usage: bool) -> Wire:
    """The answer as server-sent events, ended by `[DONE]`; usage comes in an event of its own where asked for."""
    common = {name: body[name] for name in _ON_EVERY_EVENT if name in body}
    late = {k: v for k, v in body.items() if k not in _OUTSIDE and k not in common and k != "usage"}
    choices = [event for choice in body["choices"] for event in dialect.split_choice(choice)]
    events: list[dict[str, Json]] = [{"choices": [choice], **common} for choice in choices]
    if include_usage:
        events.append({"choices": [], **common, "usage": body.get("usage")})
    events[-1].update(late)
    texts = [_encoded({"object": dialect.stream_object(), **event})[1:] + b"\n\n" for event in events]
    texts[-1] += b"data: [DONE]\n\n"
    return Wire((b"", *texts), stream=True)


def read_whole(dialect: Dialect, content: bytes) -> Recorded | Drop:
    """Judge a non-streamed answer."""
    try:
        body = _decode(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return Drop.NOT_JSON
    if not isinstance(body, dict):
        return Drop.NOT_UNDERSTOOD
    kept = {name: value for name, value in body.items() if name not in ("id", "created")}
    drop = _examine(dialect, kept)
    return drop if drop is not None else Recorded(kept, usage_known=True)


class Assembler:
    """Puts a stream's events together. Feed it the data of each event in turn; `finish` judges the result."""

    def __init__(self, dialect: Dialect) -> None:
        """Begin an empty answer."""
        self._dialect = dialect
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
            self._take(_decode(data))
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
        choices = [self._dialect.finish_choice(dict(self._choices[index])) for index in sorted(self._choices)]
        body = {**self._outside, "object": self._dialect.whole_object(), "choices": choices}
        if usage_from_timings and body.get("usage") is None:
            body.update(_usage_of_timings(body.get("timings")))
        drop = _examine(self._dialect, body)
        return drop if drop is not None else Recorded(body, usage_asked or body.get("usage") is not None)

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
            elif value is not None or name not in held:
                held[name] = value
        delta = choice.get("delta")
        said = delta if isinstance(delta, dict) else {"text": choice.get("text")}
        speaks = any(value for name, value in said.items() if name != "role")
        self.spoke = self.spoke or speaks
        # A token may end within a character, and bring no text yet.
        silent = choice.get("finish_reason") is None and "" in said.values() and "role" not in said
        self.deltas += speaks or silent


def _merge(held: dict[str, Json], delta: Mapping[str, Json]) -> None:
    """Accumulate as the official clients do: texts join, lists grow, indexed items merge, the rest is replaced."""
    for name, value in delta.items():
        before = held.get(name)
        if value is None:
            held.setdefault(name, None)
        elif isinstance(value, dict):
            held[name] = before = {} if before is None else before
            _same(before, dict)
            _merge(before, value)
        elif isinstance(value, list):
            held[name] = before = [] if before is None else before
            _same(before, list)
            _extend(before, value)
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
        _merge(held[index], item)


def _refuse_fragment(held: list[Json], item: Json) -> None:
    # Without an index nobody can tell a further piece of a tool call from another call.
    if isinstance(item, dict) and "function" in item:
        identifiers = [call.get("id") for call in held if isinstance(call, dict)]
        if item.get("id") is None or item["id"] in identifiers:
            raise NotUnderstood("a piece of a tool call without an index")


def _same(value: Json, kind: type) -> None:
    if not isinstance(value, kind):
        raise NotUnderstood(f"{type(value).__name__} goes on as {kind.__name__}")


def _examine(dialect: Dialect, body: Mapping[str, Json]) -> Drop | None:
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
        (Drop.EMPTY, any(dialect.is_empty(choice) for choice in choices)),
        (Drop.ZERO_TOKENS, _count(body, "completion_tokens") == 0 or _predicted(body) == 0),
        (Drop.ABORTED, any(_ABORTED in dialect.text(choice) for choice in choices)),
    )
    return next((drop for drop, applies in checks if applies), None)


def _count(body: Mapping[str, Json], name: str) -> int | None:
    usage = body.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    plausible = isinstance(count, int) and not isinstance(count, bool) and 0 <= count < _MAX_COUNT
    return count if plausible else None


def _predicted(body: Mapping[str, Json]) -> Json:
    timings = body.get("timings")
    return timings.get("predicted_n") if isinstance(timings, dict) else None


def _usage_of_timings(timings: Json) -> dict[str, Json]:
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


def _encoded(value: Json) -> bytes:
    try:
        return _encoder.encode(value)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise NotUnderstood("text that is not valid Unicode, or a number that few can read") from error
