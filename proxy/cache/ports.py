"""What this package needs of the outside, as narrow Protocols; `proxy.web.app` puts the real things in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from proxy.cache.near.tier import Nearest
from proxy.cache.policy import Drop
from proxy.cache.trust import Ending


class Incoming(Protocol):
    """An upstream's response whose head has arrived."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def reason(self) -> str:
        """Reason phrase, perhaps empty."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Header fields, names compared without case; repeated fields as sent."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it arrives.

        Raises:
            Exception: the upstream went away in the middle.
        """
        ...


Fetch = Callable[[], AbstractAsyncContextManager[Incoming]]
"""Sends the call upstream; leaving the context ends the exchange, whether or not the body was read."""


class Sending(Protocol):
    """One call on its way upstream, as those know it who send it. Nothing here waits or raises."""

    @property
    def sent(self) -> bool:
        """Whether the upstream may have begun to work on it: False while it waits for its turn.

        Only then a fetch whose readers have all left is worth going on with.
        """
        ...

    @property
    def departed(self) -> float:
        """When it was sent, by `time.perf_counter`; 0 where nobody knows. What was waited before costs no upstream."""
        ...

    @property
    def tainted(self) -> bool:
        """Whether the end of the answer before may stand in this one; asked once the fetch's context is left."""
        ...

    def wanted(self, *, wanted: bool) -> None:
        """Somebody waits for the answer, or nobody does any more: then it is not worth being sent again."""
        ...

    def ended(self, ending: Ending) -> None:
        """The answer has ended like this.

        Called once where the fetch's context was entered, before it is left: before another call can have its turn.
        Not called where no answer began. So a sender that believes the worst of each call from the moment that it is
        sent, and takes that back only at `Ending.WHOLE`, is never wrong.
        """
        ...


class Identity(Protocol):
    """What is known at a moment of the model behind the upstream."""

    @property
    def fingerprint(self) -> bytes | None:
        """Digest of what answers; None where it was never known."""
        ...

    @property
    def epoch(self) -> int:
        """Moves whenever the fingerprint may have changed."""
        ...

    @property
    def trusted(self) -> bool:
        """Whether stored answers of this fingerprint may be served now."""
        ...

    @property
    def away(self) -> bool:
        """Whether it did not answer when it was asked last, or said that it is loading."""
        ...

    @property
    def looked(self) -> bool:
        """Whether it was asked at all since nearhit started."""
        ...

    @property
    def confirmed(self) -> bool:
        """Whether the upstream answers and has shown this fingerprint since it was last in doubt."""
        ...


class Identities(Protocol):
    """Keeps track of the upstream's identity."""

    @property
    def current(self) -> Identity:
        """What is known now; never asks anybody."""
        ...

    def confirm(self) -> Awaitable[Identity]:
        """What is known after looking again, where looking is possible and tells anything."""
        ...


class Observer(Protocol):
    """Told of everything that is counted."""

    def stored(self) -> None:
        """An answer was kept."""
        ...

    def not_stored(self, reason: Drop) -> None:
        """An answer was relayed but not kept."""
        ...

    def fetched(self, seconds: float, ttft_seconds: float | None) -> None:
        """An upstream exchange ended; seconds in all, and to the first token where one came."""
        ...

    def looked_near(self, seconds: float, nearest: Nearest) -> None:
        """The near tier was asked, and this is what it came to."""
        ...

    def looked_up(self, seconds: float) -> None:
        """Storage was asked for an entry."""
        ...
