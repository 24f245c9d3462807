"""Where WebSocket frames end, however they are cut into pieces on their way."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.web.frames import Frames, close_frame


def encoded(opcode: int, payload: bytes, mask: bytes = b"", width: int = 0) -> bytes:
    """A frame; its length in `width` bytes more than the shortest form has."""
    size = len(payload)
    bit = 0x80 if mask else 0
    if width == 8 or size > 65_535:
        length = bytes([bit | 127]) + struct.pack("!Q", size)
    elif width == 2 or size > 125:
        length = bytes([bit | 126]) + struct.pack("!H", size)
    else:
        length = bytes([bit | size])
    return bytes([0x80 | opcode]) + length + mask + payload


FRAMES = st.builds(
    encoded,
    st.sampled_from([0, 1, 2, 9, 10]),
    st.one_of(st.binary(max_size=40), st.integers(120, 300).map(bytes), st.integers(65_530, 65_540).map(bytes)),
    st.sampled_from([b"", b"mask", bytes(4)]),
    st.sampled_from([0, 2, 8]),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(marks)]


@given(st.lists(FRAMES, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=8))
def test_the_end_of_the_last_frame_is_known(frames: list[bytes], places: list[int]) -> None:
    reader = Frames()
    whole = b"".join(frames)
    ends = {sum(map(len, frames[:number])) for number in range(len(frames) + 1)}
    passed = 0
    for piece in cut(whole, places):
        assert reader.feed(piece) == len(piece)
        passed += len(piece)
        assert reader.between == (passed in ends)
    assert not reader.closed


@given(st.lists(FRAMES, min_size=1, max_size=6), st.lists(st.integers(0, 1 << 20), max_size=8), st.integers(0, 1 << 20))
def test_it_stops_at_the_end_of_the_frame_that_was_begun(frames: list[bytes], places: list[int], cut_at: int) -> None:
    whole = b"".join(frames)
    begun = cut_at % (len(whole) + 1)
    ends = [sum(map(len, frames[:number])) for number in range(len(frames) + 1)]
    reader = Frames()
    reader.feed(whole[:begun])
    passed = begun + sum(reader.feed(piece, to_the_end=True) for piece in cut(whole[begun:], places))
    assert passed == next(end for end in ends if end >= begun)
    assert reader.between


@given(st.lists(FRAMES, max_size=4), st.lists(st.integers(0, 1 << 20), max_size=8), st.sampled_from([b"", b"\1\2\3\4"]))
def test_a_goodbye_is_noticed_once_it_is_whole(frames: list[bytes], places: list[int], mask: bytes) -> None:
    reader = Frames()
    whole = b"".join(frames) + close_frame(1001, "nearhit is stopping", mask)
    for piece in cut(whole[:-1], places):
        reader.feed(piece)
    assert not reader.closed
    reader.feed(whole[-1:])
    assert reader.closed
    assert reader.between


def test_a_close_frame_says_code_and_reason() -> None:
    assert close_frame(1001, "bye") == b"\x88\x05\x03\xe9bye"
    assert close_frame(1001, "", b"\1\2\3\4") == b"\x88\x82\1\2\3\4" + bytes([0x03 ^ 1, 0xE9 ^ 2])
    with pytest.raises(ValueError):
        close_frame(1001, "x" * 124)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_bytes_that_are_no_frames_harm_nobody(data: bytes, places: list[int]) -> None:
    reader = Frames()
    assert sum(reader.feed(piece) for piece in cut(data, places)) == len(data)
