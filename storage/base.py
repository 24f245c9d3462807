"""The contract of a storage engine: plain values, narrow Protocols, and the only errors that leave this package.

    StorageError
    ├── StorageUnavailable      for now: serve without it, try again later
    │   ├── StorageBusy             locked by another process beyond the waiting limit
    │   ├── StorageFull             no space, no permission to grow, read-only
    │   └── NotLocal                the file is on a network mount
    ├── StorageCorrupt          the data cannot be trusted: set it aside and begin anew
    └── StorageRefused          the start must stop and a person must decide
        ├── ForeignFile             the file is not ours
        └── SchemaTooNew            written by a newer nearhit

Every method is one atomic unit. Time is passed in, as milliseconds since the epoch; an engine has no clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_MOST_LOG_BYTES = 128 * 1024 * 1024


class StorageError(Exception):
    """Anything that storage may raise."""


class StorageUnavailable(StorageError):
    """The store cannot serve now; the caller treats it as a miss and may try again."""


class StorageBusy(StorageUnavailable):
    """Another process held the lock for longer than we wait."""


class StorageFull(StorageUnavailable):
    """Nothing can be written: the disk or quota is full, or the file system is read-only."""


class NotLocal(StorageUnavailable):
    """The file is on a network mount, where SQLite's locks and shared memory cannot be relied on."""


class StorageCorrupt(StorageError):
    """What was read cannot be trusted."""


class StorageRefused(StorageError):
    """The store must not be opened; the message tells a person what to do."""


class ForeignFile(StorageRefused):
    """The file exists and is not a nearhit database. It is never renamed or written."""


class SchemaTooNew(StorageRefused):
    """The database was written by a newer nearhit than this one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored answer.

    `key` and `space` are 32-byte digests; `namespace` is a digest, empty for the shared one; `fingerprint` is the
    upstream's identity when the answer was given. `cost_ms` is what the upstream took. `answer` is the dialect's own
    encoding, opaque here. `usage_known` says that `answer` carries token usage, or that its upstream never gives any.
    `near` says that it may be served for words that are nearly its own. `topic` is a digest (64 bits, signed) of
    namespace, model and system prompt. For `grace_ms` after it expired, it is still kept. `sealed` says that `answer`
    is encrypted.
    """

    key: bytes
    key_version: int
    namespace: bytes
    space: bytes
    upstream: str
    fingerprint: bytes
    endpoint: str
    model: str
    words: str | None
    stored_ms: int
    expires_ms: int
    cost_ms: int
    prompt_tokens: int | None
    completion_tokens: int | None
    usage_known: bool
    answer: bytes
    near: bool = False
    topic: int = 0
    grace_ms: int = 0
    sealed: bool = False

    @property
    def ends_ms(self) -> int:
        """When its grace has passed."""
        return self.expires_ms + self.grace_ms


@dataclass(frozen=True, slots=True)
class Sketch:
    """What the near tier finds an entry by.

    `scheme` names the parameters and the version of the normaliser that it was made with; `skeleton` is the normalised
    text. `keys` are the band keys, a set in any order; space and scheme are hashed into them. Numbers are signed, of
    64 bits. Words that can match nothing have a sketch without keys.
    """

    scheme: int
    skeleton: str
    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Add the entry, or replace the one of the same key (its hit count becomes `hits`, its sketch begins anew).

    The sketch is kept where the entry is near and has words, else ignored.
    """

    entry: Entry
    sketch: Sketch | None = None
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the entry of this key, if there is one."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Used:
    """The entry of this key was served `count` more times, last at `now_ms`."""

    key: bytes
    count: int
    now_ms: int


@dataclass(frozen=True, slots=True)
class Sketched:
    """The entry of this key has this sketch from now on, if there is such an entry, near and with words."""

    key: bytes
    sketch: Sketch


Change = Put | Delete | Used | Sketched


@dataclass(frozen=True, slots=True)
class Candidate:
    """An entry that has `shared` of the band keys asked for."""

    key: bytes
    words: str
    skeleton: str
    shared: int


@dataclass(frozen=True, slots=True)
class Unsketched:
    """An entry that waits for its sketch."""

    key: bytes
    space: bytes
    words: str


@dataclass(frozen=True, slots=True)
class Room:
    """What a store may grow to.

    `max_bytes` counts the files as they are on disk. Above a bound, entries that are not among the `top_k` worthiest of
    their topic that were asked for again go first.
    """

    max_entries: int
    max_bytes: int
    top_k: int

    @property
    def log_bytes(self) -> int:
        """How many bytes of it are kept for a write-ahead log: to change entries in many places writes whole pages."""
        return min(_MOST_LOG_BYTES, self.max_bytes // 3)

    @property
    def max_entry_bytes(self) -> int:
        """How large an entry may be: a transaction with it must fit into the log."""
        return self.max_bytes // 8


@dataclass(frozen=True, slots=True)
class Totals:
    """Size of a store: entries (expired ones that still wait for their sweep included), bytes on disk or in memory."""

    entries: int
    bytes: int


class Entries(Protocol):
    """Reads and writes of single entries."""

    async def get(self, key: bytes, now_ms: int) -> Entry | None:
        """The entry of this key whose grace has not passed at `now_ms`, else None: it may be stale."""
        ...

    async def write(self, changes: Sequence[Change], room: Room | None = None) -> int:
        """Apply all changes in order, or none of them; with `room`, it holds afterwards: returns how many went for it.

        Where far too much was stored already, a part of it stays for `Bounds.trim`.
        """
        ...


class Keys(Protocol):
    """The keys of a store, in the order in which they came."""

    async def keys_after(self, mark: int, limit: int) -> tuple[int, list[bytes]]:
        """At most `limit` keys that came after `mark` (0: the beginning), and the mark after the last of them.

        Raises:
            StorageUnavailable: also where the store was opened anew, so that an earlier mark means nothing.
        """
        ...


class Bounds(Protocol):
    """Upkeep in small steps."""

    async def leads(self) -> bool:
        """Whether the upkeep is this process's: of all that use a store at a time, it is one's."""
        ...

    async def expire(self, now_ms: int, limit: int) -> int:
        """Remove at most `limit` entries whose grace had passed at `now_ms`; how many there were."""
        ...

    async def trim(self, room: Room, limit: int) -> int:
        """Remove at most `limit` of the least worthy entries while a bound is exceeded; how many went."""
        ...

    async def give_back(self, limit: int) -> int:
        """Give free space back to the file system, at most `limit` bytes; how many bytes it was."""
        ...


class Shredding(Protocol):
    """Making sure that nothing is left of what was removed."""

    async def rewrite(self) -> None:
        """Write the whole store anew, without what was removed from it; takes seconds for a large one."""
        ...


class Coherence(Protocol):
    """What processes that share a store must know of each other."""

    async def replaced_elsewhere(self) -> bool:
        """Whether somebody else removed or replaced entries since this was last asked; True at first.

        Entries that went because they expired or a bound was exceeded do not count.
        """
        ...

    async def announce(self) -> None:
        """Make that answer True for everybody else: they may hold in memory what the store does not have any more."""
        ...


class Sketches(Protocol):
    """Entries found by the band keys of their sketches."""

    async def candidates(
        self, space: bytes, keys: Sequence[int], now_ms: int, *, per_key: int, limit: int
    ) -> list[Candidate]:
        """Near entries of this space, fresh at `now_ms`, that have one of the keys: at most `limit`, the best first.

        The more keys are shared the better, and the later written among equals. Only the `per_key` (at least 1) latest
        written of each key are looked at, whatever their space and freshness, so that no key is ever too common.
        """
        ...

    async def unsketched(self, scheme: int, limit: int) -> list[Unsketched]:
        """At most `limit` near entries with words that have no sketch, or one of another scheme than this."""
        ...

    async def record_scheme(self, scheme: int, description: str, now_ms: int) -> None:
        """Note what a scheme stands for, for people to read; a later description replaces an earlier one."""
        ...

    async def schemes(self) -> dict[int, str]:
        """The descriptions noted."""
        ...


class Vetoes(Protocol):
    """Pairs that must never match again, as digests of both sides."""

    async def vetoed(self, pairs: Sequence[bytes]) -> bool:
        """Whether one of the pairs is vetoed."""
        ...

    async def veto(self, pairs: Sequence[bytes], now_ms: int) -> None:
        """Veto all of these pairs for good, or raise; committed on return. Those that are vetoed already stay so."""
        ...


class Facts(Protocol):
    """What is known of an upstream between two runs, as short texts under names."""

    async def fact(self, upstream: str, name: str) -> str | None:
        """The noted value, or None."""
        ...

    async def note(self, upstream: str, name: str, value: str, now_ms: int) -> None:
        """Remember the value, replacing an earlier one."""
        ...


class Inspection(Protocol):
    """A look inside."""

    async def totals(self) -> Totals:
        """How much is stored."""
        ...

    async def problems(self) -> list[str]:
        """Every broken invariant, in words; empty when all is well. May take seconds on a large store."""
        ...

    async def lost(self) -> bool:
        """Whether the store was deleted or replaced under us, so that what we write reaches nobody."""
        ...
