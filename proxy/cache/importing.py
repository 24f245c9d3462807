"""Entries that come from a file of lines are stored in batches; what is wrong with a line is told by its number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from proxy.cache.transfer import BadLine, End, Header, OtherFormat, Terms, read_line
from storage.base import Change, Entry, Put, Room

BATCH = 512
"""Most lines of one transaction."""
BATCH_BYTES = 4 * 1024 * 1024
"""What these may weigh, unless one alone weighs more."""

_MOST_TOLD = 100
_MOST_HITS = 1_000_000
_MOST_COST_MS = 86_400_000
"""Beyond, what one entry claims to be worth would blur the differences between all others, as long as the store is."""


class Receiving(Protocol):
    """What this needs of storage."""

    async def stored(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """See `storage.listing.Listing.stored`."""
        ...

    async def write(self, changes: Sequence[Change], room: Room | None = None) -> int:
        """See `storage.base.Entries.write`."""
        ...


@dataclass(frozen=True, slots=True)
class Bad:
    """A line that cannot be stored, by its number, and what was expected."""

    line: int
    why: str


class Refused(Exception):
    """A bad line, where none is accepted. What came before it is stored."""

    def __init__(self, bad: Bad) -> None:
        """Tell which line it is."""
        super().__init__(f"line {bad.line}: {bad.why}")
        self.bad = bad


@dataclass(slots=True)
class Tally:
    """What became of the lines. An entry counts once: as imported, replaced, known, expired or bad."""

    lines: int = 0
    entries: int = 0
    imported: int = 0
    replaced: int = 0
    known: int = 0
    expired: int = 0
    other_upstream: int = 0
    evicted: int = 0
    bad_count: int = 0
    bad: list[Bad] = field(default_factory=list)
    complete: bool = False

    def as_json(self) -> dict[str, Any]:
        """For programs; see docs/transfer.md."""
        told = {name: getattr(self, name) for name in Tally.__slots__}
        return {**told, "bad": [{"line": bad.line, "why": bad.why} for bad in self.bad]}


@dataclass(frozen=True, slots=True)
class Place:
    """Where entries come to: the upstream whose answers are looked for, and its fingerprint, where that is known."""

    upstream: str
    fingerprint: bytes | None

    def misses(self, entry: Entry) -> bool:
        """Whether nothing that is asked here now finds this entry."""
        other = self.fingerprint is not None and entry.fingerprint != self.fingerprint
        return other or entry.upstream != self.upstream


_Read = Put | Header | End | BadLine | None


class Importer:
    """Stores what the lines of one file say, in their order."""

    def __init__(
        self,
        store: Receiving,
        room: Room,
        places: Sequence[Place],
        terms: Terms,
        *,
        skip_bad: bool,
        first: int,
        added: Callable[[Sequence[bytes]], None],
        replaced: Callable[[], None],
    ) -> None:
        """`first` is the number of the first line; with `skip_bad`, bad lines are counted and passed over.

        `added` hears the keys of entries that are about to be stored, `replaced` that some of them took the place of
        others.
        """
        self._store = store
        self._room = room
        self._places = places
        self.terms = terms
        self._skip_bad = skip_bad
        self.next_line = first
        self._added = added
        self._replaced = replaced
        self.tally = Tally()

    async def take(self, lines: Sequence[bytes | None]) -> None:
        """Store the next lines, None where one was too long. On return, they are written.

        Raises:
            Refused: at the first bad line, unless they are skipped, and where the file is for another nearhit. What was
                before it is stored.
            StorageError: nothing of these lines was stored; those taken before are.
        """
        read = await asyncio.to_thread(self._read, lines)
        bad = [(place, found) for place, found in enumerate(read) if isinstance(found, BadLine)]
        fatal = next((place for place, found in bad if not self._skip_bad or isinstance(found, OtherFormat)), None)
        if fatal is not None:
            read, bad = read[:fatal], [one for one in bad if one[0] <= fatal]
        await self._write([found for found in read if isinstance(found, Put)])
        # Counted once it is written: whoever has to send these lines again wants to know what became of those before.
        told = [Bad(self.next_line + place, str(found)) for place, found in bad]
        self._count(read, told)
        if fatal is not None:
            raise Refused(told[-1])

    def _read(self, lines: Sequence[bytes | None]) -> list[_Read]:
        return [self._read_one(line) for line in lines]

    def _read_one(self, line: bytes | None) -> _Read:
        if line is None:
            return BadLine(f"expected at most {self.terms.max_line_bytes} bytes")
        if not line or line.isspace():
            return None
        try:
            found = read_line(line, self.terms)
        except BadLine as error:
            return error
        return _bounded(found) if isinstance(found, Put) else found

    async def _write(self, puts: Sequence[Put]) -> None:
        fresh = [put for put in puts if put.entry.ends_ms > self.terms.now_ms]
        known = await self._store.stored([put.entry.key for put in fresh]) if fresh else {}
        wanted: dict[bytes, Put] = {}
        accepted = replaced = 0
        for put in fresh:
            key, stored_ms = put.entry.key, put.entry.stored_ms
            if known.get(key, -1) < stored_ms:
                accepted += 1
                replaced += key in known
                known[key] = stored_ms
                wanted[key] = put
        evicted = 0
        if wanted:
            self._added(list(wanted))
            evicted = await self._store.write(list(wanted.values()), self._room)
        if replaced:
            self._replaced()
        tally = self.tally
        tally.imported += accepted - replaced
        tally.replaced += replaced
        tally.known += len(fresh) - accepted
        tally.expired += len(puts) - len(fresh)
        tally.evicted += evicted
        tally.other_upstream += sum(all(place.misses(put.entry) for place in self._places) for put in wanted.values())

    def _count(self, read: Sequence[_Read], bad: Sequence[Bad]) -> None:
        tally = self.tally
        self.next_line += len(read)
        tally.lines += len(read)
        tally.bad_count += len(bad)
        tally.bad += bad[: _MOST_TOLD - len(tally.bad)]
        for found in read:
            if found is not None:
                tally.complete = isinstance(found, End) and found.entries == tally.entries
                tally.entries += isinstance(found, Put | BadLine)


def _bounded(put: Put) -> Put:
    if put.hits <= _MOST_HITS and put.entry.cost_ms <= _MOST_COST_MS:
        return put
    entry = replace(put.entry, cost_ms=min(put.entry.cost_ms, _MOST_COST_MS))
    return replace(put, entry=entry, hits=min(put.hits, _MOST_HITS))
