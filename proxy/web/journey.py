"""What becomes of one call on its way upstream."""

from __future__ import annotations

import time
from dataclasses import dataclass

from proxy.cache.trust import Ending


@dataclass(slots=True)
class Leak:
    """Whether the end of the last answer may come out at the start of the next: of servers that mix them up."""

    open: bool = False


class Journey:
    """What becomes of one call; see `proxy.cache.ports.Sending`."""

    __slots__ = ("_leak", "departed", "deserted", "sent", "tainted")

    def __init__(self, leak: Leak | None) -> None:
        """`leak` is where the server's answers may run into one another, None: they do not."""
        self._leak = leak
        self.sent = False
        self.tainted = False
        self.departed = 0.0
        self.deserted = False

    def depart(self) -> None:
        """The call is being sent: until it is known to have ended whole, its end may come out in the next."""
        self.sent, self.departed = True, time.perf_counter()
        if self._leak is not None:
            self.tainted, self._leak.open = self._leak.open, True

    def turned_away(self) -> None:
        """The server was busy, and has not begun."""
        self.sent = False
        if self._leak is not None:
            self._leak.open = self.tainted

    def wanted(self, *, wanted: bool) -> None:
        """See `Sending`."""
        self.deserted = not wanted

    def ended(self, ending: Ending) -> None:
        """See `Sending`."""
        if self._leak is not None and ending is Ending.WHOLE:
            self._leak.open = False
