"""Waiting for everything that a batch comes from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, assert_never

from proxy.cache.batches import Batches, Gathering
from proxy.cache.bringing import Dispatch
from proxy.cache.dialects.laying import Part
from proxy.cache.errand import Broken, Declined, Delivered, Errand, Heard, Spoiled
from proxy.cache.flight import Reader
from proxy.web.joining import PERSONAL

_DOWN = frozenset({502, 503, 504})
"""What an upstream says that would say the same of any other item."""


@dataclass(frozen=True, slots=True)
class Collected:
    """All parts, by the numbers of their items. `fresh` is one that came just now, None where none did."""

    parts: Mapping[int, Part]
    fresh: Part | None


@dataclass(frozen=True, slots=True)
class Failed:
    """What failed, and how. `reader` has read nothing of what the upstream said; `joined`: it was asked by another."""

    heard: Declined | Broken
    reader: Reader
    joined: bool


@dataclass(frozen=True, slots=True)
class Unfit:
    """What came cannot be put together: the client's own request must be sent as it is."""


@dataclass(frozen=True, slots=True)
class _Awaited:
    """An errand that is heard out for the items of these numbers, while `place` is open; `again`: after another."""

    errand: Errand
    numbers: Sequence[int]
    joined: bool
    reader: Reader
    place: ExitStack
    again: bool


class Gatherer:
    """Reads the errands of one batch along for the life of its block: who leaves it wants none of them any more."""

    def __init__(
        self, batches: Batches, gathering: Gathering, dispatch: Dispatch, *, retries: bool, join_timeout_s: float
    ) -> None:
        """With `retries`, what another's errand failed to bring is asked for once more.

        Others' errands are waited for until `join_timeout_s` have passed; with 0, without an end.
        """
        self._batches = batches
        self._gathering = gathering
        self._dispatch = dispatch
        self._retries = retries
        self._join_until = time.monotonic() + join_timeout_s if join_timeout_s else None
        self._waiting: dict[asyncio.Task[Heard], _Awaited] = {}
        self._tasks: list[asyncio.Task[Heard]] = []
        self._all = ExitStack()
        self._delivered: list[Errand] = []
        self._parts = {number: one.part for number, one in gathering.known.items()}
        self.alone: set[int] = set()
        """The items that had to be asked for here, though another had asked for them."""

    def __enter__(self) -> Self:
        gathering = self._gathering
        self._first = [self._awaited(errand, numbers, joined=True) for errand, numbers in gathering.joined.items()]
        self._first += [self._awaited(errand, numbers, joined=False) for errand, numbers in gathering.sent.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._all.close()

    async def passed(self) -> Reader | None:
        """Reads what the upstream answers, where that is the answer: it was sent the client's own bytes."""
        (first, *others) = self._first
        places = len(self._gathering.batch.order)
        if others or first.joined or len(first.numbers) < places or len(await first.errand.decided()) < places:
            return None
        return first.reader

    async def collect(self) -> Collected | Failed | Unfit:
        """Wait until everything is there, or one thing cannot be had."""
        for one in self._first:
            self._hear(one)
        try:
            while self._waiting:
                done, _ = await asyncio.wait(self._waiting, timeout=self._patience_s(), return_when="FIRST_COMPLETED")
                if not done:
                    self._wait_no_longer()
                for task in done:
                    ending = self._take(self._waiting.pop(task), task.result())
                    if ending is not None:
                        return ending
            return await self._together()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _awaited(self, errand: Errand, numbers: Sequence[int], *, joined: bool, again: bool = False) -> _Awaited:
        place = self._all.enter_context(ExitStack())
        return _Awaited(errand, numbers, joined, place.enter_context(errand.flight.reader()), place, again)

    def _hear(self, one: _Awaited) -> None:
        task = asyncio.create_task(one.errand.hear(one.reader), name="nearhit-errand")
        self._tasks.append(task)
        self._waiting[task] = one

    def _patience_s(self) -> float | None:
        if self._join_until is None or not any(one.joined for one in self._waiting.values()):
            return None
        return max(self._join_until - time.monotonic(), 0)

    def _wait_no_longer(self) -> None:
        late = [task for task, one in self._waiting.items() if one.joined]
        numbers: list[int] = []
        for task in late:
            task.cancel()
            one = self._waiting.pop(task)
            one.place.close()
            numbers += one.numbers
        self._ask_alone(numbers, shared=False)

    def _take(self, one: _Awaited, heard: Heard) -> Failed | Unfit | None:
        """Go on with what became of an errand; the end of all, where it is that."""
        match heard:
            case Delivered(parts):
                keys = self._gathering.keys
                self._parts |= {number: parts[keys[number]] for number in one.numbers}
                self._delivered.append(one.errand)
                return None
            case Spoiled() if not one.joined:
                return Unfit()
            case Declined() | Broken() if not one.joined or self._is_theirs(one, heard):
                return Failed(heard, one.reader, one.joined)
            case Spoiled() | Declined() | Broken():
                one.place.close()
                personal = isinstance(heard, Declined) and heard.status in PERSONAL
                shared = not (personal or isinstance(heard, Spoiled))
                if shared and not one.again:
                    self._ask_again(one)
                else:
                    self._ask_alone(one.numbers, shared=shared)
                return None
            case _:
                assert_never(heard)

    def _is_theirs(self, one: _Awaited, heard: Declined | Broken) -> bool:
        """Whether another's failure is the failure of this batch: it would hear the same."""
        if (self._retries and not one.again) or (isinstance(heard, Declined) and heard.status in PERSONAL):
            return False
        if isinstance(heard, Broken) or heard.status in _DOWN:
            return True
        # Some other item of theirs may be what the upstream does not accept.
        return set(one.errand.keys) <= set(self._gathering.keys)

    def _ask_again(self, failed: _Awaited) -> None:
        joined, errand = self._batches.ask_again(self._gathering, failed.numbers, self._dispatch, failed.errand)
        for another, numbers in joined.items():
            self._hear(self._awaited(another, numbers, joined=True, again=True))
        if errand is not None:
            rest = [number for number in failed.numbers if self._gathering.keys[number] in frozenset(errand.keys)]
            self.alone.update(rest)
            self._hear(self._awaited(errand, rest, joined=False))

    def _ask_alone(self, numbers: Sequence[int], *, shared: bool) -> None:
        errand = self._batches.ask_alone(self._gathering, numbers, self._dispatch, shared=shared)
        self.alone.update(numbers)
        self._hear(self._awaited(errand, numbers, joined=False))

    async def _together(self) -> Collected | Unfit:
        sources = sum(errand.sources for errand in self._delivered) + bool(self._gathering.known)
        for errand in self._delivered if sources > 1 else ():
            # Vectors of two models in one answer would be compared with each other.
            if not await errand.steady():
                return Unfit()
        if len({part.vector.dimensions for part in self._parts.values()}) != 1:
            return Unfit()
        fresh = [number for number in self._parts if number not in self._gathering.known]
        return Collected(self._parts, self._parts[fresh[-1]] if fresh else None)
