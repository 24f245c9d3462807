"""Which leads are worth seeding: those that calls begin with again and again. Pure, bounded, cheap."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from proxy.upstream.prefix import Lead


@dataclass(slots=True)
class _Count:
    """Calls with one lead: `since` it was last found wanting, of `needed`; `lead` is kept once it is worth seeding."""

    needed: int
    since: int = 0
    calls: int = 0
    lead: Lead | None = None


class Learning:
    """Counts leads and remembers at most so many; those worth seeding are the last to be forgotten for others' sake."""

    def __init__(self, after: int, most: int) -> None:
        """A lead is worth seeding from its `after`th call on (0: none ever is); at most `most` leads are known."""
        self._after = after
        self._most = most
        self._seen: OrderedDict[bytes, _Count] = OrderedDict()
        self._worth: OrderedDict[bytes, _Count] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen) + len(self._worth)

    def __contains__(self, lead_id: bytes) -> bool:
        """Whether a lead is worth seeding."""
        return lead_id in self._worth

    def note(self, lead: Lead) -> bool:
        """Count a call; whether its lead is worth seeding now."""
        count = self._worth.get(lead.id)
        if count is not None:
            self._worth.move_to_end(lead.id)
            count.calls += 1
            return True
        if not (self._after and self._most):
            return False
        count = self._seen.pop(lead.id, None) or _Count(self._after)
        count.since += 1
        count.calls += 1
        worth = count.since >= count.needed
        # Until then, the digest alone is remembered: most prompts with a date in them are never seen again.
        count.lead = lead if worth else None
        (self._worth if worth else self._seen)[lead.id] = count
        self._bound()
        return worth

    def calls(self, lead_id: bytes) -> int:
        """The calls with a lead so far, 0 where it is not known."""
        count = self._worth.get(lead_id) or self._seen.get(lead_id)
        return count.calls if count is not None else 0

    def worth(self) -> list[Lead]:
        """The leads worth seeding, those with most calls first."""
        by_calls = sorted(self._worth.values(), key=lambda count: -count.calls)
        return [count.lead for count in by_calls if count.lead is not None]

    def demand_more(self, lead_id: bytes) -> None:
        """There was no room for what was seeded: twice as many calls as before make the lead worth seeding again.

        Where more leads are in use than there is room for, they would otherwise push each other out for ever, and each
        time a file of many megabytes is written.
        """
        count = self._worth.pop(lead_id, None)
        if count is not None:
            count.needed, count.since, count.lead = count.needed * 2, 0, None
            self._seen[lead_id] = count
            self._bound()

    def forget(self, lead_id: bytes) -> None:
        """As if the lead had never been seen."""
        self._worth.pop(lead_id, None)
        self._seen.pop(lead_id, None)

    def _bound(self) -> None:
        while len(self) > self._most:
            # A flood of leads that come once must not wash out those that come every minute.
            strangers = self._seen and (len(self._seen) > self._most // 2 or not self._worth)
            (self._seen if strangers else self._worth).popitem(last=False)
