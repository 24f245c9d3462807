"""Vectors in the two forms in which embeddings travel, each made from the other without loss. Pure."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

import msgspec

from proxy.cache.answer import NotUnderstood

_decode_numbers = msgspec.json.Decoder(list[float]).decode
_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


class Form(StrEnum):
    """How a call wants its vectors: `encoding_format`."""

    FLOAT = "float"
    """A list of numbers."""
    BASE64 = "base64"
    """32-bit floats, little-endian, in base64."""


@dataclass(frozen=True, slots=True)
class Vector:
    """Numbers that are finite as 32-bit floats, at least one.

    `packed` are these floats, little-endian; `numbers` the doubles that the server gave, None where they are the same.
    """

    packed: bytes
    numbers: Sequence[float] | None

    @classmethod
    def read(cls, raw: bytes, form: Form | None) -> Vector:
        """The vector in this JSON. Whoever asked for base64 may get numbers: servers need not know it. None: either.

        Raises:
            NotUnderstood: it is none.
        """
        try:
            if raw[:1] != b'"':
                return _of_numbers(_decode_numbers(raw))
            if form is not Form.FLOAT:
                return _of_packed(base64.b64decode(_decode_text(raw), validate=True))
        except (ValueError, RecursionError, OverflowError, binascii.Error, msgspec.MsgspecError) as error:
            raise NotUnderstood("not a vector") from error
        raise NotUnderstood("text, where numbers were asked for")

    @property
    def dimensions(self) -> int:
        """How many numbers it has."""
        return len(self.packed) // 4

    @property
    def weight(self) -> int:
        """About how many bytes it takes as it is kept."""
        return self.dimensions * (6 if self.numbers is None else 22)

    @property
    def is_zero(self) -> bool:
        """Whether it says nothing: a server that fails fills it with zeros."""
        return not any(self.numbers or _unpacked(self.packed))

    @property
    def kept(self) -> str | Sequence[float]:
        """The shorter form of those that lose nothing, for storage."""
        return base64.b64encode(self.packed).decode("ascii") if self.numbers is None else self.numbers

    def encoded(self, form: Form) -> bytes:
        """JSON in this form."""
        if form is Form.BASE64:
            return b'"' + base64.b64encode(self.packed) + b'"'
        # A 32-bit float is written as the double of its value: whoever reads either has the same number.
        return _encode(_unpacked(self.packed) if self.numbers is None else self.numbers)


def _of_numbers(numbers: list[float]) -> Vector:
    floats = array("f", numbers)
    if not floats:
        raise NotUnderstood("no numbers")
    narrowed = floats.tolist()
    if narrowed == numbers:
        return Vector(_packed(floats), None)
    if not all(map(isfinite, narrowed)):
        raise NotUnderstood("a number that no 32-bit float holds")
    return Vector(_packed(floats), numbers)


def _of_packed(packed: bytes) -> Vector:
    if not packed or len(packed) % 4:
        raise NotUnderstood("not 32-bit floats")
    if not all(map(isfinite, _unpacked(packed))):
        raise NotUnderstood("a number that is none")
    return Vector(packed, None)


def _packed(floats: array[float]) -> bytes:
    if sys.byteorder == "big":
        floats = floats[:]
        floats.byteswap()
    return floats.tobytes()


def _unpacked(packed: bytes) -> list[float]:
    floats = array("f", packed)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tolist()
