"""WebSocket frames, as far as one who only passes them on must know them (RFC 6455 section 5). Pure."""

from __future__ import annotations

_CLOSE = 0x8
_FINAL = 0x80
_MASKED = 0x80
_EXTENDED = {126: 2, 127: 8}
"""Bytes of a length that the second byte only announces."""
_LONGEST_CONTROL = 125
_LONGEST_HEAD = 14


class Frames:
    """Where the frames of one direction end, and whether one of them said goodbye."""

    __slots__ = ("_head", "_left", "closed")

    def __init__(self) -> None:
        """Before the first frame."""
        self.closed = False
        """Whether a Close frame has passed as a whole."""
        self._head = bytearray()
        self._left = 0

    @property
    def between(self) -> bool:
        """Whether the last frame is complete and no other has begun."""
        return not self._head

    def feed(self, data: bytes, *, to_the_end: bool = False) -> int:
        """Read on, and tell how many bytes were read: all, or those of the unfinished frame with `to_the_end`."""
        at = 0
        while at < len(data) and not (to_the_end and self.between):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
            else:
                at = at if to_the_end else self._whole_frames(data, at)
                step = min(_head_length(self._head) - len(self._head), len(data) - at)
                self._head += data[at : at + step]
                at += step
                if len(self._head) < _head_length(self._head):
                    continue
                self._left = _payload_length(self._head)
            if not self._left:
                self.closed = self.closed or self._head[0] & 0xF == _CLOSE
                self._head.clear()
        return at

    def _whole_frames(self, data: bytes, at: int) -> int:
        """Where those frames end that begin at `at` and are there as a whole: a flood of small ones costs little."""
        while not self._head and len(data) - at >= _LONGEST_HEAD:
            second = data[at + 1]
            size = second & 0x7F
            start = at + (6 if second & _MASKED else 2)
            if size in _EXTENDED:
                size = int.from_bytes(data[at + 2 : at + 2 + _EXTENDED[size]], "big")
                start += _EXTENDED[second & 0x7F]
            if start + size > len(data):
                break
            self.closed = self.closed or data[at] & 0xF == _CLOSE
            at = start + size
        return at


def _head_length(head: bytes | bytearray) -> int:
    """Bytes of a frame's head, as far as its beginning tells: more once its second byte is there."""
    if len(head) < 2:
        return 2
    return 2 + _EXTENDED.get(head[1] & 0x7F, 0) + (4 if head[1] & _MASKED else 0)


def _payload_length(head: bytes | bytearray) -> int:
    short = head[1] & 0x7F
    return int.from_bytes(head[2 : 2 + _EXTENDED[short]], "big") if short in _EXTENDED else short


def close_frame(code: int, reason: str, mask: bytes = b"") -> bytes:
    """A Close frame. `mask` is four random bytes where it goes to a server.

    Raises:
        ValueError: the reason is too long for one.
    """
    payload = code.to_bytes(2, "big") + reason.encode()
    if len(payload) > _LONGEST_CONTROL:
        raise ValueError("a Close frame holds at most 123 bytes of reason")
    if mask:
        payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    return bytes([_FINAL | _CLOSE, (_MASKED if mask else 0) | len(payload)]) + mask + payload
