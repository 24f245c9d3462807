"""The responses dialect: what identifies a call, and that an answer survives storing and replay in both forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from proxy.cache.answer import Gist, Recorded, decode_body
from proxy.cache.dialects.call import Call, NotCacheable, Reading, read_call
from proxy.cache.dialects.dialect import read_whole
from proxy.cache.dialects.responses import RESPONSES
from proxy.cache.policy import Bypass, Drop
from proxy.cache.sse import EventSplitter

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SAID = TEXT.map(lambda text: text + "x")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
TOKEN = st.fixed_dictionaries(
    {
        "token": TEXT,
        "logprob": st.floats(-30, 0),
        "bytes": st.lists(st.integers(0, 255), max_size=4),
        "top_logprobs": st.just([]),
    }
)
CITATION = st.fixed_dictionaries(
    {
        "type": st.just("url_citation"),
        "url": TEXT,
        "title": TEXT,
        "start_index": st.integers(0, 9),
        "end_index": st.integers(9, 99),
    }
)
PART = st.fixed_dictionaries(
    {"type": st.just("output_text"), "text": SAID, "annotations": st.lists(CITATION, max_size=2)},
    optional={"logprobs": st.lists(TOKEN, max_size=2), "x_unknown": TEXT},
)
REFUSAL = st.fixed_dictionaries({"type": st.just("refusal"), "refusal": SAID})
MESSAGE = st.fixed_dictionaries(
    {
        "type": st.just("message"),
        "role": st.just("assistant"),
        "status": st.just("completed"),
        "content": st.lists(PART | REFUSAL, min_size=1, max_size=3),
    },
    optional={"x_unknown": TEXT},
)
REASONING = st.fixed_dictionaries(
    {
        "type": st.just("reasoning"),
        "summary": st.lists(st.fixed_dictionaries({"type": st.just("summary_text"), "text": TEXT}), max_size=2),
    },
    optional={
        "content": st.lists(st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": TEXT}), max_size=2),
        "encrypted_content": st.none() | TEXT,
    },
)
FUNCTION_CALL = st.fixed_dictionaries(
    {"type": st.just("function_call"), "call_id": SAID, "name": SAID, "arguments": TEXT},
    optional={"status": st.just("completed")},
)
CUSTOM_CALL = st.fixed_dictionaries(
    {"type": st.just("custom_tool_call"), "call_id": SAID, "name": SAID, "input": TEXT},
)
SHELL_CALL = st.just(
    {
        "type": "local_shell_call",
        "call_id": "call_1",
        "status": "completed",
        "action": {"type": "exec", "command": ["ls"], "env": {}},
    }
)
ITEM = st.one_of(MESSAGE, REASONING, FUNCTION_CALL, CUSTOM_CALL, SHELL_CALL)


def numbered(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every item with an id of its own, as all but llama.cpp's calls have."""
    prefixes = {"message": "msg", "reasoning": "rs"}
    own = [{**item, **({"call_id": f"call_{n}"} if "call_id" in item else {})} for n, item in enumerate(items)]
    return [{**item, "id": f"{prefixes.get(item['type'], 'fc')}_{n}"} for n, item in enumerate(own)]


OUTPUT = st.tuples(st.lists(ITEM, max_size=3), MESSAGE | FUNCTION_CALL).map(lambda two: numbered([*two[0], two[1]]))
USAGE = st.fixed_dictionaries(
    {
        "input_tokens": st.integers(0, 10**6),
        "output_tokens": st.integers(1, 10**6),
        "total_tokens": st.integers(1),
        "input_tokens_details": st.just({"cached_tokens": 3, "cache_write_tokens": 0}),
        "output_tokens_details": st.just({"reasoning_tokens": 2}),
    }
)
BODIES = st.fixed_dictionaries(
    {
        "object": st.just("response"),
        "model": TEXT,
        "output": OUTPUT,
        "status": st.just("completed"),
        "usage": USAGE,
        "tools": st.just([]),
        "tool_choice": st.just("auto"),
        "parallel_tool_calls": st.booleans(),
    },
    optional={
        "completed_at": st.none() | st.just(0),
        "error": st.none(),
        "incomplete_details": st.none(),
        "instructions": st.none() | TEXT,
        "metadata": st.just({}),
        "timings": st.fixed_dictionaries({"predicted_n": st.integers(1, 99)}),
        "x_unknown": JSON,
    },
)
PIECES = st.integers(1, 5).map(lambda size: lambda text: [text[at : at + size] for at in range(0, len(text), size)])


def answer(*output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A stored answer in the least form that will do."""
    said = list(output) or [message("Hi.")]
    return {"object": "response", "model": "tiny", "output": said, "status": "completed", **fields}


def message(text: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part], **fields}


def assembled(wire: bytes, cuts: tuple[int, ...] | list[int] = ()) -> Recorded | Drop:
    """What a recorder makes of a stream whose bytes arrive in pieces that end at these places."""
    splitter, assembler = EventSplitter(), RESPONSES.assembler()
    edges = [0, *sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]
    for start, end in pairwise(edges):
        for data in splitter.feed(wire[start:end]):
            assert data is not None
            assembler.feed(data)
    return assembler.finish(usage_asked=False, usage_from_timings=False)


def events_of(wire: bytes) -> list[Any]:
    events = []
    for event in wire.decode().removesuffix("\n\n").split("\n\n"):
        name, _, data = event.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def streamed(*events: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def end(body: dict[str, Any]) -> dict[str, Any]:
    return {"type": f"response.{body['status']}", "response": {"id": "resp_up", "created_at": 1, **body}}


# Answers.


@given(BODIES)
def test_a_whole_answer_comes_back_whole(body: dict[str, Any]) -> None:
    recorded = read_whole(RESPONSES, json.dumps({"id": "resp_up", "created_at": 1, **body}).encode())
    assert isinstance(recorded, Recorded)
    replayed = json.loads(RESPONSES.whole(decode_body(recorded.encoded())).render("resp_new", 7))
    times = {"completed_at": 7} if body.get("completed_at") == 0 else {}
    assert replayed == {**body, "id": "resp_new", "created_at": 7, **times}


@given(BODIES, PIECES, st.lists(st.integers(0), max_size=6))
def test_a_stream_says_all_that_the_whole_answer_says(body: dict[str, Any], pieces: Any, cuts: list[int]) -> None:
    wire = RESPONSES.stream(body, include_usage=False, pieces=pieces).render("resp_new", 7)
    recorded = assembled(wire, cuts)
    assert isinstance(recorded, Recorded)
    assert recorded.body == body
    assert recorded.usage_known


OFFICIAL: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@settings(deadline=None)  # the official types are built when first used
@given(BODIES, PIECES)
def test_the_official_types_and_the_official_accumulation_take_every_event(body: dict[str, Any], pieces: Any) -> None:
    wire = RESPONSES.stream(body, include_usage=False, pieces=pieces).render("resp_new", 7)
    state: ResponseStreamState[None] = ResponseStreamState(input_tools=omit, text_format=omit)
    events = [OFFICIAL.validate_python(event) for event in events_of(wire)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        state.handle_event(event)
    final = state._completed_response
    assert final is not None
    assert (final.id, final.created_at) == ("resp_new", 7)
    accumulated = state.accumulate_event(events[-1])
    assert accumulated.output_text == final.output_text == "".join(texts_of(body))
    assert list(arguments_of(accumulated)) == list(arguments_of(final))


def texts_of(body: dict[str, Any]) -> Iterator[str]:
    parts = [part for item in body["output"] if item["type"] == "message" for part in item["content"]]
    return (part["text"] for part in parts if part["type"] == "output_text")


def arguments_of(response: Response) -> Iterator[str]:
    return (item.arguments for item in response.output if item.type == "function_call")


@given(BODIES, st.data())
def test_whatever_is_believed_can_be_given_in_both_forms(body: dict[str, Any], data: st.DataObject) -> None:
    """A field somewhere in the answer is something else than it should be."""
    broken = copy.deepcopy(body)
    place = broken["output"] if data.draw(st.booleans()) else broken
    for _ in range(data.draw(st.integers(0, 4))):
        inner = [
            value
            for value in (place.values() if isinstance(place, dict) else place)
            if value and type(value) in (dict, list)
        ]
        if not inner:
            break
        place = data.draw(st.sampled_from(inner))
    names = list(place) if isinstance(place, dict) else list(range(len(place)))
    place[data.draw(st.sampled_from(names))] = data.draw(JSON)
    recorded = read_whole(RESPONSES, json.dumps(broken).encode())
    if isinstance(recorded, Recorded):
        RESPONSES.whole(recorded.body)
        again = assembled(RESPONSES.stream(recorded.body, include_usage=True).render("resp_new", 7))
        assert isinstance(again, Recorded)
        assert again.body == recorded.body
    cut = assembled(streamed(end(broken) if isinstance(broken["status"], str) else broken))
    assert isinstance(cut, Recorded) == isinstance(recorded, Recorded)


@given(st.lists(JSON, max_size=4), st.binary(max_size=200))
def test_garbage_is_no_answer(events: list[Any], content: bytes) -> None:
    assert isinstance(assembled(streamed(*events)), Drop)
    assert isinstance(read_whole(RESPONSES, content), Drop)
    for event in events:
        assert isinstance(read_whole(RESPONSES, json.dumps(event).encode()), Drop)


BY_THE_SERVER = (
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
    "mcp_call",
    "mcp_approval_request",
    "mcp_list_tools",
    "function_call_output",
    "local_shell_call_output",
    "computer_call_output",
    "shell_call",
    "compaction",
    "unheard_of",
)
"""Items of output that tell what the server did, or that nobody here knows."""


@pytest.mark.parametrize(
    ("changes", "drop"),
    [
        ({"error": {"code": "server_error", "message": "no"}}, Drop.ERROR_IN_200),
        ({"status": "failed"}, Drop.FINISH_REASON),
        ({"status": "cancelled"}, Drop.FINISH_REASON),
        ({"status": ["completed"]}, Drop.FINISH_REASON),
        ({"status": "queued"}, Drop.INCOMPLETE),
        ({"status": "in_progress"}, Drop.INCOMPLETE),
        ({"status": None}, Drop.NO_FINISH),
        ({"status": "incomplete"}, Drop.FINISH_REASON),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, Drop.FINISH_REASON),
        ({"incomplete_details": {"reason": "content_filter"}}, Drop.FINISH_REASON),
        ({"output": []}, Drop.EMPTY),
        ({"output": [message(" \n")]}, Drop.EMPTY),
        ({"output": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}]}, Drop.EMPTY),
        ({"output": None}, Drop.NOT_UNDERSTOOD),
        ({"output": [{"type": "message", "content": "Hi."}]}, Drop.NOT_UNDERSTOOD),
        ({"output": ["Hi."]}, Drop.NOT_UNDERSTOOD),
        ({"usage": {"input_tokens": 3, "output_tokens": 0}}, Drop.ZERO_TOKENS),
        ({"output": [message("end. Aborted inference by Timeout (120 seconds)")]}, Drop.ABORTED),
        *(({"output": [{"type": kind, "id": "x_1"}, message("Done.")]}, Drop.FINISH_REASON) for kind in BY_THE_SERVER),
    ],
)
def test_what_is_no_answer_is_not_kept(changes: dict[str, Any], drop: Drop) -> None:
    body = answer(**changes)
    assert RESPONSES.judge(body) is drop
    assert isinstance(assembled(streamed({**end(answer()), "response": {"id": "resp_up", **body}})), Drop)


@pytest.mark.parametrize(
    ("body", "cut", "acts"),
    [
        (answer(usage={"input_tokens": 3, "output_tokens": 2}), False, False),
        (answer(status="incomplete", incomplete_details={"reason": "max_output_tokens"}), True, False),
        (answer(message("Hi", status="incomplete")), True, False),
        (answer({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}), False, True),
        (answer({"type": "local_shell_call", "call_id": "c", "action": {}}, message("Hi")), False, True),
        (answer({"type": "computer_call", "call_id": "c", "action": {}}), False, True),
        (answer({"type": "apply_patch_call", "call_id": "c", "operation": {}}), False, True),
        (answer({"type": "message", "content": [{"type": "refusal", "refusal": "No."}]}), False, True),
    ],
)
def test_what_an_answer_comes_to(body: dict[str, Any], cut: bool, acts: bool) -> None:
    gist = RESPONSES.judge(body)
    assert isinstance(gist, Gist)
    assert (gist.cut, gist.acts) == (cut, acts)


def test_the_tokens_and_texts_of_an_answer() -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    gist = RESPONSES.judge(answer(thought, message("Hi"), usage={"input_tokens": 3, "output_tokens": 2}))
    assert gist == Gist(("Hm. Hi",), cut=False, acts=False, prompt_tokens=3, completion_tokens=2)


def test_nobody_gets_what_an_answer_repeats_of_anothers_call() -> None:
    body = answer(metadata={"ticket": "4711"}, user="anna", created_at=1, completed_at=2, id="resp_up")
    assert RESPONSES.kept(body) == answer(metadata={}, user=None, completed_at=0)


# Streams of servers.

LLAMA = b"""event: response.created
data: {"type":"response.created","response":{"id":"resp_7C","object":"response","status":"in_progress"}}

event: response.in_progress
data: {"type":"response.in_progress","response":{"id":"resp_7C","object":"response","status":"in_progress"}}

event: response.output_item.added
data: {"type":"response.output_item.added","item":{"id":"rs_G","summary":[],"type":"reasoning","content":[],\
"encrypted_content":"","status":"in_progress"}}

event: response.reasoning_text.delta
data: {"type":"response.reasoning_text.delta","delta":"I think","item_id":"rs_G"}

event: response.output_item.added
data: {"type":"response.output_item.added","item":{"content":[],"id":"msg_t","role":"assistant",\
"status":"in_progress","type":"message"}}

event: response.content_part.added
data: {"type":"response.content_part.added","item_id":"msg_t","part":{"type":"output_text","text":""}}

event: response.output_text.delta
data: {"type":"response.output_text.delta","item_id":"msg_t","delta":"A"}

event: response.output_text.delta
data: {"type":"response.output_text.delta","item_id":"msg_t","delta":" fig."}

event: response.output_item.added
data: {"type":"response.output_item.added","item":{"arguments":"","call_id":"fc_1","name":"pick",\
"type":"function_call","status":"in_progress"}}

event: response.function_call_arguments.delta
data: {"type":"response.function_call_arguments.delta","delta":"{}","item_id":"fc_1"}

event: response.output_text.done
data: {"type":"response.output_text.done","item_id":"msg_t","text":"A fig."}

event: response.completed
data: {"type":"response.completed","response":{"id":"resp_7C","object":"response","created_at":1795342183,\
"status":"completed","model":"tiny","output":[{"id":"rs_G","summary":[],"type":"reasoning",\
"content":[{"text":"I think","type":"reasoning_text"}],"encrypted_content":""},{"type":"message",\
"status":"completed","id":"msg_t","content":[{"type":"output_text","annotations":[],"logprobs":[],"text":"A fig."}],\
"role":"assistant"},{"type":"function_call","status":"completed","arguments":"{}","call_id":"fc_1","name":"pick"}],\
"usage":{"input_tokens":17,"output_tokens":11,"total_tokens":28,"input_tokens_details":{"cached_tokens":16}}},\
"timings":{"cache_n":16,"prompt_n":1,"predicted_n":11}}

"""
"""As llama.cpp sends it: no numbers of items, no sequence numbers, calls without an id, timings beside the response."""


@given(st.lists(st.integers(0), max_size=6))
def test_what_llama_cpp_streams_is_put_together(cuts: list[int]) -> None:
    recorded = assembled(LLAMA, cuts)
    assert isinstance(recorded, Recorded)
    assert [item["type"] for item in recorded.body["output"]] == ["reasoning", "message", "function_call"]
    assert recorded.body["timings"] == {"cache_n": 16, "prompt_n": 1, "predicted_n": 11}
    assert recorded.gist == Gist(("I think A fig.",), cut=False, acts=True, prompt_tokens=17, completion_tokens=11)
    replay = events_of(RESPONSES.stream(recorded.body, include_usage=False).render("resp_new", 7))
    assert replay[-1]["timings"] == recorded.body["timings"]
    assert "timings" not in replay[-1]["response"]
    called = [event for event in replay if event["type"].startswith("response.function_call_arguments")]
    assert [event["item_id"] for event in called] == ["fc_1", "fc_1"]


def test_the_first_token_and_the_number_of_pieces_are_told() -> None:
    assembler, seen = RESPONSES.assembler(), []
    for event in events_of(LLAMA):
        assembler.feed(json.dumps(event))
        seen.append((assembler.spoke, assembler.deltas, assembler.done))
    assert seen[2:4] == [(False, 0, False), (True, 1, False)]
    assert seen[-2:] == [(True, 4, False), (True, 4, True)]


def delta(text: Any, kind: str = "output_text", **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}.delta", "delta": text, **fields}


@pytest.mark.parametrize(
    ("events", "drop"),
    [
        ([delta("Hello."), end(answer())], Drop.NOT_UNDERSTOOD),
        ([delta("Hi."), delta("{}", "function_call_arguments"), end(answer())], Drop.NOT_UNDERSTOOD),
        ([delta("Hi.", "refusal"), end(answer())], Drop.NOT_UNDERSTOOD),
        ([delta(["Hi."]), end(answer())], Drop.NOT_UNDERSTOOD),
        ([{"type": "response.completed", "response": None}], Drop.NOT_UNDERSTOOD),
        ([{**end(answer()), "type": "response.incomplete"}], Drop.NOT_UNDERSTOOD),
        ([7, end(answer())], Drop.NOT_UNDERSTOOD),
        ([delta("Hi."), {"type": "error", "message": "no"}, end(answer())], Drop.ERROR_IN_STREAM),
        ([delta("Hi."), {"error": {"code": 500, "message": "no"}}], Drop.ERROR_IN_STREAM),
        ([end(answer(status="failed", error={"message": "no"}))], Drop.ERROR_IN_STREAM),
        ([delta("Hi.")], Drop.INCOMPLETE),
        ([delta("Hi."), {"type": "response.cancelled", "response": answer()}], Drop.INCOMPLETE),
        ([], Drop.INCOMPLETE),
    ],
)
def test_a_stream_that_must_be_guessed_at_is_not_kept(events: list[Any], drop: Drop) -> None:
    assert assembled(streamed(*events)) is drop


def test_a_stream_with_an_event_that_is_no_data_is_not_kept() -> None:
    assembler = RESPONSES.assembler()
    assembler.fail()
    assembler.feed(json.dumps(end(answer())))
    assert assembler.finish(usage_asked=False, usage_from_timings=False) is Drop.ERROR_IN_STREAM


def test_unknown_events_and_an_end_mark_do_no_harm() -> None:
    unknown = [{"type": "response.x.delta", "delta": {"x": 1}}, {"type": ["x"]}, {"type": "keepalive"}, {}]
    wire = streamed(*unknown, delta("Hi.", obfuscation="kPq"), end(answer())) + b"data: [DONE]\n\n"
    recorded = assembled(wire)
    assert isinstance(recorded, Recorded)
    assert recorded.body == answer()
    assert not recorded.usage_known


def test_a_cut_answer_ends_as_one() -> None:
    body = answer(status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    wire = RESPONSES.stream(body, include_usage=False).render("resp_new", 7)
    events = events_of(wire)
    assert [event["type"] for event in (events[0], events[-1])] == ["response.created", "response.incomplete"]
    assert (events[0]["response"]["incomplete_details"], events[0]["response"]["output"]) == (None, [])
    recorded = assembled(wire)
    assert isinstance(recorded, Recorded)
    assert recorded.was_cut
    assert recorded.body == body


# Calls.


def read(asked: Any, **fields: Any) -> Call | NotCacheable:
    return read_call(RESPONSES, "", {}, json.dumps({"input": asked, **fields}).encode())


def call(asked: Any, **fields: Any) -> Call:
    found = read(asked, **fields)
    assert isinstance(found, Call), found
    return found


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
FUNCTION = {"type": "function", "name": "f", "parameters": {}}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "7"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("Hi", "Hi"),
        ([user("Hi")], "Hi"),
        ([user("Hi", type="message", id="msg_1")], "Hi"),
        ([user([{"type": "input_text", "text": "Hi"}, {"type": "input_text", "text": "you"}])], "Hi\nyou"),
        ([{"role": "developer", "content": "Be brief."}, user("Hi")], "Hi"),
        ([user("Hi"), {"role": "assistant", "content": "Yes?"}, user("Why")], "Why"),
        ("", None),
        (" \n", None),
        ([user("Hi"), RESULT], None),
        ([user([{"type": "input_text", "text": "Hi"}, IMAGE])], None),
        ([user([])], None),
        ([user(None)], None),
        ([user([{"type": "input_file", "file_id": "f1"}])], None),
        ([user("Hi"), {"role": "assistant", "content": "Yes?"}], None),
        ([{"role": "user", "type": "x", "content": "Hi"}], None),
    ],
)
def test_the_words_are_those_of_the_last_item_of_the_user(asked: Any, words: str | None) -> None:
    assert call(asked).words == words


@pytest.mark.parametrize(
    "fields",
    [
        {"include": ["message.output_text.logprobs"]},
        {"top_logprobs": 2},
        {"logprobs": True},
        {"n": 2},
        {"tools": [{"type": "local_shell"}]},
        {"tools": {"x": 1}},
    ],
)
def test_what_must_be_as_asked_is_not_compared_by_words(fields: dict[str, Any]) -> None:
    assert call("Hi", **fields).words is None
    assert call("Hi", tools=[FUNCTION], include=[], n=1, top_logprobs=0).words == "Hi"


@pytest.mark.parametrize(
    ("asked", "fields", "reason"),
    [
        ("Hi", {"previous_response_id": "resp_1"}, Bypass.PREVIOUS_RESPONSE),
        ("Hi", {"conversation": "conv_1"}, Bypass.CONVERSATION),
        ("Hi", {"background": True}, Bypass.BACKGROUND),
        ("Hi", {"tools": [{"type": "web_search"}]}, Bypass.BACKGROUND),
        ("Hi", {"tools": [FUNCTION, {"type": "mcp", "server_url": "x"}]}, Bypass.BACKGROUND),
        ("Hi", {"store": True}, Bypass.STORE_TRUE),
        ("Hi", {"prompt": {"id": "pmpt_1"}}, Bypass.PREVIOUS_RESPONSE),
        (None, {"prompt": {"id": "pmpt_1"}}, Bypass.PREVIOUS_RESPONSE),
        ([{"type": "item_reference", "id": "msg_1"}, user("Hi")], {}, Bypass.PREVIOUS_RESPONSE),
        ([{"id": "msg_1"}, user("Hi")], {}, Bypass.PREVIOUS_RESPONSE),
        (None, {}, Bypass.NOT_UNDERSTOOD),
        ([], {}, Bypass.NOT_UNDERSTOOD),
        (["Hi"], {}, Bypass.NOT_UNDERSTOOD),
        ({"role": "user"}, {}, Bypass.NOT_UNDERSTOOD),
    ],
)
def test_what_refers_to_what_the_server_keeps_goes_by(asked: Any, fields: dict[str, Any], reason: Bypass) -> None:
    assert read(asked, **fields) == NotCacheable(reason)


def test_what_is_null_refers_to_nothing() -> None:
    nothing = {"previous_response_id": None, "conversation": None, "background": False, "prompt": None}
    assert call("Hi", **nothing).words == "Hi"


def test_whether_the_server_keeps_the_answer_is_left_to_it_where_the_call_does_not_say() -> None:
    assert [call("Hi", **f).left_to_store for f in ({}, {"store": None}, {"store": False})] == [True, True, False]
    assert call([user([IMAGE])]).left_to_store


def test_a_later_turn_is_known_by_what_came_before() -> None:
    between: list[dict[str, Any]] = [
        {"role": "assistant", "content": "Yes?"},
        {"type": "message", "role": "assistant", "content": []},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        RESULT,
    ]
    assert all(call([user("Hi"), item, user("Why")]).later_turn for item in between)
    assert not call([{"role": "system", "content": "x"}, user("Hi"), user("Why")]).later_turn
    assert not call("Hi").later_turn


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": "The fruit is"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "The fruit is"}]},
    ],
)
def test_an_answer_that_goes_on_from_what_was_said_is_kept_apart_by_form(last: dict[str, Any]) -> None:
    asked = user("Name a fruit.")
    assert call([asked, last]).digest != call([asked, last], stream=True).digest
    for alike in ([asked], [asked, last, asked], [asked, RESULT], "Name a fruit."):
        assert call(alike).digest == call(alike, stream=True).digest


def test_instructions_and_leading_messages_are_the_system_prompt() -> None:
    told = {"role": "developer", "content": "Be brief."}
    plain = call([user("Hi")])
    systems = [
        call("Hi", instructions="Be brief."),
        call([told, user("Hi")]),
        call([told, user("Hi")], instructions="Be brief."),
    ]
    assert len({one.system for one in (plain, *systems)}) == 4
    assert plain.system == call("Why").system == b""


def test_a_question_about_now_is_known_in_every_form() -> None:
    asked = "What time is it now?"
    assert call(asked).volatile
    assert call([user([{"type": "input_text", "text": asked}, IMAGE])]).volatile
    assert call([user(asked), RESULT]).volatile
    assert not call("What is a proxy?").volatile


@given(
    st.dictionaries(TEXT, JSON, max_size=3),
    JSON,
    st.lists(JSON | st.dictionaries(st.sampled_from(["role", "content", "type"]), JSON), max_size=3),
)
def test_no_body_breaks_the_reading(body: dict[str, Any], content: Any, items: list[Any]) -> None:
    for asked in (content, items, [*items, user(content)]):
        assert isinstance(RESPONSES.read({**body, "input": asked}), Reading | NotCacheable)


@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, min_size=1, max_size=3))
def test_only_the_words_are_left_out_of_the_space(one: list[str], other: list[str]) -> None:
    def parts(texts: list[str]) -> Any:
        return [user([{"type": "input_text", "text": text} for text in texts])]

    first, second = call(parts(one)), call(parts(other))
    assert (first.digest == second.digest) == (one == other)
    if first.words is not None and second.words is not None:
        assert (first.space_digest == second.space_digest) == (len(one) == len(other))
    assert call(one[0]).digest != call([user(one[0])]).digest
