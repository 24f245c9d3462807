"""Batches are split and put together without loss, in order; vectors are the same numbers in either form."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import NotUnderstood, encoded
from proxy.cache.dialects import EMBEDDINGS
from proxy.cache.dialects.call import NotCacheable, read_call
from proxy.cache.dialects.dialect import read_whole
from proxy.cache.dialects.embeddings import (
    Batch,
    assembled,
    batch_of,
    part_of,
    reduced,
)
from proxy.cache.dialects.laying import Laid, Part, apportioned, lay_out
from proxy.cache.dialects.vectors import Form, Vector
from proxy.cache.policy import Bypass, Drop

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
DOUBLES = st.floats(min_value=-3e38, max_value=3e38, allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=8)


def read(headers: Mapping[str, str] | None = None, query: str = "", **body: Any) -> Batch | NotCacheable:
    raw = json.dumps(body).encode()
    call = read_call(EMBEDDINGS, query, headers or {}, raw)
    return call if isinstance(call, NotCacheable) else batch_of(call, raw)


def batch(**body: Any) -> Batch:
    found = read(**body)
    assert isinstance(found, Batch)
    return found


def vector_of(text: str) -> list[float]:
    return [len(text) + 0.5, *(ord(char) / 64 for char in (text + "ab")[:2])]


def answer(vectors: Sequence[Sequence[float]], form: str = "float", tokens: int = 10, **more: Any) -> bytes:
    """An answer as a server sends it."""
    shown = [pack(vector) if form == "base64" else vector for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(shown)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": "tiny", "usage": usage, **more}).encode()


def pack(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def parts(content: bytes, lengths: Sequence[int], form: Form | None = None) -> list[Part]:
    laid = lay_out(content, len(lengths))
    assert isinstance(laid, Laid), laid
    return [laid.part(number, usage, form) for number, usage in enumerate(laid.shares(lengths))]


def stored(part: Part) -> Part:
    """The part, after it was written to storage and read again."""
    recorded = part.recorded
    assert not isinstance(recorded, Drop)
    return part_of(recorded.encoded())


def put_together(found: Sequence[Part], form: Form = Form.FLOAT) -> Any:
    return json.loads(b"".join(assembled(found, found[0].shell, form, "embd-new", 7)))


def vectors_in(answered: Any) -> list[Any]:
    assert [one["index"] for one in answered["data"]] == list(range(len(answered["data"])))
    return [one["embedding"] for one in answered["data"]]


# --- requests


def test_each_input_is_an_item_and_repeated_ones_are_one() -> None:
    found = batch(input=["a", "b", "a", [1, 2], [1, 2]], model="tiny")
    assert (len(found.items), found.order, found.firsts) == (3, (0, 1, 0, 2, 2), (0, 1, 3))
    assert len({item.digest for item in found.items}) == 3


@pytest.mark.parametrize(
    ("one", "same"),
    [("a", ["a"]), ([1, 2, 3], [[1, 2, 3]]), ({"prompt_string": "a"}, [{"prompt_string": "a"}])],
)
def test_an_input_alone_is_the_batch_of_that_input(one: Any, same: Any) -> None:
    assert batch(input=one).items == batch(input=same).items


@pytest.mark.parametrize(
    "value",
    [None, "", [], [""], ["a", ""], [[]], ["a", None], [1, "a"], [1, [2]], [True], [1.5, 2.5], 7, True, {}, ["a", 3]],
)
def test_what_is_not_plainly_a_list_of_inputs_is_left_to_the_upstream(value: Any) -> None:
    assert read(input=value) == NotCacheable(Bypass.NOT_UNDERSTOOD)


def test_a_body_without_input_is_left_to_the_upstream() -> None:
    assert read(content="a") == NotCacheable(Bypass.NOT_UNDERSTOOD)


@pytest.mark.parametrize("form", ["int8", "FLOAT", "", 1, ["float"], {}])
def test_an_unknown_form_is_left_to_the_upstream(form: Any) -> None:
    assert read(input="a", encoding_format=form) == NotCacheable(Bypass.NOT_UNDERSTOOD)


def test_the_form_is_no_part_of_the_key() -> None:
    forms = [batch(input="a", **more) for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"})]
    assert len({one.items[0].digest for one in forms}) == 1
    assert [one.form for one in forms] == [Form.FLOAT, Form.FLOAT, Form.BASE64]
    assert batch(input="a", encoding_format=None).form is Form.FLOAT


@pytest.mark.parametrize("more", [{"user": "u"}, {"metadata": {}}, {"stream": True}, {"cache": {"ttl": 5}}])
def test_what_cannot_change_a_vector_is_no_part_of_the_key(more: dict[str, Any]) -> None:
    assert batch(input="a", **more).items[0].digest == batch(input="a").items[0].digest


@pytest.mark.parametrize(
    "more",
    [{"model": "m"}, {"dimensions": 5}, {"embd_normalize": -1}, {"input_type": "query"}, {"unknown": None}],
)
def test_every_other_field_is_part_of_the_key(more: dict[str, Any]) -> None:
    assert batch(input="a", **more).items[0].digest != batch(input="a").items[0].digest


def test_headers_and_query_are_part_of_the_key() -> None:
    asked = [read(input="a"), read({"openai-beta": "x"}, input="a"), read(None, "v=1", input="a")]
    assert len({one.items[0].digest for one in asked if isinstance(one, Batch)}) == 3


def test_a_text_is_not_the_tokens_that_it_spells() -> None:
    assert batch(input="[1,2]").items != batch(input=[1, 2]).items
    assert batch(input=["a", "b"]).items[0].digest != batch(input=[["a", "b"]]).items[0].digest


def test_a_text_that_is_no_valid_unicode_is_an_item_like_any() -> None:
    assert len(batch(input=["\ud800", "\ud801", "?"]).items) == 3


def test_nothing_is_sampled_or_of_its_time() -> None:
    call = batch(input="what time is it now?").items[0]
    assert (call.sampled, call.volatile, call.words) == (False, False, None)


@given(TEXTS, st.data())
def test_a_reduced_request_has_the_chosen_inputs_and_all_else_as_it_came(texts: list[str], data: st.DataObject) -> None:
    body = {"model": "m", "input": texts, "extra": {"deep": [1, 2.5, None]}, "dimensions": 3}
    places = data.draw(st.lists(st.sampled_from(range(len(texts))), unique=True, min_size=1))
    less = json.loads(reduced(json.dumps(body).encode(), places))
    assert less == {**body, "input": [texts[place] for place in places]}


@given(st.dictionaries(st.sampled_from(["input", "encoding_format", "model", "stream", "cache"]), JSON))
def test_no_body_makes_reading_fail(body: dict[str, Any]) -> None:
    found = read(**body)
    if isinstance(found, Batch):
        assert len(found.items) == len(found.firsts) == len(found.lengths) == len(set(found.order))


# --- vectors


@given(st.lists(FLOATS, min_size=1))
def test_floats_of_32_bits_are_kept_in_base64_and_come_back_in_either_form(numbers: list[float]) -> None:
    for raw in (json.dumps(numbers), json.dumps(pack(numbers))):
        vector = Vector.read(raw.encode(), None)
        assert isinstance(vector.kept, str)
        again = Vector.read(encoded(vector.kept), None)
        assert json.loads(again.encoded(Form.FLOAT)) == numbers
        assert json.loads(again.encoded(Form.BASE64)) == pack(numbers)


@given(st.lists(DOUBLES, min_size=1))
def test_other_numbers_stay_the_doubles_that_they_were(numbers: list[float]) -> None:
    vector = Vector.read(json.dumps(numbers).encode(), Form.FLOAT)
    again = Vector.read(encoded(vector.kept), None)
    assert json.loads(again.encoded(Form.FLOAT)) == numbers
    assert json.loads(again.encoded(Form.BASE64)) == pack(numbers)


def test_a_number_read_as_32_bits_is_the_same_from_either_form() -> None:
    # As llama.cpp prints it: the double of the float.
    printed = -0.01275787502527237
    vector = Vector.read(encoded([printed]), Form.FLOAT)
    assert vector.numbers is None
    assert json.loads(vector.encoded(Form.FLOAT)) == [printed]
    assert struct.unpack("<f", base64.b64decode(json.loads(vector.encoded(Form.BASE64)))) == (printed,)


@pytest.mark.parametrize(
    "raw",
    [
        "[]",
        '""',
        "null",
        "{}",
        "7",
        "[null]",
        '["1"]',
        "[[1.0]]",
        "[true]",
        "[1e39]",
        "[1e999]",
        "[NaN]",
        '"AAA="',
        '"not base64!"',
        json.dumps(pack([math.nan])),
        json.dumps(pack([1.0, math.inf])),
        "[1",
        "",
    ],
)
def test_what_is_no_vector_is_refused(raw: str) -> None:
    with pytest.raises(NotUnderstood):
        Vector.read(raw.encode(), None)


def test_text_is_no_answer_to_who_asked_for_numbers_and_numbers_are_one_to_who_asked_for_base64() -> None:
    with pytest.raises(NotUnderstood):
        Vector.read(encoded(pack([1.0])), Form.FLOAT)
    assert Vector.read(b"[1.0]", Form.BASE64).packed == struct.pack("<f", 1.0)


@given(st.binary(max_size=60))
def test_no_bytes_make_reading_a_vector_fail_otherwise(raw: bytes) -> None:
    with suppress(NotUnderstood):
        assert Vector.read(raw, None).dimensions > 0


# --- answers


@given(TEXTS, st.sampled_from(Form), st.sampled_from(Form), st.integers(0, 500), st.data())
def test_split_and_put_together_is_the_same_answer_whatever_is_known(
    texts: list[str], sent: Form, wanted: Form, tokens: int, data: st.DataObject
) -> None:
    asked = batch(input=texts, encoding_format=str(wanted))
    different = [texts[place] for place in asked.firsts]
    everything = parts(answer([vector_of(text) for text in different], sent, tokens), asked.lengths, sent)
    known = data.draw(st.sets(st.sampled_from(range(len(different)))))
    mixed = [stored(part) if number in known else part for number, part in enumerate(everything)]
    answered = put_together([mixed[number] for number in asked.order], wanted)
    expected = [vector_of(text) for text in texts]
    assert vectors_in(answered) == [pack(one) if wanted is Form.BASE64 else one for one in expected]
    assert (answered["object"], answered["model"]) == ("list", "tiny")
    if len(different) == len(texts):
        assert answered["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@given(st.integers(0, 10**6), st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_shares_add_up_and_are_in_proportion(total: int, weights: list[int]) -> None:
    shares = apportioned(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True))


def test_vectors_are_sorted_by_their_index() -> None:
    shuffled = json.loads(answer([[1.0], [2.0], [3.0]]))
    shuffled["data"].reverse()
    assert vectors_in(put_together(parts(encoded(shuffled), [1, 1, 1]))) == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("indexes", [[0, 0], [1, 2], [0, -2], [0, 1.5], [0, "1"], [0, None], [0, True], [0, 2**70]])
def test_vectors_whose_places_are_unclear_are_not_understood(indexes: list[Any]) -> None:
    body = json.loads(answer([[1.0], [2.0]]))
    for one, index in zip(body["data"], indexes, strict=True):
        one["index"] = index
    assert lay_out(json.dumps(body).encode(), 2) is Drop.NOT_UNDERSTOOD


def test_only_a_vector_alone_needs_no_index() -> None:
    body = json.loads(answer([[1.0]]))
    del body["data"][0]["index"]
    assert isinstance(lay_out(encoded(body), 1), Laid)
    assert lay_out(encoded({**body, "data": body["data"] * 2}), 2) is Drop.NOT_UNDERSTOOD


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", Drop.NOT_JSON),
        (b"[]", Drop.NOT_JSON),
        (b'{"data":', Drop.NOT_JSON),
        (b'{"a":"\xff"}', Drop.NOT_JSON),
        (b"[" * 100_000, Drop.NOT_JSON),
        (b"{}", Drop.NOT_UNDERSTOOD),
        (b'{"data":null}', Drop.NOT_UNDERSTOOD),
        (b'{"data":[]}', Drop.NOT_UNDERSTOOD),
        (b'{"data":[1,2]}', Drop.NOT_UNDERSTOOD),
        (answer([[1.0]]), Drop.NOT_UNDERSTOOD),
        (answer([[1.0], [2.0], [3.0]]), Drop.NOT_UNDERSTOOD),
        (answer([[1.0], [2.0]], usage={"prompt_tokens": -1}), Drop.NOT_UNDERSTOOD),
        (answer([[1.0], [2.0]], usage={"prompt_tokens": 2**60}), Drop.NOT_UNDERSTOOD),
        (answer([[1.0], [2.0]], usage=7), Drop.NOT_UNDERSTOOD),
        (answer([[1.0], [2.0]], error={"message": "no"}), Drop.ERROR_IN_200),
    ],
)
def test_what_is_no_answer_for_two_items_is_not_taken_apart(content: bytes, why: Drop) -> None:
    assert lay_out(content, 2) is why


@given(JSON | st.fixed_dictionaries({"data": st.lists(JSON, max_size=3), "usage": JSON, "error": JSON}))
def test_no_answer_makes_taking_it_apart_fail(body: Any) -> None:
    laid = lay_out(json.dumps(body).encode(), 1)
    if isinstance(laid, Laid):
        with suppress(NotUnderstood):
            laid.part(0, laid.usage, None)


def test_other_fields_survive_and_those_of_the_moment_are_new() -> None:
    body = json.loads(answer([[1.0]], id="embd-old", created=1, extra={"a": [1, 2.50]}, error=None))
    body["data"][0]["seen"] = "é"
    part = stored(parts(json.dumps(body).encode(), [1])[0])
    answered = put_together([part])
    assert answered == {**body, "id": "embd-new", "created": 7}
    assert b"embd-old" not in encoded(part.shell)


def test_an_answer_without_id_gets_none() -> None:
    assert put_together(parts(answer([[1.0]]), [1])).keys() == {"object", "data", "model", "usage"}


def test_usage_that_one_item_lacks_is_told_of_none() -> None:
    with_usage, without = parts(answer([[1.0]]), [1])[0], parts(answer([[2.0]], usage=None), [1])[0]
    assert "usage" not in put_together([with_usage, without])
    assert put_together([with_usage, with_usage])["usage"] == {"prompt_tokens": 20, "total_tokens": 20}


def test_usage_that_is_no_number_is_told_as_it_came() -> None:
    usage = {"prompt_tokens": 5, "prompt_tokens_details": None, "cost": "free"}
    assert put_together(parts(answer([[1.0], [2.0]], usage=usage), [1, 3]))["usage"] == usage


@pytest.mark.parametrize("vector", [[0.0], [0.0, -0.0], [0.0, 0]])
def test_a_vector_of_zeros_is_not_kept(vector: list[float]) -> None:
    assert parts(answer([vector]), [1])[0].recorded is Drop.EMPTY
    assert parts(answer([vector], "base64"), [1])[0].recorded is Drop.EMPTY


# --- as a dialect: export and import


@given(st.lists(FLOATS | DOUBLES, min_size=1).filter(any))
def test_what_is_stored_can_be_stored_again(numbers: list[float]) -> None:
    recorded = parts(answer([numbers], id="x"), [1])[0].recorded
    assert not isinstance(recorded, Drop)
    again = read_whole(EMBEDDINGS, recorded.encoded())
    assert not isinstance(again, Drop)
    assert json.loads(again.encoded()) == json.loads(recorded.encoded())
    assert again.gist == recorded.gist
    assert not again.may_be_near(limited=True)
    for wire in (EMBEDDINGS.whole(again.body), EMBEDDINGS.stream(again.body, include_usage=True)):
        assert vectors_in(json.loads(wire.render("id", 1))) == [pack(numbers)]


@pytest.mark.parametrize(
    "content",
    [answer([[1.0], [2.0]]), answer([[0.0]]), answer([[]]), answer([["x"]]), answer([[1e39]]), b"{}"],  # type: ignore[list-item]
)
def test_what_would_not_have_been_stored_is_not_accepted(content: bytes) -> None:
    assert isinstance(read_whole(EMBEDDINGS, content), Drop)


def test_nobody_streams_vectors() -> None:
    assembler = EMBEDDINGS.assembler()
    assembler.feed("{}")
    assembler.fail()
    assert assembler.finish(usage_asked=False, usage_from_timings=False) is Drop.NOT_UNDERSTOOD
    assert (assembler.done, assembler.spoke, assembler.deltas) == (False, False, 0)


def test_a_damaged_entry_is_told_from_a_whole_one() -> None:
    part = parts(answer([[1.0]]), [1])[0]
    assert stored(part).vector == part.vector
    with pytest.raises(NotUnderstood):
        part_of(b"{}")
    with pytest.raises(NotUnderstood):
        list(assembled([replace(part, fields={"x": "\ud800"})], {}, Form.FLOAT, "", 0))


@pytest.mark.parametrize(
    "fields",
    [
        {"late_chunking": True},
        {"instructions": ["query", "document"]},
        {"embed_dtype": "float16"},
        {"endianness": "big"},
        {"output_dtype": "int8"},
        {"embedding_types": ["binary"]},
        {"x_unknown": "may tie them together"},
    ],
)
def test_what_may_tie_inputs_together_or_pack_vectors_otherwise_passes_by(fields: dict[str, Any]) -> None:
    assert read(input=["a", "b"], model="m", **fields) == NotCacheable(Bypass.NOT_UNDERSTOOD)


@pytest.mark.parametrize(
    "fields", [{"input_type": "query"}, {"dimensions": 8}, {"late_chunking": False}, {"user": "u"}]
)
def test_what_is_said_of_each_input_alike_does_not(fields: dict[str, Any]) -> None:
    assert isinstance(read(input=["a", "b"], model="m", **fields), Batch)


def test_one_input_has_no_neighbours() -> None:
    assert isinstance(read(input=["a"], x_unknown="y"), Batch)
    assert read(input="a", x_unknown="y") != read(input="a", x_unknown="z")
