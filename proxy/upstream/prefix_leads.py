"""Which leads are wanted on which model, and where each of them is kept: one table for each fingerprint."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from proxy.upstream.learning import Learning
from proxy.upstream.prefix import Kept, Lead, Prefixing, Style
from proxy.upstream.prefix_record import Record, name_beside
from proxy.upstream.prefix_shelf import Shelved, lead_of_record, source_of
from proxy.upstream.prefix_table import SLOW, Entry, Source, Table
from proxy.upstream.prefix_terms import Configured, PrefixTerms, Running

_HOUR_S = 3600.0
_UNUSED_S = 24 * _HOUR_S
"""After so long without a call, a learned lead that was never restored makes way for any other."""

log = logging.getLogger("nearhit.prefixes")

_TABLES = 8
"""Fingerprints remembered: servers that load one model after another come back to the same few."""


class Leads:
    """The leads of one upstream. `changed` is set whenever there may be something new to do."""

    def __init__(
        self,
        prefixing: Callable[[], Prefixing | None],
        running: Callable[[], Running | None],
        shelved: Shelved,
        configured: Sequence[Configured],
        terms: PrefixTerms,
        *,
        origin: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prefixing` and `running` as in `Surroundings`; `origin` is the server's URL, `clock` counts seconds."""
        self.changed = asyncio.Event()
        self.unwanted: asyncio.Queue[Kept] = asyncio.Queue()
        """What the server is to delete."""
        self._prefixing = prefixing
        self._running = running
        self._shelved = shelved
        self._configured = configured
        self._terms = terms
        self._origin = origin
        self._clock = clock
        self._learned_at: deque[float] = deque()
        self._learning = Learning(terms.learn_after, terms.max_known)
        self._tables: OrderedDict[bytes, Table] = OrderedDict()
        self._here: Table | None = None

    @property
    def style(self) -> Style:
        """How seeds are kept on this kind of server."""
        prefixing = self._prefixing()
        return Style.NONE if prefixing is None else prefixing.style

    def here(self) -> Table | None:
        """The table of what runs now; None where that is not known."""
        running = self._running()
        if running is None:
            return None
        table = self.at(running.fingerprint)
        self._populate(table, running)
        return table

    def at(self, fingerprint: bytes) -> Table:
        """The table of a fingerprint, which is what runs now."""
        if self._here is not None and self._here.fingerprint == fingerprint:
            return self._here
        table = self._tables.pop(fingerprint, None)
        if table is None:
            terms = self._terms
            table = Table(
                fingerprint,
                keeps_files=self._shelved.keeps_files,
                keeps_learned=terms.keeps_readable,
                retry_s=terms.retry_s,
            )
        else:
            # What was warm has made room for another model meanwhile; and leads were learned that it does not know.
            table.restarted()
            table.model = None
        self._tables[fingerprint] = table
        prefixing = self._prefixing()
        if self._here is not None and prefixing is not None:
            prefixing.reset()
        self._here = table
        self._adopt(table)
        running = self._running()
        if running is not None and running.fingerprint == fingerprint:
            self._populate(table, running)
        if len(self._tables) > _TABLES:
            self._tables.popitem(last=False)
        self.changed.set()
        return table

    def _adopt(self, table: Table) -> None:
        """Take over what earlier runs kept for this fingerprint."""
        for record in self._shelved.of(table.fingerprint):
            table.found_before(record.effective)
            lead = lead_of_record(record)
            entry = table.entries.get(lead.id if lead is not None else b"")
            if entry is None and lead is not None and record.source != "server":
                name = record.cache_name.removesuffix(name_beside("", self._origin))
                entry = table.entries[lead.id] = Entry(lead, name, record.model_name, source_of(record))
                entry.called_at = self._clock()
            if entry is not None and record.slow:
                entry.stopped = SLOW
            if entry is not None and not (entry.file or entry.warm or entry.refusals):
                entry.file, entry.tokens, entry.size = record.file, record.tokens, record.bytes
                entry.seconds, entry.restored = record.seconds, record.restored

    def _populate(self, table: Table, running: Running) -> None:
        """Want what is configured, was asked for, or was learned, as soon as it is known whose table it is."""
        if table.model is not None:
            return
        table.model = running.model
        for one in self._configured:
            if running.is_model(one.model):
                self._want(table, one.lead, one.name, running.model, Source.CONFIG)
        for record in sorted(self._shelved, key=lambda record: -record.modified_at):
            lead = lead_of_record(record) if record.source == "api" and running.is_model(record.model_name) else None
            if lead is not None:
                name = record.cache_name.removesuffix(name_beside("", self._origin))
                self._want(table, lead, name, running.model, Source.API)
        room = self._terms.max_unproved - len(_unproved(table))
        for lead in self._learning.worth()[: max(0, room)]:
            self._want(table, lead, _learned(lead), running.model, Source.LEARNED)

    def _want(self, table: Table, lead: Lead, name: str, model: str, source: Source) -> None:
        entry = table.entries.get(lead.id)
        if entry is None:
            table.entries[lead.id] = Entry(lead, name, model, source)
        elif source is Source.CONFIG and entry.source is not Source.CONFIG:
            entry.name, entry.model, entry.source = name, model, source

    def entry(self, table: Table, lead: Lead, *, learns: bool = True) -> Entry | None:
        """What is known of the lead of a call; None where it is nothing to us. With `learns`, the call counts."""
        entry = table.entries.get(lead.id)
        if not learns or (entry is not None and entry.source is not Source.LEARNED):
            return entry
        worth = self._learning.note(lead)
        if entry is None and worth and table.model is not None and self._has_room(table, lead):
            entry = table.entries[lead.id] = Entry(lead, _learned(lead), table.model, Source.LEARNED)
            self._bound(table)
            self.changed.set()
        if entry is not None:
            entry.called_at = self._clock()
        return entry

    def _has_room(self, table: Table, lead: Lead) -> bool:
        """Whether one more lead is learned: a clock in a prompt makes a new one each minute, each of many megabytes."""
        now = self._clock()
        while self._learned_at and self._learned_at[0] <= now - _HOUR_S:
            self._learned_at.popleft()
        if len(self._learned_at) >= self._terms.learn_per_hour:
            return False
        unproved = _unproved(table)
        if len(unproved) >= self._terms.max_unproved:
            oldest = min((one for one in unproved if not one.seeding), key=lambda one: one.called_at, default=None)
            if oldest is None or not self._gives_way(oldest, lead, now):
                return False
            self._discard(table, oldest)
            del table.entries[oldest.lead.id]
            self._learning.demand_more(oldest.lead.id)
        self._learned_at.append(now)
        return True

    def _gives_way(self, entry: Entry, lead: Lead, now: float) -> bool:
        more = self._learning.calls(lead.id) > self._learning.calls(entry.lead.id)
        return more or now - entry.called_at >= _UNUSED_S

    def _bound(self, table: Table) -> None:
        """No more learned leads than are known: those that were not used for longest go."""
        learned = [entry for entry in table if entry.source is Source.LEARNED and not entry.seeding]
        used = {entry.lead.id: self._shelved.used_at(table.fingerprint, entry) for entry in learned}
        for entry in learned:
            if not used[entry.lead.id] and entry.lead.id not in self._learning:
                self.remove(table, entry)
        kept = sorted((entry for entry in learned if used[entry.lead.id]), key=lambda entry: used[entry.lead.id])
        for entry in kept[: max(0, len(kept) - self._terms.max_known)]:
            self.remove(table, entry)

    def table(self, fingerprint: bytes | None) -> Table | None:
        """What is known of a fingerprint."""
        return self._tables.get(fingerprint) if fingerprint is not None else None

    def restarted(self) -> None:
        """The server was restarted, or may have been: what it held in memory is gone."""
        prefixing = self._prefixing()
        if prefixing is not None:
            prefixing.reset()
        if self._here is not None:
            self._here.restarted()
        self.changed.set()

    def drop(self, record: Record) -> None:
        """Delete a record with its files, whichever model it is of."""
        self._shelved.drop(record)
        self._gone_elsewhere(record)

    def refused(self, table: Table, entry: Entry) -> None:
        """The server cannot use the file of a lead."""
        log.info("the server refused the file of prefix %s", entry.name)
        table.file_refused(entry)
        self._shelved.drop_of(table.fingerprint, entry)
        self.changed.set()

    def too_slow(self, table: Table, entry: Entry) -> None:
        """Restoring a lead does not pay: its file goes."""
        log.info("restoring prefix %s takes longer than computing it", entry.name)
        self.unwanted.put_nowait(Kept(entry.drop_file(), entry.tokens))
        self._shelved.judge(table.fingerprint, entry, table.keeping_helps)

    def lost(self, record: Record, why: str) -> None:
        """A record and its file went to make room for others; a lead that was learned must be wanted more now."""
        table = self._here
        if table is None or record.fingerprint != table.fingerprint.hex():
            self._gone_elsewhere(record)
            return
        for entry in [entry for entry in table if entry.lead.id.hex() == record.lead]:
            self.crowded_out(table, entry, why)

    def _gone_elsewhere(self, record: Record) -> None:
        """Of a model that does not run: its table is made anew when it comes back."""
        for fingerprint, table in list(self._tables.items()):
            if fingerprint.hex() == record.fingerprint and table is not self._here:
                del self._tables[fingerprint]

    def crowded_out(self, table: Table, entry: Entry, why: str) -> None:
        """There is no room for a lead."""
        entry.drop_file()
        if entry.source is Source.LEARNED:
            self._learning.demand_more(entry.lead.id)
            del table.entries[entry.lead.id]
        else:
            entry.stopped = why

    def found_out(self, table: Table, known: bool | None) -> None:
        """Write down a new verdict; files that do not help go."""
        helps = table.keeping_helps
        if helps is known:
            return
        if helps is not None:
            log.info("keeping prefixes %s this model", "helps" if helps else "does not help")
        for entry in table:
            if helps is False and entry.file:
                self.unwanted.put_nowait(Kept(entry.drop_file(), entry.tokens))
            self._shelved.judge(table.fingerprint, entry, helps)
        self.changed.set()

    def remove(self, table: Table, entry: Entry) -> None:
        """Forget a lead; what is configured is wanted at once again."""
        self._discard(table, entry)
        del table.entries[entry.lead.id]
        self._learning.forget(entry.lead.id)
        if entry.source is Source.CONFIG:
            self._want(table, entry.lead, entry.name, entry.model, Source.CONFIG)
        if table.keeping_helps is False and not any(
            one.effective is False for one in self._shelved.of(table.fingerprint)
        ):
            table.reconsider()
        self.changed.set()

    def _discard(self, table: Table, entry: Entry) -> None:
        if entry.file:
            self.unwanted.put_nowait(Kept(entry.drop_file(), entry.tokens))
        self._shelved.drop_of(table.fingerprint, entry)

    def is_needed(self, file: str) -> bool:
        """Whether the server keeps, or is about to keep, something wanted under this name."""
        for table in self._tables.values():
            for entry in table:
                made = entry.seeding and self._shelved.file_for(table.fingerprint, entry, self.style, {}) == file
                if made or entry.file == file:
                    return True
        return False


def _unproved(table: Table) -> list[Entry]:
    """What was learned, and no call has had restored."""
    return [one for one in table if one.source is Source.LEARNED and not one.restored and not one.stopped]


def _learned(lead: Lead) -> str:
    return f"learned-{lead.id.hex()[:12]}"
