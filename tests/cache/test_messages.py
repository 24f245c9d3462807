"""The messages dialect: what its calls ask, and its answers through storing and replay in both directions."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import Gist, Recorded, decode_body
from proxy.cache.dialects.call import Call, NotCacheable, Reading, read_call
from proxy.cache.dialects.dialect import read_whole
from proxy.cache.dialects.messages import MESSAGES
from proxy.cache.policy import Bypass, Drop
from proxy.cache.sse import EventSplitter

HELLO = [{"role": "user", "content": "hello"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SAID = TEXT.map(lambda text: text + "x")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e6, 1e6) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
UNKNOWN = {"x_unknown": JSON}
CITATION = st.fixed_dictionaries(
    {
        "type": st.just("char_location"),
        "cited_text": TEXT,
        "document_index": st.integers(0, 9),
        "document_title": st.none() | TEXT,
        "start_char_index": st.integers(0, 99),
        "end_char_index": st.integers(0, 99),
    }
)
CITATIONS = st.none() | st.lists(CITATION, max_size=3)
TEXT_BLOCK = st.fixed_dictionaries(
    {"type": st.just("text"), "text": SAID}, optional={"citations": CITATIONS, **UNKNOWN}
)
TOOL_USE = st.fixed_dictionaries(
    {
        "type": st.just("tool_use"),
        "id": st.from_regex(r"toolu_[a-z0-9]{1,8}", fullmatch=True),
        "name": SAID,
        "input": st.dictionaries(TEXT, JSON, max_size=3),
    },
    optional=UNKNOWN,
)
BLOCK = st.one_of(
    TEXT_BLOCK,
    TOOL_USE,
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": TEXT}, optional={"signature": TEXT, **UNKNOWN}),
    st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": TEXT}),
)
USAGE = st.fixed_dictionaries(
    {"input_tokens": st.integers(0, 10**6), "output_tokens": st.integers(1, 10**6)},
    optional={
        "cache_read_input_tokens": st.none() | st.integers(0, 99),
        "cache_creation_input_tokens": st.none() | st.integers(0, 99),
        "output_tokens_details": st.none() | st.fixed_dictionaries({"thinking_tokens": st.integers(0, 99)}),
        "server_tool_use": st.none()
        | st.fixed_dictionaries({"web_search_requests": st.integers(0, 9), "web_fetch_requests": st.integers(0, 9)}),
        "service_tier": st.just("standard"),
        **UNKNOWN,
    },
)
BODY = st.fixed_dictionaries(
    {
        "type": st.just("message"),
        "role": st.just("assistant"),
        "content": st.tuples(TEXT_BLOCK | TOOL_USE, st.lists(BLOCK, max_size=4)).map(
            lambda parts: [parts[0], *parts[1]]
        ),
        "model": TEXT,
        "stop_reason": st.sampled_from(
            ["end_turn", "stop_sequence", "max_tokens", "model_context_window_exceeded", "tool_use"]
        ),
        "usage": USAGE,
    },
    optional={
        "stop_sequence": st.none() | TEXT,
        "stop_details": st.none() | st.fixed_dictionaries({"type": TEXT, "category": st.none()}),
        **UNKNOWN,
    },
)


def body(*blocks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    content = list(blocks) or [{"type": "text", "text": "Hello there."}]
    usage = {"input_tokens": 3, "output_tokens": 4}
    base = {"type": "message", "role": "assistant", "content": content, "model": "tiny", "stop_reason": "end_turn"}
    return {**base, "stop_sequence": None, "usage": usage, **changes}


def read(messages: Any = HELLO, **fields: Any) -> Reading | NotCacheable:
    return MESSAGES.read({"model": "m", "max_tokens": 9, "messages": messages, **fields})


def call(messages: Any = HELLO, **fields: Any) -> Call:
    sent = json.dumps({"model": "m", "max_tokens": 9, "messages": messages, **fields}).encode()
    found = read_call(MESSAGES, "", {}, sent)
    assert isinstance(found, Call)
    return found


def assembled(wire: bytes, cuts: list[int]) -> Recorded | Drop:
    """What a recorder makes of a stream whose bytes arrive in pieces that end at these places."""
    splitter, assembler = EventSplitter(), MESSAGES.assembler()
    for start, end in pairwise([0, *sorted(cut % (len(wire) + 1) for cut in cuts), len(wire)]):
        for data in splitter.feed(wire[start:end]):
            assert data is not None
            assembler.feed(data)
    return assembler.finish(usage_asked=False, usage_from_timings=False)


def fed(*events: Any) -> Recorded | Drop:
    assembler = MESSAGES.assembler()
    for event in events:
        assembler.feed(json.dumps(event))
    return assembler.finish(usage_asked=False, usage_from_timings=False)


def events_of(wire: bytes) -> list[Any]:
    """The events of a stream, each under its own name."""
    found = []
    for text in wire.decode().removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def as_the_client_sees_it(events: list[Any]) -> dict[str, Any]:
    """The message that the official client makes of events."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    seen: dict[str, Any] = snapshot.to_dict()
    return seen


@given(BODY)
def test_a_whole_answer_comes_back_whole(sent: dict[str, Any]) -> None:
    recorded = read_whole(MESSAGES, json.dumps({"id": "msg_1", **sent}).encode())
    assert isinstance(recorded, Recorded)
    replayed = json.loads(MESSAGES.whole(decode_body(recorded.encoded())).render("new", 2))
    assert replayed == {**sent, "id": "new"}


@given(BODY, st.lists(st.integers(0), max_size=6), st.integers(1, 5))
def test_a_stream_says_all_that_the_whole_answer_says(sent: dict[str, Any], cuts: list[int], size: int) -> None:
    def pieces(text: str) -> list[str]:
        return [text[at : at + size] for at in range(0, len(text), size)]

    wire = MESSAGES.stream(sent, include_usage=False, pieces=pieces).render("new", 2)
    recorded = assembled(wire, cuts)
    assert isinstance(recorded, Recorded)
    assert recorded.body == sent
    assert recorded.usage_known


@given(BODY)
def test_the_official_client_sees_the_same_in_a_stream(sent: dict[str, Any]) -> None:
    events = events_of(MESSAGES.stream(sent, include_usage=False).render("msg_7", 2))
    seen = as_the_client_sees_it(events)
    for block, shown in zip(sent["content"], seen["content"], strict=True):
        # It makes a list of citations as soon as there is one, and nothing of none.
        assert {"citations": None, **shown} == {"citations": None, **block} or block.get("citations") == []
    assert seen["id"] == "msg_7"
    assert seen["stop_reason"] == sent["stop_reason"]
    assert seen.get("stop_sequence") == sent.get("stop_sequence")
    assert {name: value for name, value in seen["usage"].items() if value is not None} == {
        name: value for name, value in sent["usage"].items() if value is not None
    }


def test_a_stream_ends_as_this_dialect_ends() -> None:
    events = events_of(MESSAGES.stream(body(), include_usage=True).render("msg_1", 2))
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert events[-2]["usage"] == {"output_tokens": 4}


LLAMA_TOOL = [
    {
        "type": "message_start",
        "message": {
            "id": "chatcmpl-lMbieLdks4wi2WHpRWH7r1NiQvLZgKFk",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "tiny",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"cache_read_input_tokens": 162, "input_tokens": 22, "output_tokens": 0},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "id": "3u6c", "name": "switch"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"room":"att'}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": 'ic"}'}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 10},
    },
    {"type": "message_stop"},
]
"""As llama.cpp sends them: a call begins without its input."""


def test_the_events_of_llama_cpp_make_the_message_that_it_sends_whole() -> None:
    recorded = fed(*LLAMA_TOOL)
    assert isinstance(recorded, Recorded)
    call = {"type": "tool_use", "id": "3u6c", "name": "switch", "input": {"room": "attic"}}
    usage = {"cache_read_input_tokens": 162, "input_tokens": 22, "output_tokens": 10}
    assert recorded.body == body(call, stop_reason="tool_use", usage=usage)
    assert recorded.gist == Gist((" ",), cut=False, acts=True, prompt_tokens=184, completion_tokens=10)


def test_a_call_without_input_is_a_call_with_none() -> None:
    recorded = fed(*LLAMA_TOOL[:2], *LLAMA_TOOL[4:])
    assert isinstance(recorded, Recorded)
    assert recorded.body["content"][0]["input"] == {}


def test_a_call_whose_input_was_cut_is_not_kept() -> None:
    assert fed(*LLAMA_TOOL[:3], *LLAMA_TOOL[4:]) is Drop.NOT_UNDERSTOOD


def stream_of(*said: Any) -> list[Any]:
    return [LLAMA_TOOL[0], *said, *events_of(MESSAGES.stream(body(), include_usage=False).render("m", 1))[-2:]]


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, **said: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **said}}


TEXT_START = start(0, type="text", text="")
HI = delta(0, "text_delta", text="hi")


def test_a_block_that_llama_cpp_begins_twice_is_one() -> None:
    # It holds back what might become a stop sequence, and begins the block again for the rest.
    recorded = fed(*stream_of(TEXT_START, HI, TEXT_START, delta(0, "text_delta", text=" you")))
    assert isinstance(recorded, Recorded)
    assert recorded.body["content"] == [{"type": "text", "text": "hi you"}]


def test_blocks_that_are_open_side_by_side_are_told_apart() -> None:
    # llama.cpp closes them all at the end, thinking with a signature that is empty.
    thinking = start(0, type="thinking", thinking="")
    recorded = fed(
        *stream_of(
            thinking,
            delta(0, "thinking_delta", thinking="so"),
            start(1, type="text", text=""),
            delta(1, "text_delta", text="yes"),
            delta(0, "signature_delta", signature=""),
            {"type": "content_block_stop", "index": 0},
            {"type": "content_block_stop", "index": 1},
        )
    )
    assert isinstance(recorded, Recorded)
    assert recorded.body["content"] == [
        {"type": "thinking", "thinking": "so", "signature": ""},
        {"type": "text", "text": "yes"},
    ]
    assert recorded.gist.texts == ("so yes",)


def test_pings_say_nothing_and_errors_end_it() -> None:
    ping = {"type": "ping"}
    assert isinstance(fed(ping, *stream_of(ping, TEXT_START, HI, ping)), Recorded)
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    assert fed(*stream_of(TEXT_START, HI, error)) is Drop.ERROR_IN_STREAM
    assert fed(*stream_of(TEXT_START, HI, {"error": {"message": "failed"}})) is Drop.ERROR_IN_STREAM
    assert fed({"type": "error"}) is Drop.ERROR_IN_STREAM
    assembler = MESSAGES.assembler()
    assembler.fail()
    assert assembler.finish(usage_asked=False, usage_from_timings=False) is Drop.ERROR_IN_STREAM


def test_an_answer_is_whole_when_it_stops() -> None:
    events = stream_of(TEXT_START, HI)
    assert fed(*events[:-1]) is Drop.INCOMPLETE
    assert fed() is Drop.INCOMPLETE
    assert fed({"type": "ping"}) is Drop.INCOMPLETE
    assert fed(*events[:-2], events[-1]) is Drop.NO_FINISH
    assert isinstance(fed(*events, {"whatever": "comes later"}), Recorded)


@pytest.mark.parametrize(
    "event",
    [
        delta(0, "unheard_delta", text="a"),
        delta(0, "thinking_delta", thinking="a"),
        delta(0, "input_json_delta", partial_json="{}"),
        delta(0, "text_delta", text=7),
        delta(0, "text_delta"),
        delta(0, "citations_delta", citation="a"),
        delta(1, "text_delta", text="a"),
        delta(-1, "text_delta", text="a"),
        {"type": "content_block_delta", "index": 0, "delta": {"type": [], "text": "a"}},
        {"type": "content_block_delta", "index": "0", "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 0},
        {"type": "content_block_stop", "index": 4},
        start(0, type="text", text="other"),
        start(3, type="text", text=""),
        start(1, type=["text"]),
        start(1),
        {"type": "content_block_start", "index": 1},
        LLAMA_TOOL[0],
        {"type": "message_delta"},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": [7]},
        {"type": "unheard_of"},
        {"type": ["text"]},
        {},
        [],
        7,
    ],
)
def test_a_stream_that_must_be_guessed_at_is_not_kept(event: Any) -> None:
    assert fed(*stream_of(TEXT_START, HI, event)) is Drop.NOT_UNDERSTOOD


@pytest.mark.parametrize(
    "block",
    [{"type": "text", "text": None}, {"type": "text", "text": [1]}, {"type": "text", "text": "", "citations": 7}],
)
def test_a_block_that_begins_strangely_is_not_kept(block: dict[str, Any]) -> None:
    citation = delta(0, "citations_delta", citation={"cited_text": "a"})
    assert fed(*stream_of(start(0, **block), HI, citation)) is Drop.NOT_UNDERSTOOD


def test_nothing_comes_before_the_message_begins() -> None:
    assert fed(TEXT_START, *stream_of(TEXT_START, HI)) is Drop.NOT_UNDERSTOOD
    assert fed({"type": "message_start"}) is Drop.NOT_UNDERSTOOD
    assert fed({"type": "message_start", "message": {"content": 7}}) is Drop.NOT_UNDERSTOOD


def test_the_first_token_and_their_number_are_seen() -> None:
    assembler = MESSAGES.assembler()
    spoke = []
    for event in stream_of(TEXT_START, delta(0, "text_delta", text=""), HI, HI):
        assembler.feed(json.dumps(event))
        spoke.append(assembler.spoke)
    assert spoke == [False, False, False, True, True, True, True]
    assert assembler.deltas == 3


EVENTS = st.sampled_from([*LLAMA_TOOL, TEXT_START, HI, {"type": "ping"}])
GARBAGE = st.recursive(
    JSON | st.sampled_from(["text", "text_delta", "tool_use", "thinking", "message", "content_block_start", 0, 1]),
    lambda inner: st.dictionaries(
        st.sampled_from(
            ["type", "index", "delta", "message", "content", "content_block", "usage", "text", "citations"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=8,
)


@given(st.lists(EVENTS | GARBAGE, max_size=12))
def test_no_events_break_the_assembler(events: list[Any]) -> None:
    assert isinstance(fed(*events), Recorded | Drop)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_no_bytes_break_the_assembler(wire: bytes, size: int) -> None:
    splitter, assembler = EventSplitter(), MESSAGES.assembler()
    try:
        for at in range(0, len(wire), size):
            for data in splitter.feed(wire[at : at + size]):
                if data is not None:
                    assembler.feed(data)
    except UnicodeDecodeError:
        return
    assert isinstance(assembler.finish(usage_asked=False, usage_from_timings=False), Drop)


@given(st.dictionaries(st.sampled_from(["type", "content", "usage", "stop_reason", "error"]), GARBAGE))
def test_no_answer_breaks_the_judging(sent: dict[str, Any]) -> None:
    assert isinstance(MESSAGES.judge(sent), Gist | Drop)
    assert isinstance(MESSAGES.judge({**body(), **sent}), Gist | Drop)


SILENT = {"type": "thinking", "thinking": "hmm", "signature": "s"}


@pytest.mark.parametrize(
    ("sent", "drop"),
    [
        ({"type": "error", "error": {"type": "api_error", "message": "no"}}, Drop.ERROR_IN_200),
        ({"type": "error"}, Drop.ERROR_IN_200),
        (body(error="out of memory"), Drop.ERROR_IN_200),
        ({"object": "chat.completion", "choices": []}, Drop.NOT_UNDERSTOOD),
        (body(usage=None), Drop.NOT_UNDERSTOOD),
        (body(content="text"), Drop.NOT_UNDERSTOOD),
        (body({"type": "text", "text": None}), Drop.NOT_UNDERSTOOD),
        (body({"type": "tool_use", "id": "a", "name": "b", "input": "{"}), Drop.NOT_UNDERSTOOD),
        (body({"text": "a"}), Drop.NOT_UNDERSTOOD),
        (body(stop_reason=None), Drop.NO_FINISH),
        (body(stop_reason="pause_turn"), Drop.FINISH_REASON),
        (body(stop_reason="compaction"), Drop.FINISH_REASON),
        (body(stop_reason=["end_turn"]), Drop.FINISH_REASON),
        (body(content=[]), Drop.EMPTY),
        (body({"type": "text", "text": " \n"}), Drop.EMPTY),
        (body(SILENT, {"type": "redacted_thinking", "data": "x"}), Drop.EMPTY),
        (body(content=[], stop_reason="refusal"), Drop.FINISH_REASON),
        (body({"type": "text", "text": "Sure, here is how you"}, stop_reason="refusal"), Drop.FINISH_REASON),
        (body(usage={"input_tokens": 3, "output_tokens": 0}), Drop.ZERO_TOKENS),
        (body({"type": "text", "text": "Aborted inference by Timeout (300 seconds). Try again."}), Drop.ABORTED),
    ],
)
def test_what_is_not_worth_keeping(sent: dict[str, Any], drop: Drop) -> None:
    assert read_whole(MESSAGES, json.dumps(sent).encode()) is drop


@pytest.mark.parametrize(
    ("reason", "cut", "acts"),
    [
        ("end_turn", False, False),
        ("stop_sequence", False, False),
        ("max_tokens", True, False),
        ("model_context_window_exceeded", True, False),
        ("tool_use", False, True),
    ],
)
def test_what_a_reason_to_stop_comes_to(reason: str, cut: bool, acts: bool) -> None:
    gist = MESSAGES.judge(body(stop_reason=reason))
    assert isinstance(gist, Gist)
    assert (gist.cut, gist.acts) == (cut, acts)


def test_tokens_of_the_prompt_are_all_of_them() -> None:
    usage = {"input_tokens": 1, "cache_read_input_tokens": 21, "cache_creation_input_tokens": None, "output_tokens": 4}
    gist = MESSAGES.judge(body(usage=usage))
    assert isinstance(gist, Gist)
    assert (gist.prompt_tokens, gist.completion_tokens) == (22, 4)
    untold = MESSAGES.judge(body(usage={"output_tokens": 4}))
    assert isinstance(untold, Gist)
    assert untold.prompt_tokens is None


def test_an_answer_that_acts_answers_no_other_words() -> None:
    use = {"type": "tool_use", "id": "a", "name": "b", "input": {}}
    gist = MESSAGES.judge(body({"type": "text", "text": "a"}, use))
    assert isinstance(gist, Gist)
    assert gist.acts


CURL = {"type": "text", "text": "It is 8.17."}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "curl"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}


@pytest.mark.parametrize(
    "blocks",
    [
        [SEARCH, FOUND],
        [{"type": "web_fetch_tool_result", "tool_use_id": "srvtoolu_1", "content": {}}],
        [{"type": "code_execution_tool_result", "tool_use_id": "srvtoolu_1", "content": {}}],
        [{"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "send", "server_name": "mail", "input": {}}],
        [{"type": "mcp_tool_result", "tool_use_id": "mcptoolu_1", "is_error": False, "content": "sent"}],
        [{"type": "container_upload", "file_id": "file_1"}],
        [{"type": "compaction", "content": "So far: nothing."}],
        [{"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}],
        [{"type": "unheard_of"}],
    ],
    ids=lambda blocks: blocks[-1]["type"],
)
def test_what_a_server_did_unasked_is_not_kept(blocks: list[dict[str, Any]]) -> None:
    sent = body(*blocks, CURL)
    assert read_whole(MESSAGES, json.dumps(sent).encode()) is Drop.FINISH_REASON
    assert assembled(MESSAGES.stream(sent, include_usage=False).render("m", 1), []) is Drop.FINISH_REASON


# What calls ask.


def test_the_last_message_is_what_is_compared() -> None:
    earlier = [*HELLO, {"role": "assistant", "content": "hi"}]
    reading = read([*earlier, {"role": "user", "content": "and now?"}], system="Be brief.")
    assert isinstance(reading, Reading)
    assert (reading.words, reading.texts, reading.timely_text) == ("and now?", ["and now?"], "and now?")
    assert reading.without_words["messages"] == [*earlier, {"role": "user", "content": ""}]
    assert reading.system == ["Be brief."]
    assert reading.later_turn


def test_blocks_of_text_are_words_and_their_marks_stay_in_the_key() -> None:
    marked = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    plain = {"type": "text", "text": "b"}
    reading = read([{"role": "user", "content": [marked, plain]}])
    assert isinstance(reading, Reading)
    assert (reading.words, reading.texts) == ("a\nb", ["a", "b"])
    assert reading.without_words["messages"][0]["content"] == [{**marked, "text": ""}, {**plain, "text": ""}]
    one, other = (
        call([{"role": "user", "content": [marked]}]),
        call([{"role": "user", "content": [{**marked, "x": 1}]}]),
    )
    assert (one.words, other.words) == ("a", "a")
    assert one.space_digest != other.space_digest


@pytest.mark.parametrize(
    "content",
    [
        "",
        " ",
        [],
        None,
        7,
        [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "base64", "data": "AA=="}}],
        [{"type": "document", "source": {"type": "text", "data": "a"}}, {"type": "text", "text": "a"}],
        [{"type": "tool_result", "tool_use_id": "t", "content": "21 degrees"}],
        [{"type": "text", "text": 7}],
        ["a"],
        "\ud800",
    ],
)
def test_what_is_not_all_text_is_looked_up_as_it_is_alone(content: Any) -> None:
    assert call([{"role": "user", "content": content}]).words is None


def test_a_question_stays_timely_while_tools_are_asked() -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "What time is it now?"}]}]
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "clock", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "ok"}]}
    assert call([*asked, use, result]).volatile


def test_a_prefilled_answer_has_no_words_and_is_kept_in_each_form_by_itself() -> None:
    prefilled = [*HELLO, {"role": "assistant", "content": "The fruit is"}]
    whole, streamed = call(prefilled), call(prefilled, stream=True)
    assert (whole.words, whole.later_turn) == (None, True)
    assert whole.digest != streamed.digest
    assert call(prefilled, stream=False).digest == whole.digest
    assert call(stream=True).digest == call().digest


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 10},
        {"system": "Be brief."},
        {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        {"stop_sequences": ["."]},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"tools": [{"name": "t", "input_schema": {"type": "object"}}]},
        {"tool_choice": {"type": "any"}},
        {"top_k": 3},
        {"temperature": 0},
        {"service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}},
        {"unheard_of": 1},
    ],
)
def test_every_field_counts(fields: dict[str, Any]) -> None:
    assert call(**fields).digest != call().digest
    assert call(**fields).space_digest != call().space_digest


def test_who_asks_and_how_does_not_count() -> None:
    assert call(metadata={"user_id": "u"}, stream=True).digest == call().digest


def test_the_system_prompt_is_told_wherever_it_stands() -> None:
    first = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert call(first).system
    assert call(system="Be brief.").system
    assert not call().system


def test_the_limit_is_always_the_calls_own() -> None:
    assert call().limited
    assert call().limits.plain == 9


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"container": "container_1"}, Bypass.CONVERSATION),
        ({"container": {"skills": [{"type": "custom", "skill_id": "s"}]}}, Bypass.CONVERSATION),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, Bypass.CONVERSATION),
        ({"diagnostics": {"previous_message_id": "msg_1"}}, Bypass.PREVIOUS_RESPONSE),
        ({"mcp_servers": [{"type": "url", "url": "https://mcp.example", "name": "a"}]}, Bypass.BACKGROUND),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, Bypass.BACKGROUND),
        ({"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}, Bypass.BACKGROUND),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "a"}]}, Bypass.BACKGROUND),
        ({"messages": []}, Bypass.NOT_UNDERSTOOD),
        ({"messages": "hello"}, Bypass.NOT_UNDERSTOOD),
        ({"messages": ["hello"]}, Bypass.NOT_UNDERSTOOD),
        ({"messages": None}, Bypass.NOT_UNDERSTOOD),
    ],
)
def test_what_depends_on_more_than_the_call_goes_upstream(fields: dict[str, Any], reason: Bypass) -> None:
    assert read(**fields) == NotCacheable(reason)


@pytest.mark.parametrize("nested", [False, True])
def test_files_that_the_server_keeps_are_not_cached(nested: bool) -> None:
    block: dict[str, Any] = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
    if nested:
        block = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
    assert read([{"role": "user", "content": [block]}]) == NotCacheable(Bypass.CONVERSATION)


@pytest.mark.parametrize(
    "tool",
    [
        {"name": "t", "input_schema": {}},
        {"type": "custom", "name": "t", "input_schema": {}},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "computer_20251124", "name": "computer"},
    ],
)
def test_tools_that_the_caller_runs_are_cached(tool: dict[str, Any]) -> None:
    assert isinstance(read(tools=[tool]), Reading)


FIELDS = st.sampled_from(
    ["messages", "role", "content", "type", "text", "source", "file_id", "tools", "system", "container", "diagnostics"]
)
ANY = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "system", "text", "tool_result"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(FIELDS, ANY), st.lists(st.dictionaries(FIELDS, ANY), max_size=3))
def test_no_body_breaks_the_reading(fields: dict[str, Any], messages: list[Any]) -> None:
    assert isinstance(MESSAGES.read(fields), Reading | NotCacheable)
    assert isinstance(MESSAGES.read({**fields, "messages": messages}), Reading | NotCacheable)
    sent = json.dumps({**fields, "messages": messages}).encode()
    assert isinstance(read_call(MESSAGES, "", {}, sent), Call | NotCacheable)
