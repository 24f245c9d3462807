"""Entries as lines of JSON and back."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.answer import encoded
from proxy.cache.dialects.call import KEY_VERSION
from proxy.cache.transfer import (
    BadLine,
    End,
    Header,
    LineSplitter,
    OtherFormat,
    Terms,
    end_line,
    entry_line,
    header_line,
    read_line,
)
from storage.base import Entry, Put
from storage.listing import Listed
from tests.fake_model import chat_body

NOW = 1_800_000_000_000
TERMS = Terms(NOW, 100_000)
COUNTS = st.integers(0, 2**53)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00\né漢🦙\u2028\u202e"), max_size=40)
DIGESTS = st.binary(min_size=32, max_size=32)


def stored(body: dict[str, Any] | None = None, **changes: Any) -> Entry:
    """An entry as it is stored after an upstream's answer."""
    body = body or {k: v for k, v in chat_body().items() if k not in ("id", "created")}
    entry = Entry(
        key=b"k" * 32,
        key_version=KEY_VERSION,
        namespace=b"",
        space=b"s" * 32,
        upstream="http://127.0.0.1:8080",
        fingerprint=b"f" * 32,
        endpoint="chat",
        model="tiny",
        words="hi",
        stored_ms=NOW - 1000,
        expires_ms=NOW + 1000,
        cost_ms=1200,
        prompt_tokens=9,
        completion_tokens=4,
        usage_known=True,
        answer=encoded(body),
        near=True,
    )
    return replace(entry, **changes)


def line_of(entry: Entry, *, hits: int = 0) -> bytes:
    line = entry_line(Listed(7, entry, len(entry.answer), hits, entry.stored_ms))
    assert line is not None
    return line


def changed(**changes: Any) -> bytes:
    """A good line with some fields changed; those that are ... left out."""
    fields = {**json.loads(line_of(stored())), **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


@given(
    words=st.none() | TEXTS,
    model=TEXTS,
    content=TEXTS.filter(str.strip),
    times=st.tuples(st.integers(0, NOW), COUNTS),
    counts=st.tuples(COUNTS, COUNTS, st.none() | COUNTS, st.none() | COUNTS, COUNTS),
    digests=st.tuples(DIGESTS, DIGESTS, DIGESTS, DIGESTS | st.just(b"")),
    topic=st.integers(-(2**63), 2**63 - 1),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_what_is_written_is_read(
    words: str | None,
    model: str,
    content: str,
    times: tuple[int, int],
    counts: tuple[int, int, int | None, int | None, int],
    digests: tuple[bytes, bytes, bytes, bytes],
    topic: int,
    flags: tuple[bool, bool],
) -> None:
    body = {k: v for k, v in chat_body(content, x={"n": [1.5, 1e300, -1, None]}).items() if k not in ("id", "created")}
    near, usage_known = flags
    grace_ms, cost_ms, prompt_tokens, completion_tokens, hits = counts
    key, space, fingerprint, namespace = digests
    entry = stored(
        body,
        key=key,
        space=space,
        fingerprint=fingerprint,
        namespace=namespace,
        words=words,
        model=model,
        stored_ms=times[0],
        expires_ms=max(times),
        grace_ms=grace_ms,
        cost_ms=cost_ms,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        usage_known=usage_known,
        near=near and words is not None,
        topic=topic,
    )
    line = line_of(entry, hits=hits)
    assert line.count(b"\n") == 1
    assert read_line(line, TERMS) == Put(entry, None, hits)


def test_a_sealed_answer_goes_as_base64_and_comes_back() -> None:
    entry = stored(words=None, near=False, sealed=True, answer=bytes(range(256)))
    assert read_line(line_of(entry), TERMS) == Put(entry)
    assert isinstance(json.loads(line_of(entry))["answer"], str)


def test_numbers_that_programs_would_round_go_as_text() -> None:
    line = json.loads(line_of(stored(topic=-2)))
    assert line["topic"] == "fffffffffffffffe"
    assert (line["key"], line["namespace"], line["mark"]) == ("6b" * 32, "", 7)


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000])
def test_a_damaged_answer_is_not_written(answer: bytes) -> None:
    assert entry_line(Listed(1, stored(answer=answer), len(answer), 0, 0)) is None


def test_header_and_end_are_told_from_entries() -> None:
    header = read_line(header_line("2026-01-02T03:04:05+00:00", {"model": "tiny"}), TERMS)
    assert isinstance(header, Header)
    assert (header.nearhit_export, header.filters) == (1, {"model": "tiny"})
    assert read_line(end_line(3), TERMS) == End(True, 3)
    assert read_line(b' { "entries" : 3 , "end" : true } \r', TERMS) == End(True, 3)


def test_another_format_is_refused_as_such() -> None:
    with pytest.raises(OtherFormat, match="nearhit_export: expected 1"):
        read_line(b'{"nearhit_export": 2, "what": "else"}', TERMS)


def answer_with(**changes: Any) -> dict[str, Any]:
    return chat_body(**changes)


BAD: list[tuple[bytes, str]] = [
    (b"x", "expected a line of JSON"),
    (b"{", "expected a line of JSON"),
    (b"[1]", "expected"),
    (b"{}", "missing required field `key`"),
    (b"[" * 100_000, "nested too deeply|expected"),
    (b'{"end": true, "entries": -1}', "entries: expected `int` >= 0"),
    (b'{"end": false, "entries": 1}', "end"),
    (b'{"nearhit_export": "1"}', "nearhit_export: expected `int`"),
    (changed(words="\ud800"), "expected a line of JSON"),
    (changed().replace(b'"hi"', b'"\xff"'), "expected text in UTF-8"),
    (changed().replace(b'"cost_ms": 1200', b'"cost_ms": NaN'), "expected a line of JSON"),
    (changed(usage_known=...), "missing required field `usage_known`"),
    (changed(wrods="x"), "unknown field `wrods`"),
    (changed(cost_ms="1"), "cost_ms: expected `int`, got `str`"),
    (changed(cost_ms=1.5), "cost_ms: expected `int`, got `float`"),
    (changed(cost_ms=-1), "cost_ms: expected `int` >= 0"),
    (changed(hits=2**53 + 1), "hits: expected `int` <= "),
    (changed(stored_ms=-1), "stored_ms: expected `int` >= 0"),
    (changed(stored_ms=NOW + 90_000_000, expires_ms=NOW + 99_000_000), "stored_ms: expected a time that is not more"),
    (changed(expires_ms=NOW - 1001), "expires_ms: expected a time that is not before stored_ms"),
    (changed(key="6b" * 31), "key: expected 64 hexadecimal digits"),
    (changed(key="6b " * 21 + "6"), "key: expected 64 hexadecimal digits"),
    (changed(key="xy" * 32), "key: expected 64 hexadecimal digits"),
    (changed(namespace="00"), "namespace: expected 64 hexadecimal digits"),
    (changed(space=""), "space: expected 64 hexadecimal digits"),
    (changed(fingerprint=""), "fingerprint: expected 64 hexadecimal digits"),
    (changed(topic="0"), "topic: expected 16 hexadecimal digits"),
    (changed(upstream=""), "upstream: expected `str` of length >= 1"),
    (changed(key_version=KEY_VERSION + 1), f"key_version: expected {KEY_VERSION}"),
    (changed(endpoint="rerank"), "endpoint: expected one of chat, completions, "),
    (changed(endpoint="completions"), "answer: "),
    (changed(words=5), "words: expected `str | null`"),
    (changed(answer=None), "answer: "),
    (changed(answer=[]), "answer: .*not-understood"),
    (changed(answer={"choices": []}), "answer: .*empty"),
    (changed(answer={"choices": [1]}), "answer: .*not-understood"),
    (changed(answer={"error": "x"}), "answer: .*error-in-200"),
    (changed(answer=chat_body(finish_reason=None)), "answer: .*no-finish-reason"),
    (changed(answer=chat_body("")), "answer: .*empty"),
    (changed(answer=chat_body(message={"tool_calls": [1]}, finish_reason={})), "answer: .*finish-reason"),
    (changed(answer=chat_body("x" * 100_001)), r"answer: expected at most 100000 bytes \(cache.max_answer_bytes\)"),
    (changed(answer=chat_body(x="e")).replace(b'"e"', b"1e999"), "expected a line of JSON|answer: .*not-json"),
    (changed(sealed=True), "words: expected null"),
    (changed(sealed=True, words=None), "answer: expected base64"),
    (changed(sealed=True, words=None, answer="a$=="), "answer: expected base64"),
    (changed(sealed=True, words=None, answer=""), "answer: expected base64"),
]


@pytest.mark.parametrize(("line", "why"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(line: bytes, why: str) -> None:
    with pytest.raises(BadLine, match=why):
        read_line(line, TERMS)


@given(st.binary(max_size=200) | st.sampled_from([line for line, _ in BAD]).flatmap(lambda b: st.just(b[:150])))
def test_whatever_comes_is_bad_at_worst(line: bytes) -> None:
    with contextlib.suppress(BadLine):
        read_line(line, TERMS)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5)
    names = st.sampled_from(["choices", "message", "content", "tool_calls", "delta", "index", "text", "finish_reason"])
    return st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=4))


@given(json_values(), st.sampled_from(["chat", "completions"]))
def test_an_answer_of_any_shape_is_stored_or_bad(answer: Any, endpoint: str) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": answer}
    for body in (answer, {"choices": [{"message": message, "text": "x", "finish_reason": "stop", "index": answer}]}):
        try:
            put = read_line(changed(answer=body, endpoint=endpoint), TERMS)
        except BadLine:
            continue
        assert isinstance(put, Put)


def test_nothing_readable_is_taken_where_nothing_readable_may_be_kept() -> None:
    terms = replace(TERMS, sealed_only=True)
    with pytest.raises(BadLine, match=r"cache\.store_words"):
        read_line(changed(), terms)
    sealed = line_of(stored(words=None, near=False, sealed=True, answer=b"x"))
    assert isinstance(read_line(sealed, terms), Put)


@pytest.mark.parametrize(
    "changes",
    [
        {"words": None},
        {"words": "x" * 50_000},
        {"answer": chat_body(None, message={"tool_calls": [{"id": "1", "function": {}}]}, finish_reason="tool_calls")},
        {"sealed": True, "words": None, "answer": "eHh4"},
    ],
)
def test_what_may_not_answer_other_words_is_taken_for_equal_calls_only(changes: dict[str, Any]) -> None:
    put = read_line(changed(**changes), TERMS)
    assert isinstance(put, Put)
    assert not put.entry.near


def test_an_answer_loses_what_each_replay_makes_anew() -> None:
    put = read_line(changed(answer={"id": "chatcmpl-1", "created": 5, **chat_body()}), TERMS)
    assert isinstance(put, Put)
    assert put.entry.answer == stored().answer


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.integers(1, 9))
def test_lines_are_the_same_however_they_come(lines: list[bytes], step: int) -> None:
    whole = b"\n".join(lines)
    splitter = LineSplitter(8)
    found: list[bytes | None] = []
    for start in range(0, len(whole), step):
        found += splitter.feed(whole[start : start + step])
    found += splitter.end()
    expected = [line if len(line) <= 8 else None for line in whole.split(b"\n")]
    assert found == (expected[:-1] if expected[-1] == b"" else expected)
