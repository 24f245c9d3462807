"""`/v1/responses`: OpenAI's Responses API, as llama.cpp and others speak it. Pure.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from proxy.cache.answer import ABORTED, Gist, Pieces, Wire, count, in_one
from proxy.cache.dialects.call import OF_THE_CALL, Json, NotCacheable, Reading, storable
from proxy.cache.dialects.responses_stream import REASONED, REFUSED, SAID, Assembler, events, given, shown
from proxy.cache.policy import Bypass, Drop

_SYSTEM = ("system", "developer")
_ASKING = ("user", *_SYSTEM)
_MESSAGE = (None, "message")
_OWN_TOOLS = ("function", "custom")
_RUN_BY_CALLERS = frozenset(
    {*_OWN_TOOLS, "computer", "computer_use_preview", "local_shell", "apply_patch"},
)
"""Tools that the caller runs; the server runs all others, and the answer depends on what they find."""
_LIMIT = "max_output_tokens"
_TALKING = ("message", "reasoning")
_CALLS = ("function_call", "custom_tool_call", "computer_call", "local_shell_call", "apply_patch_call")
_BY_THE_MODEL = frozenset({*_TALKING, *_CALLS})
"""Items that depend on the call alone; others tell what the server found or did, though no tool was named."""


class Responses:
    """The dialect. An answer is the `response` object without its id; `completed_at` stays where there is one, as 0."""

    endpoint = "responses"
    paths = ("/v1/responses", "/responses")
    id_prefix = "resp_"
    usage_on_request = False

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        """See `Dialect`."""
        given_input = body.get("input")
        if body.get("prompt") is not None:
            # A template that the server keeps, and that may be another one tomorrow.
            return NotCacheable(Bypass.PREVIOUS_RESPONSE)
        if _runs_tools(body):
            return NotCacheable(Bypass.BACKGROUND)
        if isinstance(given_input, str):
            return _reading(body, [{"role": "user", "content": given_input}], "")
        items = given_input if isinstance(given_input, list) else []
        if not items or not all(isinstance(item, dict) for item in items):
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        if any(_is_reference(item) for item in items):
            return NotCacheable(Bypass.PREVIOUS_RESPONSE)
        shell = {**items[-1], "content": _without_text(items[-1].get("content"))}
        return _reading(body, items, [*items[:-1], shell])

    def kept(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """See `Dialect`."""
        kept = {name: value for name, value in body.items() if name not in ("id", "created_at")}
        if kept.get("completed_at") is not None:
            kept["completed_at"] = 0
        return kept | {name: none for name, none in OF_THE_CALL.items() if kept.get(name)}

    def judge(self, body: Mapping[str, Json]) -> Gist | Drop:
        """See `Dialect`.

        llama.cpp says "completed" of answers that it cut at `max_output_tokens`, too.
        """
        output = body.get("output")
        if body.get("error") is not None:
            return Drop.ERROR_IN_200
        if not isinstance(output, list) or not all(_is_item(item) for item in output):
            return Drop.NOT_UNDERSTOOD
        return _unfinished(body) or _spoiled(body, output) or _gist(body, output)

    def assembler(self) -> Assembler:
        """See `Dialect`."""
        return Assembler(self)

    def whole(self, body: Mapping[str, Json]) -> Wire:
        """See `Dialect`."""
        return Wire(given({"object": "response", **body}))

    def stream(self, body: Mapping[str, Json], *, include_usage: bool, pieces: Pieces = in_one) -> Wire:
        """See `Dialect`; ended by the event that holds the whole answer, which always tells the usage."""
        del include_usage
        return Wire(events({"object": "response", **body}, pieces))


def _reading(body: Mapping[str, Json], items: Sequence[dict[str, Json]], shell: Json) -> Reading:
    """`shell` is the body's `input` without the text of its last item."""
    asked = [_all_text(item.get("content")) for item in items if item.get("role") == "user"]
    instructions = body.get("instructions")
    leading = takewhile(lambda item: item.get("role") in _SYSTEM, items)
    system = [*([] if instructions is None else [instructions]), *leading]
    later = any(item.get("type") not in _MESSAGE or item.get("role") not in _ASKING for item in items)
    last = items[-1]
    texts = _texts(last.get("content")) if last.get("role") == "user" and last.get("type") in _MESSAGE else None
    words = "\n".join(texts or ())
    timely = asked[-1] if asked else ""
    left_to_store = body.get("store") is None
    # llama.cpp repeats what an answer goes on from in a whole answer, and leaves it out of the pieces of a stream.
    by_form = last.get("role") not in _ASKING and not str(last.get("type")).endswith("_output")
    echoed = [body.get(name) for name in OF_THE_CALL]
    if texts is None or not words.strip() or not storable(words) or _exact_only(body):
        return Reading(None, (), {}, timely, system, later, left_to_store, by_form, echoed)
    return Reading(words, texts, {**body, "input": shell}, timely, system, later, left_to_store, echoed=echoed)


def _is_reference(item: Mapping[str, Json]) -> bool:
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "role" not in item and "id" in item)


def _runs_tools(body: Mapping[str, Json]) -> bool:
    """Whether the server itself may run tools, and look up what is another tomorrow, or do something."""
    tools = body.get("tools")
    kinds = [tool.get("type") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return not all(isinstance(kind, str) and kind in _RUN_BY_CALLERS for kind in kinds)


def _exact_only(body: Mapping[str, Json]) -> bool:
    tools = body.get("tools") or []
    own = isinstance(tools, list) and all(isinstance(t, dict) and t.get("type") in _OWN_TOOLS for t in tools)
    detailed = any(body.get(name) for name in ("include", "top_logprobs", "logprobs"))
    return not own or detailed or body.get("n") not in (None, 1)


def _texts(content: Json) -> list[str] | None:
    """The texts of a message's parts; None where it is not all text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content:
        return None
    parts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "input_text" else None for part in content
    ]
    texts = [text for text in parts if isinstance(text, str)]
    return texts if len(texts) == len(parts) else None


def _all_text(content: Json) -> str:
    """What text there is in a message, whatever else there may be."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _without_text(content: Json) -> Json:
    if not isinstance(content, list):
        return ""
    return [{**part, "text": ""} if isinstance(part, dict) else part for part in content]


def _is_item(item: Json) -> bool:
    """Whether it is an item of output whose parts can be told apart."""
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        return False
    if item["type"] not in _TALKING:
        return True
    return all(
        isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
        for parts in (item.get("content") or [], item.get("summary") or [])
    )


def _unfinished(body: Mapping[str, Json]) -> Drop | None:
    status = body.get("status")
    if status is None:
        return Drop.NO_FINISH
    if status in ("in_progress", "queued"):
        return Drop.INCOMPLETE
    whys = {"completed": (None, _LIMIT), "incomplete": (_LIMIT,)}
    finished = isinstance(status, str) and _why_incomplete(body) in whys.get(status, ())
    return None if finished else Drop.FINISH_REASON


def _why_incomplete(body: Mapping[str, Json]) -> Json:
    details = body.get("incomplete_details")
    return details.get("reason") if isinstance(details, dict) else None


def _spoiled(body: Mapping[str, Json], output: Sequence[dict[str, Json]]) -> Drop | None:
    kinds, texts = [item["type"] for item in output], shown(output)
    silent = not "".join((*texts[SAID], *texts[REFUSED])).strip() and all(kind in _TALKING for kind in kinds)
    checks = (
        (Drop.EMPTY, silent),
        (Drop.FINISH_REASON, not _BY_THE_MODEL.issuperset(kinds)),
        (Drop.ZERO_TOKENS, count(body.get("usage"), "output_tokens") == 0),
        (Drop.ABORTED, any(ABORTED in text for text in texts[SAID])),
    )
    return next((drop for drop, applies in checks if applies), None)


def _gist(body: Mapping[str, Json], output: Sequence[dict[str, Json]]) -> Gist:
    texts, usage = shown(output), body.get("usage")
    halves = any(item["type"] in _TALKING and item.get("status") == "incomplete" for item in output)
    return Gist(
        texts=(" ".join(("".join(texts[REASONED]), "".join(texts[SAID]))),),
        cut=halves or _why_incomplete(body) == _LIMIT,
        acts=bool(texts[REFUSED]) or any(item["type"] not in _TALKING for item in output),
        prompt_tokens=count(usage, "input_tokens"),
        completion_tokens=count(usage, "output_tokens"),
    )


RESPONSES = Responses()
"""The responses dialect."""
