"""The streams of `/v1/messages`: a message as events, and events as a message. Pure.

Events are accumulated as the official clients accumulate them, so nothing is lost either way.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from proxy.cache.answer import Gist, NotUnderstood, Pieces, Recorded, Wire, decode, encoded, fresh
from proxy.cache.dialects.call import Json
from proxy.cache.policy import Drop

_AT_END = ("stop_reason", "stop_sequence", "stop_details")
"""What an answer says of its end: unknown in its first event, though named there."""
_USAGE_AT_END = frozenset({"output_tokens_details", "server_tool_use"})
_WITH_INPUT = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})
_JOINED = {"text_delta": "text", "thinking_delta": "thinking"}
"""Kinds of deltas whose texts join: the kind of their block, which is the name of the field in both."""
_DELTAS = {
    **{delta: (frozenset({kind}), kind) for delta, kind in _JOINED.items()},
    "citations_delta": (frozenset({"text"}), "citation"),
    "signature_delta": (frozenset({"thinking"}), "signature"),
    "input_json_delta": (_WITH_INPUT, "partial_json"),
}
"""Kinds of deltas: the kinds of blocks that they belong to, and the field that holds what is new."""
_ELSEWHERE = frozenset({"id", "type", "content", "delta", "usage", *_AT_END})
"""What is not taken from the event that amends a message as if it were a field of that."""
Judge = Callable[[Mapping[str, Json]], Gist | Drop]


def render(body: Mapping[str, Json], pieces: Pieces) -> Wire:
    """A stored answer as events; its texts cut by `pieces`.

    Raises:
        NotUnderstood: see `encoded`.
    """
    usage: Mapping[str, Json] = body["usage"]
    begun = {**{name: value for name, value in usage.items() if name not in _USAGE_AT_END}, "output_tokens": 0}
    message = {name: value for name, value in body.items() if name != "content"}
    message |= {"content": [], **{name: None for name in _AT_END if name in body}, "usage": begun}
    end = {name: body[name] for name in _AT_END if name in body}
    spent = {name: value for name, value in usage.items() if name in _USAGE_AT_END or name == "output_tokens"}
    # The marks of a replay stand in the rendered message: it cannot be encoded once more.
    start = b'{"type":"message_start","message":%b}' % fresh(message)
    blocks = [event for index, block in enumerate(body["content"]) for event in _events(index, block, pieces)]
    rest = [*blocks, {"type": "message_delta", "delta": end, "usage": spent}, {"type": "message_stop"}]
    named = [(b"message_start", start), *((event["type"].encode("ascii"), encoded(event)) for event in rest)]
    return Wire(b"".join(b"event: %b\ndata: %b\n\n" % event for event in named))


def _events(index: int, block: Mapping[str, Json], pieces: Pieces) -> Iterator[dict[str, Json]]:
    held = dict(block)
    deltas = list(_deltas(held, pieces))
    yield {"type": "content_block_start", "index": index, "content_block": held}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def _deltas(held: dict[str, Json], pieces: Pieces) -> Iterator[dict[str, Json]]:
    """What is said of a block after its start, taken out of `held`."""
    kind = held["type"]
    for delta, joined in _JOINED.items():
        if kind == joined and held[joined]:
            yield from ({"type": delta, joined: piece} for piece in pieces(held[joined]))
            held[joined] = ""
    if kind == "text" and isinstance(held.get("citations"), list):
        yield from ({"type": "citations_delta", "citation": citation} for citation in held["citations"])
        held["citations"] = []
    if kind == "thinking" and isinstance(held.get("signature"), str):
        yield {"type": "signature_delta", "signature": held["signature"]}
        held["signature"] = ""
    if kind in _WITH_INPUT and held.get("input"):
        yield {"type": "input_json_delta", "partial_json": encoded(held["input"]).decode("utf-8")}
        held["input"] = {}


class Assembler:
    """Puts a stream's events together; see `Assembling`."""

    def __init__(self, judge: Judge) -> None:
        """Begin an empty answer; `judge` is the dialect's."""
        self._judge = judge
        self._message: dict[str, Json] | None = None
        self._blocks: list[_Block] = []
        self._drop: Drop | None = None
        self.done = False
        """Whether the message has stopped."""
        self.spoke = False
        """Whether anything of the answer has come: the end of the time to the first token."""
        self.deltas = 0
        """How many pieces of the answer have come: tokens, of servers that send each as it is generated."""

    def feed(self, data: str) -> None:
        """Take the data of one event."""
        if self.done or self._drop is not None:
            return
        try:
            self._take(_object(decode(data)))
        except (ValueError, RecursionError):
            self._drop = Drop.NOT_UNDERSTOOD

    def fail(self) -> None:
        """The stream carried an event that is no data: an error, as far as anyone can tell."""
        self._drop = self._drop or Drop.ERROR_IN_STREAM

    def finish(self, *, usage_asked: bool, usage_from_timings: bool) -> Recorded | Drop:
        """The answer, or why it cannot be kept."""
        del usage_asked, usage_from_timings  # it comes always
        if self._drop is not None:
            return self._drop
        if not self.done or self._message is None:
            return Drop.INCOMPLETE
        try:
            body = {**self._message, "content": [block.finished() for block in self._blocks]}
        except (ValueError, RecursionError):
            return Drop.NOT_UNDERSTOOD
        gist = self._judge(body)
        return gist if isinstance(gist, Drop) else Recorded(body, usage_known=True, gist=gist)

    def _take(self, event: dict[str, Json]) -> None:
        kind = event.get("type")
        if kind == "error" or event.get("error") is not None:
            self._drop = Drop.ERROR_IN_STREAM
        elif kind == "ping":
            return
        elif (kind == "message_start") is not (self._message is None):
            raise NotUnderstood("a message begins once, and before all else")
        elif self._message is None:
            self._begin(_object(event.get("message")))
        elif kind == "content_block_start":
            self._start(event.get("index"), _object(event.get("content_block")))
        elif kind == "content_block_delta":
            self._extend(self._block(event), _object(event.get("delta")))
        elif kind == "content_block_stop":
            self._block(event).stopped = True
        elif kind == "message_delta":
            self._amend(self._message, event)
        elif kind == "message_stop":
            self.done = True
        else:
            raise NotUnderstood("an event of an unknown kind")

    def _begin(self, message: dict[str, Json]) -> None:
        content = message.get("content") or []
        if not isinstance(content, list):
            raise NotUnderstood("content is a list")
        self._message = {name: value for name, value in message.items() if name not in ("id", "content")}
        self._message["usage"] = {**_object(message.get("usage") or {})}
        self._blocks = [_Block(_object(block)) for block in content]

    def _start(self, index: Json, held: dict[str, Json]) -> None:
        begun = self._at(index)
        if begun is not None and not begun.stopped and begun.start == held:
            # llama.cpp begins a block anew, where some of it had been held back until the answer ended.
            return
        if index != len(self._blocks):
            raise NotUnderstood("blocks come in order")
        self._blocks.append(_Block(held))
        self.spoke = self.spoke or held["type"] in _WITH_INPUT

    def _extend(self, block: _Block, delta: dict[str, Json]) -> None:
        speaks = block.extend(delta)
        self.spoke = self.spoke or speaks
        # A token may end within a character, and bring no text yet.
        self.deltas += speaks or delta.get("type") in _JOINED

    def _amend(self, message: dict[str, Json], event: dict[str, Json]) -> None:
        delta = _object(event.get("delta"))
        message.update({name: delta.get(name) for name in _AT_END if name in delta or name in message})
        # What else is said of a message is said again only where it is new.
        _renew(message, {name: value for name, value in {**event, **delta}.items() if name not in _ELSEWHERE})
        _renew(message["usage"], _object(event.get("usage") or {}))

    def _block(self, event: dict[str, Json]) -> _Block:
        block = self._at(event.get("index"))
        if block is None:
            raise NotUnderstood("there is no such block")
        return block

    def _at(self, index: Json) -> _Block | None:
        return self._blocks[index] if isinstance(index, int) and 0 <= index < len(self._blocks) else None


class _Block:
    """A block of content that is being put together."""

    __slots__ = ("_held", "_input", "start", "stopped")

    def __init__(self, start: dict[str, Json]) -> None:
        """`start` is what its first event says.

        Raises:
            NotUnderstood: it does not say of what kind the block is.
        """
        if not isinstance(start.get("type"), str):
            raise NotUnderstood("a block of no kind")
        self.start = start
        self.stopped = False
        self._held = dict(start)
        self._input: list[str] = []

    def extend(self, delta: dict[str, Json]) -> bool:
        """Take a delta; tells whether it brought anything that was generated.

        Raises:
            NotUnderstood: it does not belong here, or is of an unknown kind.
        """
        kind = delta.get("type")
        kinds, field = _DELTAS.get(kind if isinstance(kind, str) else "", (frozenset[str](), ""))
        if self._held["type"] not in kinds:
            raise NotUnderstood("a piece of nothing known")
        if field == "citation":
            self._held["citations"] = [*_list(self._held.get("citations")), _object(delta.get(field))]
            return False
        piece = _string(delta.get(field))
        if field == "signature":
            self._held[field] = piece
            return False
        if field == "partial_json":
            self._input.append(piece)
        else:
            self._held[field] = _string(self._held.get(field, "")) + piece
        return bool(piece)

    def finished(self) -> dict[str, Json]:
        """The block as it is in a whole message.

        Raises:
            ValueError: its input was cut.
        """
        text = "".join(self._input)
        if text:
            return {**self._held, "input": decode(text)}
        # llama.cpp begins a call without its input, which may be none.
        return {"input": {}, **self._held} if self._held["type"] == "tool_use" else self._held


def _renew(held: dict[str, Json], said: Mapping[str, Json]) -> None:
    held.update({name: value for name, value in said.items() if value is not None or name not in held})


def _object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise NotUnderstood("an object is expected")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list | None):
        raise NotUnderstood("a list is expected")
    return value or []


def _string(value: Json) -> str:
    if not isinstance(value, str):
        raise NotUnderstood("a text is expected")
    return value
