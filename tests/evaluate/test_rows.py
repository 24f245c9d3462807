"""What a file may have in it, and what is said of one that has something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.evaluate import rows
from proxy.evaluate.errors import EvaluationError
from proxy.evaluate.rows import Origin, read

PAIR = {"a": "one", "b": "two", "same": False}
LOGGED = {"prompt": "one", "cls": "first"}


def pair(**fields: Any) -> bytes:
    return json.dumps({**PAIR, **fields}).encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cases.jsonl"


def test_pairs_and_logs_with_and_without_what_is_optional(file: Path) -> None:
    full = pair(kind="typo", source="me", ca="x", cb="y", lang="en")
    file.write_bytes(b"\n".join([b"\xef\xbb\xbf" + full, b"", pair(), json.dumps(LOGGED).encode() + b"\r"]))
    read_rows = read(file)
    first, second = read_rows.pairs
    assert first.origin == Origin(1, "typo", "me")
    assert (first.a.words, first.b.words, first.same, first.class_a, first.class_b) == ("one", "two", False, "x", "y")
    assert second.origin == Origin(3, "", "")
    assert (second.class_a, second.class_b) == (None, None)
    assert second.a == first.a
    (logged,) = read_rows.log
    assert (logged.origin.line, logged.asked, logged.answer) == (4, first.a, "first")


def test_message_lists_are_read_as_the_proxy_reads_them(file: Path) -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    answered = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    plain = [{"role": "user", "content": "one"}]
    file.write_bytes(pair(a=system, b=answered) + b"\n" + pair(b=plain))
    with_system, alone = read(file).pairs
    assert with_system.a.words == "one"
    assert with_system.a.space != alone.a.space
    assert with_system.b.words is None
    assert "assistant" in with_system.b.shown
    assert alone.a.digest == alone.b.digest


def test_a_text_that_no_database_can_hold_is_looked_up_exactly(file: Path) -> None:
    file.write_bytes(pair(a="\ud800", b=""))
    (odd,) = read(file).pairs
    assert odd.a.words is None
    assert odd.b.words is None


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"what?", "line 1: is not JSON: what?"),
        (b"[" * 100_000, "line 1: is not JSON: [["),
        (b'{"a": 1' + b"0" * 5000 + b"}", "line 1: is not JSON"),
        (b"[1]", "line 1: is not a JSON object: [1]"),
        (b"\n\n null", "line 3: is not a JSON object: null"),
        (b"{}", "line 1: has neither"),
        (pair() + b'\n{"a": "\xff"}', "line 2: is not UTF-8 (byte 8 of the line)"),
        (b'{"b": "two", "same": true}', "line 1: `a` is missing"),
        (b'{"a": "one", "same": true}', "line 1: `b` is missing"),
        (b'{"a": "one", "b": "two"}', "line 1: `same` is missing"),
        (pair(same=1), "line 1: `same` must be true or false"),
        (pair(same="true"), "line 1: `same` must be true or false"),
        (pair(a=None), "line 1: `a` must be a string or a list of messages"),
        (pair(b={"role": "user"}), "line 1: `b` must be a string or a list of messages"),
        (pair(b=[]), "line 1: `b` is nothing that the cache understands"),
        (pair(b=["two"]), "line 1: `b` is nothing that the cache understands"),
        (pair(a="," * 600_000), "line 1: `a` is nothing that the cache understands"),
        (pair(kind=3), "line 1: `kind` must be a string"),
        (pair(source=[]), "line 1: `source` must be a string"),
        (pair(ca=1), "line 1: `ca` must be a string"),
        (b'{"prompt": "one"}', "line 1: `cls` is missing"),
        (b'{"prompt": "one", "cls": 1}', "line 1: `cls` must be a string"),
        (b'{"cls": "one"}', "line 1: `prompt` is missing"),
        (b"", " has no rows"),
        (b"\n \n", " has no rows"),
    ],
)
def test_what_is_not_understood_is_named_with_its_line(file: Path, raw: bytes, said: str) -> None:
    file.write_bytes(raw)
    with pytest.raises(EvaluationError) as stopped:
        read(file)
    message = str(stopped.value)
    assert message.startswith(str(file))
    assert said in message
    assert "\n" not in message
    assert len(message) < len(str(file)) + 120


@pytest.mark.parametrize("depth", [50, 400, 800, 900, 950, 980, 5000])
def test_messages_nested_ever_deeper_are_refused(file: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    file.write_text(f'{{"a": [{{"role": "user", "content": {nested}}}, 1], "b": "two", "same": true}}')
    with pytest.raises(EvaluationError, match="line 1: "):
        read(file)


def test_a_huge_line_is_refused_before_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 1 << 20)
    file.write_bytes(pair() + b"\n" + b" " * (1 << 21))
    with pytest.raises(EvaluationError, match="line 2: is longer than 1 MiB"):
        read(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"absent\.jsonl: No such file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(EvaluationError, match="Is a directory"):
        read(tmp_path)
