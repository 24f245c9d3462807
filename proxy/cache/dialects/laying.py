"""Answers with vectors, taken apart item by item. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Raw

from proxy.cache.answer import Gist, NotUnderstood, Recorded, count
from proxy.cache.dialects.vectors import Form, Vector
from proxy.cache.policy import Drop
from proxy.cache.strict_json import Json

BROKEN = (ValueError, RecursionError, msgspec.MsgspecError)
"""What reading an answer raises that is not what it should be."""

_ANEW: Mapping[str, Json] = {"id": "", "created": 0}
"""What each replay makes anew, as it is kept."""

_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_data = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_decode_any = msgspec.json.Decoder().decode
_decode_whole_number = msgspec.json.Decoder(int).decode


@dataclass(frozen=True, slots=True)
class Part:
    """What an answer says of one item.

    `shell` are the fields of the answer, `fields` those of the item's own object but its vector and place; `usage` is
    the item's share, None where the upstream tells none. Values may be `msgspec.Raw`.
    """

    shell: Mapping[str, Json]
    fields: Mapping[str, Json]
    usage: Mapping[str, Json] | None
    vector: Vector

    @property
    def recorded(self) -> Recorded | Drop:
        """The answer to a batch of this item alone, as it is kept."""
        if self.vector.is_zero:
            return Drop.EMPTY
        data = [{**self.fields, "index": 0, "embedding": self.vector.kept}]
        usage = {} if self.usage is None else {"usage": self.usage}
        tokens = count(self.usage, "prompt_tokens")
        # It "acts" in that it must not stand for other words.
        gist = Gist((), cut=False, acts=True, prompt_tokens=tokens)
        return Recorded({**self.shell, "data": data, **usage}, usage_known=True, gist=gist)


@dataclass(frozen=True, slots=True)
class Laid:
    """An answer that is plainly one for so many items, taken apart; `items` in their order."""

    shell: Mapping[str, Json]
    items: tuple[Mapping[str, Raw], ...]
    usage: Mapping[str, Json] | None

    def shares(self, lengths: Sequence[int]) -> list[Mapping[str, Json] | None]:
        """The usage of each item, by its length; all of them together are the usage of the answer."""
        if self.usage is None:
            return [None] * len(lengths)
        shares = {name: apportioned(total, lengths) for name, total in self.usage.items() if _is_count(total)}
        return [
            {name: shares[name][number] if name in shares else value for name, value in self.usage.items()}
            for number in range(len(lengths))
        ]

    def part(self, number: int, usage: Mapping[str, Json] | None, form: Form | None) -> Part:
        """What it says of an item, in this form where one was asked for.

        Raises:
            NotUnderstood: that is no vector.
        """
        fields = dict(self.items[number])
        vector = Vector.read(bytes(fields.pop("embedding", b"null")), form)
        fields.pop("index", None)
        return Part(self.shell, fields, usage, vector)


def fields_of(content: bytes) -> dict[str, Raw]:
    """The fields of an object.

    Raises:
        Exception: one of `BROKEN`, where it is none.
    """
    # What is not looked at more closely here goes out as it came.
    content.decode("utf-8")
    return _decode_object(content)


def lay_out(content: bytes, expected: int) -> Laid | Drop:
    """Take an answer for `expected` items apart, as far as its vectors need not be read for that."""
    try:
        fields = fields_of(content)
    except BROKEN:
        return Drop.NOT_JSON
    if bytes(fields.get("error", b"null")) != b"null":
        return Drop.ERROR_IN_200
    try:
        return laid_of(fields, _decode_data(fields.get("data", Raw(b"null"))), expected)
    except BROKEN:
        return Drop.NOT_UNDERSTOOD


def laid_of(fields: Mapping[str, Raw], data: Sequence[Mapping[str, Raw]], expected: int) -> Laid:
    """The answer with these fields, whose `data` is this.

    Raises:
        Exception: one of `BROKEN`, where it is none for `expected` items.
    """
    items, usage = _ordered(data, expected), _usage(fields.get("usage"))
    shell = {name: _ANEW.get(name, value) for name, value in fields.items() if name not in ("data", "usage")}
    return Laid(shell, items, usage)


def _ordered(data: Sequence[Mapping[str, Raw]], expected: int) -> tuple[Mapping[str, Raw], ...]:
    if len(data) != expected:
        raise NotUnderstood(f"{len(data)} vectors for {expected} items")
    if expected == 1 and "index" not in data[0]:
        return tuple(data)
    places = [_decode_whole_number(item.get("index", b"null")) for item in data]
    if sorted(places) != list(range(expected)):
        raise NotUnderstood("vectors whose places are not those of the items")
    return tuple(item for _, item in sorted(zip(places, data, strict=True), key=lambda placed: placed[0]))


def _usage(raw: Raw | None) -> Mapping[str, Json] | None:
    usage = None if raw is None else _decode_any(raw)
    if usage is None:
        return None
    if not isinstance(usage, dict) or any(
        _is_count(value) and count(usage, name) is None for name, value in usage.items()
    ):
        raise NotUnderstood("usage that nobody can have had")
    return usage


def apportioned(total: int, weights: Sequence[int]) -> list[int]:
    """Shares of `total` in proportion to positive weights, by the largest remainder: their sum is `total`."""
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda place: -(total * weights[place] % whole))
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares


def _is_count(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
