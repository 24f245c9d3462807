"""A fetch of the vectors of some items, for all who wait for one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxy.cache.answer import Gist, NotUnderstood, Recorded
from proxy.cache.dialects.arriving import Arriving
from proxy.cache.dialects.laying import Laid, Part
from proxy.cache.dialects.vectors import Form
from proxy.cache.flight import Flight, Reader
from proxy.cache.policy import Drop
from proxy.cache.recorder import unusable

STEP = 32
"""How many vectors are worked on before others have their turn."""
AT_ONCE = 16
"""Look-ups in storage at a time."""

_NOTHING_SAID = Gist((), cut=False, acts=True)


@dataclass(frozen=True, slots=True)
class Delivered:
    """The vectors came; under the key of each item, what the answer says of it."""

    parts: Mapping[bytes, Part]


@dataclass(frozen=True, slots=True)
class Spoiled:
    """An answer came that cannot be taken apart."""

    why: Drop


@dataclass(frozen=True, slots=True)
class Declined:
    """The upstream answered, with no success."""

    status: int


@dataclass(frozen=True, slots=True)
class Broken:
    """There was no answer, or not all of it."""

    error: Exception


Heard = Delivered | Spoiled | Declined | Broken


class Gathered:
    """The copy of an answer to a batch; see `proxy.cache.recorder.Recording`."""

    spoke = False
    complete = False

    def __init__(self, max_bytes: int) -> None:
        """Take an answer of up to `max_bytes`, as they come over the wire."""
        self.expected = 0
        """How many items it is for, known before it begins; 0: there is none to come."""
        self._max_bytes = max_bytes
        self._size = 0
        self._drop: Drop | None = None
        self._arriving = Arriving(0)
        self.laid: Laid | None = None
        """The answer, once it has ended well."""

    @property
    def full(self) -> bool:
        """See `Recording`."""
        return self._size > self._max_bytes

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """See `Recording`."""
        self._drop = unusable(status, headers)
        self._arriving = Arriving(self.expected)

    def feed(self, chunk: bytes) -> None:
        """See `Recording`."""
        self._size += len(chunk)
        if self.full:
            self._drop = self._drop or Drop.TOO_LARGE
            self._arriving = Arriving(0)
        elif self._drop is None:
            self._arriving.feed(chunk)

    def finish(self) -> Recorded | Drop:
        """See `Recording`. Whether its vectors are some is found out later, and takes time."""
        if self._drop is not None:
            return self._drop
        if self.expected:
            laid = self._arriving.finish()
            if isinstance(laid, Drop):
                return laid
            self.laid = laid
        return Recorded({}, usage_known=True, gist=_NOTHING_SAID)


class Errand:
    """A fetch under way for the items of `keys`, and what came of it."""

    def __init__(self, flight: Flight, gathered: Gathered, keys: Sequence[bytes], form: Form) -> None:
        """`gathered` is the copy that `flight` takes; the answer has the items in the order of `keys`."""
        loop = asyncio.get_running_loop()
        self.flight = flight
        self.keys = keys
        self._gathered = gathered
        self._form = form
        self._found: Mapping[bytes, Part] = {}
        self._left: asyncio.Future[Sequence[bytes]] = loop.create_future()
        self._parts: asyncio.Future[Delivered | Spoiled] = loop.create_future()
        self._steady: asyncio.Future[bool] = loop.create_future()

    @property
    def left(self) -> Sequence[bytes] | None:
        """The items that the upstream is asked for, None while that is not known; others have fetched the rest."""
        return self._left.result() if self._left.done() else None

    async def decided(self) -> Sequence[bytes]:
        """The items that the upstream is asked for, once that is known."""
        return await asyncio.shield(self._left)

    @property
    def sources(self) -> int:
        """Of how many origins the vectors are that it has delivered: the upstream's answer, and what was found."""
        return bool(self.left) + bool(self._found)

    def decide(self, found: Mapping[bytes, Part]) -> Sequence[bytes]:
        """Say what need not be asked for; returns the items that are left."""
        self._found = found
        left = [key for key in self.keys if key not in found]
        self._gathered.expected = len(left)
        self._left.set_result(left)
        return left

    async def hear(self, reader: Reader) -> Heard:
        """How it ended; `reader` has read its answer along by then, unless that is none."""
        try:
            status = (await self.flight.head()).status
            if not 200 <= status < 300:
                return Declined(status)
            async for _ in reader.chunks():
                pass
        except Exception as error:  # noqa: BLE001 - whatever went wrong is the caller's to tell
            return Broken(error)
        return await asyncio.shield(self._parts)

    async def steady(self) -> bool:
        """Whether the same model ran from its beginning to its end, so that its vectors go with stored ones."""
        return await asyncio.shield(self._steady)

    async def unpack(self, lengths: Sequence[int]) -> Sequence[Part] | Drop:
        """Read the vectors of the answer that has come, by and by; `lengths` are those of the items that are left."""
        laid, parts = self._gathered.laid, list[Part]()
        if not lengths:
            return parts
        if laid is None:
            return Drop.NOT_UNDERSTOOD
        try:
            for number, usage in enumerate(laid.shares(lengths)):
                parts.append(laid.part(number, usage, self._form))
                if len(parts) % STEP == 0:
                    await asyncio.sleep(0)
        except NotUnderstood:
            return Drop.NOT_UNDERSTOOD
        if len({part.vector.dimensions for part in parts}) != 1:
            return Drop.NOT_UNDERSTOOD
        return parts

    def deliver(self, parts: Sequence[Part] | Drop) -> None:
        """Tell all who wait what came for the items that are left."""
        if isinstance(parts, Drop):
            self._parts.set_result(Spoiled(parts))
        else:
            self._parts.set_result(Delivered({**self._found, **dict(zip(self.left or (), parts, strict=True))}))

    def settle(self, *, steady: bool) -> None:
        """Tell all who wait whether one model ran all the time."""
        self._steady.set_result(steady)

    def give_up(self) -> None:
        """Nothing more comes: let nobody wait for it."""
        if not self._left.done():
            self._left.set_result(self.keys)
        if not self._parts.done():
            self.deliver(Drop.CLIENT_GONE)
        if not self._steady.done():
            self.settle(steady=False)
