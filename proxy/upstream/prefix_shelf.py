"""What is on disk of one upstream's prefixes, mirrored in memory: reading is free, writing happens behind, in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from proxy.upstream.prefix import Lead, Style
from proxy.upstream.prefix_files import PrefixFilesError
from proxy.upstream.prefix_record import Record, Ring, ServerNames, name_beside
from proxy.upstream.prefix_table import SLOW, Entry, Source

log = logging.getLogger("nearhit.prefixes")

_APPEARS_S = 2.0

T = TypeVar("T")


class Shelf(Protocol):
    """Where records are kept; see `proxy.upstream.prefix_files.PrefixFiles`. All but `touch` block."""

    def own(self) -> bool:
        """Whether names that are used again and again are this process's."""
        ...

    def close(self) -> None:
        """Let others have them."""
        ...

    def load(self) -> list[Record]:
        """All records."""
        ...

    def release(self, file: str) -> None:
        """See that no record names a file any more."""
        ...

    def keep(self, record: Record) -> Record:
        """Write a record; as it is kept then."""
        ...

    def touch(self, record: Record, used_at: float) -> None:
        """Remember when it was used."""
        ...

    def flush(self) -> None:
        """Write what was remembered."""
        ...

    def remove(self, record: Record) -> bool:
        """Delete a record and its files."""
        ...

    def prune(self, keep: Callable[[Record], bool] | None = None) -> list[Record]:
        """Delete what is too much; what went."""
        ...

    def appeared(self, file: str, within_s: float = 1.0) -> bool:
        """Whether a file that the server saved can be seen."""
        ...


@dataclass(frozen=True, slots=True)
class Keeping:
    """How one upstream's prefixes are kept: `origin` is its URL.

    `sees_files`: the server's files can be seen, and are bounded by `max_bytes`; elsewhere `ring` names are used again
    and again, 0: none, so that no files are kept.
    """

    shelf: Shelf
    names: ServerNames
    origin: str
    sees_files: bool
    max_bytes: int
    ring: int


class Shelved:
    """The records of one upstream, by fingerprint and lead."""

    def __init__(self, keeping: Keeping, now: Callable[[], float]) -> None:
        """`now` is the time, in seconds since 1970."""
        self._keeping = keeping
        self._now = now
        self._ring = Ring(keeping.ring, keeping.names, keeping.origin)
        self._unseen = not keeping.sees_files
        self._owns: bool | None = None
        self._read = False
        self._closed = False
        self._records: dict[tuple[str, str], Record] = {}
        # One thread does it all, so that what is written last stays.
        self._hands = ThreadPoolExecutor(1, thread_name_prefix="nearhit-prefixes")

    async def load(self) -> None:
        """Read what is there; where that fails, nothing is."""
        if self._unseen and self._keeping.ring:
            await self._own()
        mine = ("", self._keeping.origin)
        read = await self._do(self._keeping.shelf.load, None)
        self._read = read is not None
        for record in read or ():
            known = self._records.get((record.fingerprint, record.lead))
            if record.upstream in mine and (known is None or known.modified_at < record.modified_at):
                self._records[record.fingerprint, record.lead] = record

    async def _own(self) -> None:
        self._owns = await self._do(self._keeping.shelf.own, otherwise=False)
        if not self._owns:
            log.warning("another process keeps prefixes of this upstream on the server: here they are computed only")

    @property
    def keeps_files(self) -> bool:
        """Whether the server may save files: what was saved under a name before must be known."""
        if self._unseen:
            return self._keeping.ring > 0 and self._read and bool(self._owns)
        return self._keeping.sees_files

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def of(self, fingerprint: bytes) -> list[Record]:
        """All of one fingerprint."""
        return [record for record in self if record.fingerprint == fingerprint.hex()]

    def find(self, fingerprint: bytes, entry: Entry) -> Record | None:
        """The record of a lead."""
        return self._records.get((fingerprint.hex(), entry.lead.id.hex()))

    def used_at(self, fingerprint: bytes, entry: Entry) -> float:
        """When a lead was last used; 0 where it was not kept."""
        record = self.find(fingerprint, entry)
        return record.used_at if record is not None else 0.0

    def is_too_large(self, record: Record) -> bool:
        """Whether a file alone is more than may be kept."""
        return not self._unseen and record.bytes > self._keeping.max_bytes

    def file_for(self, fingerprint: bytes, entry: Entry, style: Style, in_use: Mapping[str, float]) -> str:
        """The name under which the server shall keep a prefix; empty where there is none left.

        In a ring, the name that was used longest ago, by the time of use `in_use` of names that must not be lost.
        """
        name = self._keeping.names.of(fingerprint, entry.lead.id)
        if style is Style.NAMED:
            return f"nearhit-{name[:24]}"
        if not self._unseen:
            return name
        if not self.keeps_files:
            return ""
        times = {record.file: record.used_at for record in self if record.file} | dict(in_use)
        free = [file for file in self._ring.files if times.get(file, 0.0) != float("inf")]
        return self._ring.take(times) if free else ""

    def naming(self, file: str) -> list[Record]:
        """Whose file it is, whatever model or lead that may be of."""
        return [record for record in self if record.file == file]

    async def release(self, file: str) -> bool:
        """See that no record names a file, before the server overwrites it; False where the disk refuses."""
        for record in self.naming(file):
            self._records[record.fingerprint, record.lead] = replace(record, file="", bytes=0)

        def released() -> bool:
            self._keeping.shelf.release(file)
            return True

        return await self._do(released, otherwise=False)

    async def keep(self, fingerprint: bytes, entry: Entry, digest: bytes, effective: bool | None) -> Record:
        """Write down a lead that was seeded just now; the record, with the size that its file has on disk."""
        now, old = self._now(), self.find(fingerprint, entry)
        record = Record(
            cache_name=entry.name,
            model_name=entry.model or "default",
            created_at=old.created_at if old is not None else now,
            modified_at=now,
            used_at=now,
            content_length=entry.lead.chars,
            source=entry.source.value,
            tokens=entry.tokens,
            bytes=entry.size,
            fingerprint=fingerprint.hex(),
            upstream=self._keeping.origin,
            lead=entry.lead.id.hex(),
            digest=digest.hex(),
            file=entry.file,
            effective=effective,
            seconds=entry.seconds,
            restored=entry.restored,
            body=dict(entry.lead.body),
        )
        await self._put_aside(record)
        kept = await self._do(lambda: self._keeping.shelf.keep(record), record)
        self._records[kept.fingerprint, kept.lead] = kept
        if entry.file.endswith(".kv") and not self._unseen:
            await self._see(kept.file)
        return kept

    async def _put_aside(self, record: Record) -> None:
        """Another model's prefix of the same names gets another name: that model may come back."""
        names = (record.cache_name, name_beside(record.cache_name, self._keeping.origin))
        for old in [one for one in self if one.model_name == record.model_name and one.cache_name in names]:
            if old.lead == record.lead and old.fingerprint == record.fingerprint:
                continue
            if old.file and old.fingerprint != record.fingerprint and old.file != record.file:
                aside = replace(old, cache_name=f"{old.cache_name}-{old.fingerprint[:8]}")
                keep = partial(self._keeping.shelf.keep, aside)
                self._records[old.fingerprint, old.lead] = await self._do(keep, aside)
            else:
                self._records.pop((old.fingerprint, old.lead), None)

    async def _see(self, file: str) -> None:
        if not await self._do(lambda: self._keeping.shelf.appeared(file, _APPEARS_S), True):
            log.warning(
                "the server's files do not appear in upstream.slot_dir: a fixed number of names is used instead"
            )
            self._unseen = True
            if self._keeping.ring:
                await self._own()

    def touch(self, fingerprint: bytes, entry: Entry) -> None:
        """A prefix was used."""
        record = self.find(fingerprint, entry)
        if record is not None:
            now = self._now()
            self._records[record.fingerprint, record.lead] = replace(record, used_at=now)
            self._keeping.shelf.touch(record, now)

    def judge(self, fingerprint: bytes, entry: Entry, effective: bool | None) -> None:
        """Write down whether it helps, whether it was restored, and whether it still has a file."""
        record = self.find(fingerprint, entry)
        if record is None:
            return
        size = record.bytes if entry.file else 0
        judged = replace(
            record,
            effective=effective,
            file=entry.file,
            bytes=size,
            modified_at=self._now(),
            slow=entry.stopped == SLOW,
            restored=entry.restored,
        )
        self._records[record.fingerprint, record.lead] = judged
        self._behind(lambda: self._keeping.shelf.keep(judged))

    def drop(self, record: Record) -> None:
        """Delete a record with its files."""
        if self._records.pop((record.fingerprint, record.lead), None) is not None:
            self._behind(lambda: self._keeping.shelf.remove(record))

    def drop_of(self, fingerprint: bytes, entry: Entry) -> None:
        """Delete the record of a lead, if there is one."""
        record = self.find(fingerprint, entry)
        if record is not None:
            self.drop(record)

    async def prune(self, keep: Callable[[Record], bool]) -> Sequence[Record]:
        """Delete what is too much, the least recently used first, and never what `keep` says; what went."""
        gone = await self._do(lambda: self._keeping.shelf.prune(keep), list[Record]())
        for record in gone:
            self._records.pop((record.fingerprint, record.lead), None)
        return gone

    async def flush(self) -> None:
        """Write down what was used."""
        await self._do(self._keeping.shelf.flush, None)

    async def settled(self) -> None:
        """Wait until all is written."""
        await self._do(lambda: None, None)

    async def close(self) -> None:
        """Write everything; idempotent."""
        if not self._closed:
            self._closed = True
            await self.flush()
            await self._do(self._keeping.shelf.close, None)
            await asyncio.to_thread(self._hands.shutdown)

    def _behind(self, work: Callable[[], object]) -> None:
        if not self._closed:
            self._hands.submit(work).add_done_callback(_told)

    async def _do(self, work: Callable[[], T], otherwise: T) -> T:
        """Do it after all that is waiting; what to return where the disk fails."""
        try:
            return await asyncio.wrap_future(self._hands.submit(work))
        except PrefixFilesError as error:
            log.warning("%s", error)
            return otherwise


def lead_of_record(record: Record) -> Lead | None:
    """The lead that a record was made of; None where people have changed it."""
    try:
        lead_id = bytes.fromhex(record.lead)
    except ValueError:
        return None
    return Lead(lead_id, record.body, record.content_length) if record.body is not None and len(lead_id) == 32 else None


def source_of(record: Record) -> Source:
    """Why a prefix is wanted whose record is all that there is: configured ones are known from the configuration."""
    return Source.API if record.source == "api" else Source.LEARNED


def _told(done: Future[object]) -> None:
    error = done.exception()
    if error is not None:
        log.warning("%s", error if isinstance(error, PrefixFilesError) else type(error).__name__)
