"""The events of a `/v1/responses` stream: made from an answer, and put together to one. Pure.

The last event holds the whole answer, so that the others only have to agree with it.
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from proxy.cache.answer import NotUnderstood, Pieces, Recorded, decode, encoded, fresh
from proxy.cache.dialects.call import Json
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.policy import Drop

SAID, REFUSED, REASONED = "output_text", "refusal", "reasoning_text"
"""Kinds of generated text, by the names of their events."""
_SUMMARY = "reasoning_summary_text"
_PARTS = {SAID: "text", REFUSED: "refusal", REASONED: "text"}
"""Under which name each kind of content holds its text."""
_CALLS = {
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
"""The events of each kind of call, and the name under which it holds what they say."""
_GENERATED = frozenset({*_PARTS, _SUMMARY, *(events for events, _ in _CALLS.values())})
_ENDS = ("response.completed", "response.incomplete")
_FAILURES = ("error", "response.failed")
_LATE = ("usage", "incomplete_details", "completed_at", "output_text")
"""What an answer does not know of itself while it begins."""
_COMPLETED = fresh({}, created="completed_at").partition(b",")[2]
"""The end of an object that was completed when it was made."""

_Event = tuple[str, dict[str, Json]]
"""An event's type without `response.`, and what it says."""


def given(body: Mapping[str, Json]) -> bytes:
    """A response object with the id and the time of a replay.

    Raises:
        NotUnderstood: see `encoded`.
    """
    if body.get("completed_at") is None:
        return fresh(body, created="created_at")
    rest = {name: value for name, value in body.items() if name != "completed_at"}
    return fresh(rest, created="created_at")[:-1] + b"," + _COMPLETED


def events(body: Mapping[str, Json], pieces: Pieces) -> bytes:
    """The events that tell an answer, texts cut by `pieces`.

    Raises:
        NotUnderstood: see `encoded`.
    """
    # llama.cpp puts its timings beside the response, not into it.
    response = {name: value for name, value in body.items() if name != "timings"}
    begun = {name: None if name in _LATE else value for name, value in response.items()}
    opening = b'"response":%b}' % given({**begun, "status": "in_progress", "output": []})
    parts = [("created", opening), ("in_progress", opening)]
    for index, item in enumerate(body["output"]):
        parts += [(kind, encoded(said)[1:]) for kind, said in _item_events(index, item, pieces)]
    timings = b',"timings":%b' % encoded(body["timings"]) if "timings" in body else b""
    parts.append((body["status"], b'"response":%b%b}' % (given(response), timings)))
    return b"".join(_framed(number, kind, members) for number, (kind, members) in enumerate(parts))


def _framed(number: int, kind: str, members: bytes) -> bytes:
    name = f"response.{kind}".encode("ascii")
    return b'event: %b\ndata: {"type":"%b","sequence_number":%d,%b\n\n' % (name, name, number, members)


def _item_events(index: int, item: dict[str, Json], pieces: Pieces) -> Iterator[_Event]:
    # llama.cpp's calls have no id of their own, and its events name them by the id of the call.
    place = {"item_id": item.get("id") or item.get("call_id") or "", "output_index": index}
    yield "output_item.added", {"output_index": index, "item": _opened(item)}
    for at, part in enumerate(_parts(item, "summary")):
        yield from _summary_events({**place, "summary_index": at}, part, pieces)
    for at, part in enumerate(_parts(item, "content")):
        yield from _content_events({**place, "content_index": at}, part, pieces)
    kind, field = _CALLS.get(item["type"], ("", ""))
    if kind and isinstance(item.get(field), str):
        yield from _deltas(kind, place, item[field], pieces)
        yield f"{kind}.done", {**place, field: item[field]}
    yield "output_item.done", {"output_index": index, "item": item}


def _opened(item: Mapping[str, Json]) -> dict[str, Json]:
    """The item before anything of it was generated."""
    opened = dict(item)
    if isinstance(opened.get("status"), str):
        opened["status"] = "in_progress"
    for name in ("summary", "content"):
        if _parts(item, name):
            opened[name] = []
    _, field = _CALLS.get(item["type"], ("", ""))
    return opened | ({field: ""} if field in opened else {})


def _summary_events(place: dict[str, Json], part: dict[str, Json], pieces: Pieces) -> Iterator[_Event]:
    yield "reasoning_summary_part.added", {**place, "part": {**part, "text": ""}}
    if isinstance(part.get("text"), str):
        yield from _deltas(_SUMMARY, place, part["text"], pieces)
        yield f"{_SUMMARY}.done", {**place, "text": part["text"]}
    yield "reasoning_summary_part.done", {**place, "part": part}


def _content_events(place: dict[str, Json], part: dict[str, Json], pieces: Pieces) -> Iterator[_Event]:
    kind = part.get("type")
    field = _PARTS.get(kind, "") if isinstance(kind, str) else ""
    empty: dict[str, list[Json]] = {
        name: [] for name in ("annotations", "logprobs") if isinstance(part.get(name), list)
    }
    yield "content_part.added", {**place, "part": {**part, **empty, **({field: ""} if field in part else {})}}
    if isinstance(kind, str) and isinstance(part.get(field), str):
        told = {"logprobs": part.get("logprobs") or []} if kind == SAID else {}
        yield from _deltas(kind, place, part[field], pieces, told)
        for at, annotation in enumerate(part.get("annotations") or ()):
            yield f"{kind}.annotation.added", {**place, "annotation_index": at, "annotation": annotation}
        yield f"{kind}.done", {**place, field: part[field], **told}
    yield "content_part.done", {**place, "part": part}


def _deltas(
    kind: str, place: Mapping[str, Json], text: str, pieces: Pieces, told: Mapping[str, list[Json]] | None = None
) -> Iterator[_Event]:
    """The pieces of a text; the last brings along what was `told` of all of it."""
    said = [piece for piece in pieces(text) if piece]
    for number, piece in enumerate(said, 1):
        beside = {name: values if number == len(said) else [] for name, values in (told or {}).items()}
        yield f"{kind}.delta", {**place, "delta": piece, **beside}


def shown(output: Sequence[Mapping[str, Json]]) -> defaultdict[str, list[str]]:
    """The generated texts of each kind, in their order; empty ones are left out."""
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for item in output:
        call, field = _CALLS.get(item["type"], ("", ""))
        found = [(call, item.get(field)), *((_SUMMARY, part.get("text")) for part in _parts(item, "summary"))]
        for part in _parts(item, "content"):
            kind = part.get("type")
            if isinstance(kind, str) and kind in _PARTS:
                found.append((kind, part.get(_PARTS[kind])))
        for kind, text in found:
            if isinstance(text, str) and text:
                texts[kind].append(text)
    return texts


def _parts(item: Mapping[str, Json], name: str) -> list[dict[str, Json]]:
    """The parts of a message or of reasoning."""
    parts = item.get(name) if item["type"] in ("message", "reasoning") else None
    return parts if isinstance(parts, list) else []


class Assembler:
    """Takes the whole answer from the last event, where the others said the same; see `Assembling`."""

    def __init__(self, dialect: Dialect) -> None:
        """Nothing has come yet."""
        self._dialect = dialect
        self._body: dict[str, Json] = {}
        self._heard: defaultdict[str, list[str]] = defaultdict(list)
        self._drop: Drop | None = None
        self.done = False
        """Whether the last event has come."""
        self.spoke = False
        """Whether anything was generated yet: the end of the time to the first token."""
        self.deltas = 0
        """How many pieces of the answer have come: tokens, of servers that send each as it is generated."""

    def feed(self, data: str) -> None:
        """Take the data of one event."""
        # Some servers end with the mark of the other dialects.
        if self.done or self._drop is not None or data == "[DONE]":
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
        del usage_asked, usage_from_timings
        if self._drop is not None:
            return self._drop
        if not self.done:
            return Drop.INCOMPLETE
        body = self._dialect.kept(self._body)
        gist = self._dialect.judge(body)
        if isinstance(gist, Drop):
            return gist
        if not self._agrees(body["output"]):
            return Drop.NOT_UNDERSTOOD
        return Recorded(body, body.get("usage") is not None, gist)

    def _take(self, event: Json) -> None:
        if not isinstance(event, dict):
            raise NotUnderstood("an event is an object")
        kind = event.get("type")
        if event.get("error") is not None or kind in _FAILURES:
            self._drop = Drop.ERROR_IN_STREAM
        elif kind in _ENDS:
            self._end(event)
        elif isinstance(kind, str) and kind.endswith(".delta"):
            self._hear(kind.removeprefix("response.").removesuffix(".delta"), event.get("delta"))

    def _hear(self, kind: str, text: Json) -> None:
        if kind not in _GENERATED:
            return
        if not isinstance(text, str):
            raise NotUnderstood("what is generated is text")
        self._heard[kind].append(text)
        self.spoke = self.spoke or text != ""
        self.deltas += 1

    def _end(self, event: Mapping[str, Json]) -> None:
        response = event.get("response")
        if not isinstance(response, dict) or event["type"] != f"response.{response.get('status')}":
            raise NotUnderstood("the last event holds the whole answer")
        beside = {"timings": event["timings"]} if "timings" in event else {}
        self._body = {**beside, **response}
        self.done = True

    def _agrees(self, output: Sequence[Mapping[str, Json]]) -> bool:
        """Whether all that was heard is in the answer; not every server sends every kind of text in pieces."""
        texts = shown(output)
        return all("".join(heard) == "".join(texts[kind]) for kind, heard in self._heard.items())
