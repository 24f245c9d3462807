"""Learns, seeds, keeps, restores and judges the prefixes of one upstream, whatever kind of server it is."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import assert_never

from proxy.upstream.adapter import Probe
from proxy.upstream.lane import Preempted
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Prefixing, Readied, Ready, Seeded, Style
from proxy.upstream.prefix_leads import Leads
from proxy.upstream.prefix_record import Record
from proxy.upstream.prefix_shelf import Shelved
from proxy.upstream.prefix_table import NOT_KEPT, NOT_RELEASED, Aim, Entry, Job, Source, State, Table, Work
from proxy.upstream.prefix_terms import Configured, NotRunning, PrefixRefused, PrefixTerms, Surroundings
from proxy.upstream.prefix_view import Row, readiness, row_of, rows_of
from proxy.upstream.seeding import Outcome, Pending, Proof, Seeder, TooLong, background

log = logging.getLogger("nearhit.prefixes")

_NOTHING = Ready(Readied.NOTHING)
_FLUSH_S = 60.0
_LOOK_S = 1.0
"""How often to look whether the server runs something else by now."""

NO_ROOM = "there is no room for it: raise prefixes.max_bytes"
NO_NAME = "there is no file name left for it: raise prefixes.ring"
TOO_LARGE = "its file alone is larger than prefixes.max_bytes"


@dataclass(frozen=True, slots=True)
class Created:
    """What came of a prefix that somebody asked for; `hitch` None: it is seeded, which took `seconds`."""

    row: Row
    seconds: float
    hitch: Hitch | None


class PrefixCache:
    """The prefixes of one upstream; open it with `running_prefixes`."""

    def __init__(
        self,
        surroundings: Surroundings,
        terms: PrefixTerms,
        configured: Sequence[Configured] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`clock` counts seconds; `now` is the time, in seconds since 1970."""
        self._with = surroundings
        self._terms = terms
        self._configured = tuple(configured)
        self._clock = clock
        self._shelved = Shelved(surroundings.keeping, now)
        self._leads = Leads(
            surroundings.prefixing,
            surroundings.running,
            self._shelved,
            self._configured,
            terms,
            origin=surroundings.keeping.origin,
            clock=clock,
        )
        self.changed = self._leads.changed
        self._restoring: Counter[str] = Counter()
        self._began = clock()
        self._ready: str | None = None
        self.seeder = Seeder(
            self, surroundings.quiet, surroundings.probe, surroundings.observer, timeout_s=terms.seed_timeout_s
        )

    async def load(self) -> None:
        """Read what earlier runs kept; what may not be kept any more goes."""
        await self._shelved.load()
        for record in self._shelved if not self._terms.keeps_readable else ():
            if record.source == Source.LEARNED.value:
                self._shelved.drop(record)
        self._began = self._clock()

    async def close(self) -> None:
        """Finish writing; idempotent."""
        await self._shelved.close()

    def keeps(self, lead: Lead | None, fingerprint: bytes | None) -> bool:
        """Whether something could be restored for a call with this lead, if the upstream is what it was."""
        table = self._leads.table(fingerprint)
        entry = table.entries.get(lead.id) if table is not None and lead is not None else None
        return table is not None and table.usable(entry, self._leads.style) is not None

    def wants(self, lead: Lead | None, fingerprint: bytes | None) -> bool:
        """Whether somebody named or used this lead before: it is known here."""
        table = self._leads.table(fingerprint)
        return table is not None and lead is not None and lead.id in table.entries

    async def before(
        self, probe: Probe, lead: Lead | None, fingerprint: bytes | None, instance: str = "", *, learns: bool = True
    ) -> Ready:
        """Prepare the server for a call that is sent next; bounded in time, and never raises.

        `probe` asks with the credential to use for the call; `lead` None: it has none; `fingerprint` None: unknown.
        `instance` is the run of the server that is known to have that fingerprint, empty where runs are not told apart.
        Without `learns`, nothing of the call is remembered.
        """
        prefixing = self._with.prefixing()
        if prefixing is None or prefixing.style is Style.NONE:
            return _NOTHING
        entry, kept = None, None
        if fingerprint is not None:
            table = self._leads.at(fingerprint)
            entry = self._leads.entry(table, lead, learns=learns) if lead is not None else None
            table.called(entry)
            kept = table.usable(entry, prefixing.style, instance)
            if lead is not None and entry is not None and kept is not None:
                return await self._restored(prefixing, probe, lead, table, entry, kept)
        return await self._readied(prefixing, probe, lead, None)

    async def after(
        self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence, fingerprint: bytes | None
    ) -> None:
        """Learn from the reply to a call that `before` was told of; never raises."""
        prefixing = self._with.prefixing()
        if prefixing is None or prefixing.style is Style.NONE:
            return
        try:
            async with asyncio.timeout(self._terms.restore_timeout_s):
                await prefixing.landed(probe, lead, ready, evidence)
        except Exception as error:  # noqa: BLE001 - the client has its answer; it is not for this to spoil
            log.warning("nothing was learned from a reply (%s)", type(error).__name__)
        table = self._leads.table(fingerprint)
        entry = table.entries.get(lead.id) if table is not None and lead is not None else None
        if table is not None and entry is not None:
            self._judge(table, entry, ready, evidence, prefixing.style)

    def restarted(self) -> None:
        """The server was restarted, or may have been: what it held in memory is gone, its files are not."""
        self._leads.restarted()

    def readiness(self) -> tuple[bool, str]:
        """Whether what is configured was seeded, or is not waited for; and how it is, in words. True latches."""
        if self._ready is not None:
            return True, self._ready
        here = self._leads.here()
        left_s = self._terms.ready_timeout_s - (self._clock() - self._began)
        ready, reason = readiness(self._configured, self._with.running(), here, self._leads.style, left_s)
        if ready:
            self._ready = reason
        return ready, reason

    def listing(self) -> list[Row]:
        """All prefixes, those kept for other models included, by model and name."""
        return rows_of(self._shelved, self._configured, self._with.running(), self._leads.here(), self._leads.style)

    async def create(self, name: str, lead: Lead, model: str = "") -> Created:
        """Have a prefix seeded now, under this name; one of the same name or the same text is replaced.

        Waits for calls that are under way. Where it does not succeed now, it is tried again when the server is idle.

        Raises:
            NotRunning: the upstream does not run this model.
            PrefixRefused: the name or the text is a configured prefix's, or this kind of server cannot be seeded.
        """
        running, table = self._with.running(), self._leads.here()
        if running is None or table is None:
            raise NotRunning("the upstream does not show what it runs")
        if not running.is_model(model):
            raise NotRunning(f"model {model!r} is not loaded; {running.model!r} is")
        prefixing = self._with.prefixing()
        if prefixing is None or prefixing.style is Style.NONE:
            raise PrefixRefused("this kind of server cannot be seeded")
        self._make_way(table, name, lead)
        entry = table.entries[lead.id] = Entry(lead, name, running.model, Source.API)
        pending = self._pending(Job(Work.SEED, entry), table, prefixing)
        if pending is None:
            self._leads.remove(table, entry)
            raise PrefixRefused(NO_NAME)
        # Not for the background to do as well.
        entry.seeding = True
        try:
            outcome = await self.seeder.now(pending)
        finally:
            entry.seeding = False
        return _created(row_of(entry, self._shelved.find(table.fingerprint, entry), table, prefixing.style), outcome)

    async def remove(self, name: str, model: str) -> bool:
        """Delete a prefix with its files; whether there was one. A configured one is seeded anew when there is time."""
        here = self._leads.here()
        records = [one for one in self._shelved if (one.cache_name, one.model_name) == (name, model)]
        entries = []
        if here is not None:
            entries = [entry for entry in here if (entry.name, entry.model) == (name, model)]
            for entry in entries:
                self._leads.remove(here, entry)
        for record in records:
            self._leads.drop(record)
        await self._shelved.settled()
        return bool(entries or records)

    def pending(self) -> Pending | None:
        """What is most worth doing now."""
        prefixing, table = self._with.prefixing(), self._leads.here()
        if prefixing is None or table is None:
            return None
        while (job := table.next_job(prefixing.style, self._clock())) is not None:
            pending = self._pending(job, table, prefixing)
            if pending is not None:
                return pending
            self._leads.crowded_out(table, job.entry, NO_NAME)
        return None

    def pause_s(self) -> float:
        """Seconds until there may be something to do."""
        table = self._leads.here()
        next_at = table.next_at(self._leads.style) if table is not None else None
        return _LOOK_S if next_at is None else min(_LOOK_S, max(0.0, next_at - self._clock()))

    async def done(self, pending: Pending, outcome: Outcome) -> None:
        """Take note of what came of a job."""
        table, entry, now = self._leads.here(), pending.job.entry, self._clock()
        if table is None or table.entries.get(entry.lead.id) is not entry:
            # It was removed meanwhile, or computed by another model.
            self._throw_away(outcome)
            return
        if self._is_in_doubt(pending, outcome):
            self._throw_away(outcome)
            table.in_doubt(entry, now)
            return
        known, style = table.keeping_helps, pending.prefixing.style
        match outcome:
            case Seeded(seconds=seconds):
                self._with.observer.seeded(seconds)
                table.seeded(entry, outcome, style, now, pending.unkept or NOT_KEPT)
                await self._keep(table, entry, outcome.digest)
            case Hitch():
                self._with.observer.seed_failed(outcome)
                table.failed(entry, outcome, now)
            case TooLong(seconds):
                self._with.observer.seed_failed(Hitch.BUSY)
                table.took_too_long(entry, seconds, now)
            case Preempted():
                table.preempted(entry, now)
            case Proof(effect):
                table.proved(entry, style, effect, now)
            case _:
                assert_never(outcome)
        self._leads.found_out(table, known)

    async def settled(self) -> None:
        """Wait until the disk is as it should be."""
        await self._shelved.settled()

    async def prepared(self, pending: Pending) -> Pending | None:
        """The job as it is done now: no record names its file any more, whatever comes of it."""
        await self._shelved.settled()
        running, table, entry = self._with.running(), self._leads.here(), pending.job.entry
        if running is None or table is None or table.entries.get(entry.lead.id) is not entry:
            return None
        pending = replace(pending, run=running.run)
        if not pending.file:
            return pending
        mine = (table.fingerprint.hex(), entry.lead.id.hex())
        owners = [one for one in self._shelved.naming(pending.file) if (one.fingerprint, one.lead) != mine]
        for owner in owners:
            self._leads.lost(owner, NO_NAME)
        released = await self._shelved.release(pending.file)
        for owner in owners:
            # What somebody asked for is wanted again as soon as its model is back.
            if owner.source == Source.LEARNED.value:
                self._shelved.drop(owner)
        return pending if released else replace(pending, file="", unkept=NOT_RELEASED)

    async def tidy(self) -> None:
        """Have the server delete what is of no use, and write down what was used, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_FLUSH_S):
                    kept = await self._leads.unwanted.get()
            except TimeoutError:
                await self._shelved.flush()
                continue
            prefixing = self._with.prefixing()
            if prefixing is None or self._leads.is_needed(kept.file):
                continue
            try:
                await prefixing.forget(self._with.probe, kept)
            except Exception as error:  # noqa: BLE001 - what stays on the server is no reason to stop
                log.warning("the server did not delete a prefix (%s)", type(error).__name__)

    async def _restored(
        self, prefixing: Prefixing, probe: Probe, lead: Lead, table: Table, entry: Entry, kept: Kept
    ) -> Ready:
        self._restoring[kept.file] += 1
        try:
            # Not the entry's lead: only the call's tells whether it goes on with a conversation.
            ready = await self._readied(prefixing, probe, lead, kept)
        finally:
            self._restoring[kept.file] -= 1
            if not self._restoring[kept.file]:
                del self._restoring[kept.file]
        self._with.observer.restored(ready.how)
        if ready.how in (Readied.RESTORED, Readied.NAMED):
            self._with.observer.load_seconds(ready.seconds)
        if entry.file == kept.file and table.restore_took(entry, ready, self._terms.restore_timeout_s):
            self._leads.too_slow(table, entry)
        elif ready.how is Readied.REFUSED and entry.file == kept.file:
            self._leads.refused(table, entry)
        elif ready.how not in (Readied.REFUSED, Readied.SKIPPED, Readied.NOTHING):
            self._shelved.touch(table.fingerprint, entry)
        return ready

    async def _readied(self, prefixing: Prefixing, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        try:
            async with asyncio.timeout(self._terms.restore_timeout_s):
                return await prefixing.ready(probe, lead, kept)
        except TimeoutError:
            return Ready(Readied.SKIPPED, self._terms.restore_timeout_s)
        except Exception as error:  # noqa: BLE001 - whatever a server answers must not cost the client its answer
            log.warning("preparing a call failed (%s)", type(error).__name__)
            return Ready(Readied.SKIPPED)

    def _judge(self, table: Table, entry: Entry, ready: Ready, evidence: Evidence, style: Style) -> None:
        known, restored = table.keeping_helps, entry.restored
        tokens = table.answered(entry, ready, evidence, style)
        if entry.restored and not restored:
            self._shelved.judge(table.fingerprint, entry, known)
        if tokens:
            self._with.observer.reused(tokens)
        self._leads.found_out(table, known)
        if table.todo(entry, style) is not None:
            self._leads.changed.set()

    def _is_in_doubt(self, pending: Pending, outcome: Outcome) -> bool:
        """Whether another run may have computed it, with other weights, than the one that is confirmed."""
        running = self._with.running()
        if not isinstance(outcome, Seeded | Proof):
            return False
        if running is None or running.run != pending.run:
            return True
        told = outcome.instance if isinstance(outcome, Seeded) else ""
        return bool(told and running.instance) and told != running.instance

    def _throw_away(self, outcome: Outcome) -> None:
        if isinstance(outcome, Seeded) and outcome.file:
            self._leads.unwanted.put_nowait(Kept(outcome.file, outcome.tokens))

    def _make_way(self, table: Table, name: str, lead: Lead) -> None:
        """Remove what has the name, or is the same text."""
        same = [entry for entry in table if entry.name == name or entry.lead.id == lead.id]
        for entry in same:
            if entry.source is Source.CONFIG:
                raise PrefixRefused(f"{entry.name!r} is configured: change its file and restart nearhit")
        for entry in same:
            self._leads.remove(table, entry)

    def _pending(self, job: Job, table: Table, prefixing: Prefixing) -> Pending | None:
        """The job with all that it takes; None where the server has no name left to keep it under."""
        keeps = job.work is Work.SEED and table.aim(job.entry, prefixing.style) is Aim.KEPT
        stays = self._staying(table, job.entry)
        held = {record.file: math.inf for record in self._shelved if stays(record)}
        file = self._shelved.file_for(table.fingerprint, job.entry, prefixing.style, held) if keeps else ""
        urgent = prefixing.cancels or (job.entry.source is Source.CONFIG and self._ready is None)
        idle_s = self._terms.soon_s if urgent else self._terms.seed_idle_s
        return Pending(job, prefixing, file, idle_s) if file or not keeps else None

    def _staying(self, table: Table, entry: Entry) -> Callable[[Record], bool]:
        """Which files must not make room for an entry's: those being restored, and those that somebody asked for."""
        asked = {other.lead.id.hex() for other in table if other.source is not Source.LEARNED and other is not entry}
        here = table.fingerprint.hex()
        return lambda record: record.file in self._restoring or (record.fingerprint == here and record.lead in asked)

    async def _keep(self, table: Table, entry: Entry, digest: bytes) -> None:
        """Write down what was seeded, and make room for it."""
        if entry.source is Source.LEARNED and not self._terms.keeps_readable:
            return
        record = await self._shelved.keep(table.fingerprint, entry, digest, table.keeping_helps)
        entry.size = record.bytes
        if self._shelved.is_too_large(record):
            self._shelved.drop(record)
            entry.drop_file()
            entry.stopped = TOO_LARGE
        for gone in await self._shelved.prune(self._staying(table, entry)):
            self._leads.lost(gone, NO_ROOM)


def _created(row: Row, outcome: Outcome) -> Created:
    match outcome:
        case Seeded(seconds=seconds):
            return Created(row, seconds, Hitch.REFUSED if row.state == State.FAILED else None)
        case Hitch():
            return Created(row, 0.0, outcome)
        case TooLong() | Preempted() | Proof():
            return Created(row, 0.0, Hitch.BUSY)
        case _:
            assert_never(outcome)


@asynccontextmanager
async def running_prefixes(cache: PrefixCache) -> AsyncIterator[PrefixCache]:
    """Load what is kept, and seed in the background for the life of this block."""
    try:
        await cache.load()
        async with background(cache.seeder.run, "nearhit-seeding"), background(cache.tidy, "nearhit-prefixes"):
            yield cache
    finally:
        await cache.close()
