"""An answer that is taken apart while it arrives comes to the same as one that is taken apart when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.dialects import arriving
from proxy.cache.dialects.arriving import Arriving
from proxy.cache.dialects.laying import Laid, lay_out
from proxy.cache.policy import Drop

TWO = '{"index": 0, "embedding": [1.0, 2]}, {"index": 1, "embedding": "AACAPwAAAEA="}'
PLAIN = '{"object": "list", "data": [' + TWO + '], "model": "m", "usage": {"prompt_tokens": 3}}'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab{}[],:"\\ é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "a", "}"]), inner, max_size=3),
    max_leaves=8,
)
ITEMS = st.dictionaries(st.sampled_from(["index", "embedding", "object", "data"]), st.integers(0, 3) | JSON, max_size=4)
ANSWERS = st.dictionaries(
    st.sampled_from(["data", "error", "usage", "model", "x"]),
    JSON | st.lists(ITEMS, min_size=1, max_size=4),
    max_size=5,
)


def arrived(content: bytes, expected: int, sizes: Sequence[int]) -> Laid | Drop:
    answer, start = Arriving(expected), 0
    for size in repeated(sizes):
        answer.feed(content[start : start + size])
        start += size
        if start >= len(content):
            return answer.finish()
    raise AssertionError


def repeated(sizes: Sequence[int]) -> Iterator[int]:
    while True:
        yield from sizes


def answer_of(count: int, **more: Any) -> bytes:
    data = [{"object": "embedding", "index": number, "embedding": [number / 4, 1.5, -2.0]} for number in range(count)]
    return json.dumps({"object": "list", "data": data, **more}).encode()


@given(ANSWERS, st.integers(1, 4), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from([None, 1]))
def test_it_comes_to_the_same(answer: dict[str, Any], expected: int, sizes: list[int], indent: int | None) -> None:
    content = json.dumps(answer, indent=indent, ensure_ascii=False).encode()
    assert arrived(content, expected, sizes) == lay_out(content, expected)


@given(st.binary(max_size=12), st.integers(0, len(PLAIN)), st.integers(0, 12), st.integers(1, 20))
def test_it_comes_to_the_same_where_something_is_wrong(wrong: bytes, place: int, less: int, size: int) -> None:
    content = PLAIN.encode()[:place] + wrong + PLAIN.encode()[place + less :]
    assert arrived(content, 2, [size]) == lay_out(content, 2)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN[:-1],
        PLAIN + "x",
        PLAIN + PLAIN,
        PLAIN.replace(", {", "{"),
        PLAIN.replace(", {", ",, {"),
        PLAIN.replace("}]", "},]"),
        PLAIN.replace("2]", "NaN]"),
        PLAIN.replace('"m"', '"these items"'),
        PLAIN.replace('"m"', '["these items"]'),
        PLAIN.replace('"m"', "[{}, {}]"),
        PLAIN.replace('"m"', '"\udce9"'),
        PLAIN.replace('"embedding": "', '"embedding": "\udce9'),
        PLAIN.replace("[1.0", '{"}, {": [{"a": {}}, {"b": 1}]}, "more": [1.0'),
        PLAIN.replace('{"object"', '{"error": "no", "object"'),
        PLAIN.replace('"model"', '"error": null, "model"'),
        PLAIN.replace('"model"', '"data": [], "model"'),
        PLAIN.replace('"object": "list"', '"data": []'),
        PLAIN.replace('"object": "list"', '"data": [{"index": 5}]'),
        PLAIN.replace('"object": "list"', '"object": {"data": [{}, {"index": 0}]}'),
        PLAIN.replace('"object": "list"', '"object": "\\"data\\": [{}"'),
        PLAIN.replace('"index": 1', '"index": 0'),
        '{"x": {"data": [' + TWO + "]}}",
        '{"x": {"data": [' + TWO + ']}, "data": ["these items"]}',
        '{"\\u0064ata": [' + TWO + "]}",
        '{"data": []}',
        '{"data": [{}, {}]}',
        "[" + PLAIN + "]",
        '"data": [' + TWO + "]",
        "",
    ],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_nothing_is_guessed(content: str, size: int) -> None:
    raw = content.encode("utf-8", "surrogateescape")
    assert arrived(raw, 2, [size]) == lay_out(raw, 2)


@pytest.mark.parametrize("blanks", [" " * 70_000, "\n" * 70_000])
@pytest.mark.parametrize("place", ['{"object"', '"data"', '{"index": 1', '], "model"', '"usage"'])
def test_long_blanks_change_nothing(blanks: str, place: str) -> None:
    content = PLAIN.replace(place, blanks + place).encode()
    assert arrived(content, 2, [1000]) == lay_out(content, 2)
    assert isinstance(lay_out(content, 2), Laid)


@pytest.mark.parametrize("expected", [1, 199, 201])
def test_the_number_of_items_is_minded(expected: int) -> None:
    assert arrived(answer_of(200), expected, [100]) is Drop.NOT_UNDERSTOOD


@pytest.mark.parametrize("indent", [None, 2])
def test_all_items_are_taken_out_while_it_arrives(monkeypatch: pytest.MonkeyPatch, indent: int | None) -> None:
    content = json.dumps(json.loads(answer_of(300, model="m", usage={"prompt_tokens": 9})), indent=indent).encode()
    whole = lay_out(content, 300)
    assert isinstance(whole, Laid)
    # So that nothing of it is left to do in the end.
    monkeypatch.delattr(arriving, "lay_out")
    assert arrived(content, 300, [700]) == whole
