"""What runs behind the upstream, and how sure we are. `after` is the pure rule; `Tracker` looks and applies it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from proxy.upstream.adapter import Adapter, Loading, Locked, Probe, Seen, Sighting, Silent, Unidentified, Unreachable

log = logging.getLogger("nearhit.upstream")


class Standing(StrEnum):
    """How far the fingerprint can be relied on."""

    UNKNOWN = "unknown"
    """It was never seen."""
    CONFIRMED = "confirmed"
    """The server answers and shows it."""
    AWAY = "away"
    """The server does not answer; what it last showed goes on serving."""
    DOUBT = "doubt"
    """The server answers again and has not shown it yet: it may be another."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known at a moment; see `proxy.cache.ports.Identity`."""

    fingerprint: bytes | None = None
    instance: str = ""
    epoch: int = 0
    standing: Standing = Standing.UNKNOWN
    models: tuple[str, ...] = ()
    trouble: str = ""
    locked: bool = False
    """Only a caller with a key can make the upstream show what it runs."""

    @property
    def trusted(self) -> bool:
        """Whether stored answers of this fingerprint may be served."""
        return self.standing in (Standing.CONFIRMED, Standing.AWAY)

    @property
    def away(self) -> bool:
        """Whether the upstream does not answer."""
        return self.standing is Standing.AWAY

    @property
    def confirmed(self) -> bool:
        """Whether new answers may be stored under it."""
        return self.standing is Standing.CONFIRMED


def after(identity: Identity, sighting: Sighting) -> Identity:
    """What is known after a sighting."""
    match sighting:
        case Seen(fingerprint, instance, models):
            same = (fingerprint, instance) == (identity.fingerprint, identity.instance)
            moved = not same or not identity.confirmed
            return Identity(fingerprint, instance, identity.epoch + moved, Standing.CONFIRMED, models)
        case Unreachable():
            return _away(identity, "the upstream cannot be reached")
        case Silent():
            return identity
        case Loading():
            return _away(identity, "the upstream is loading its model")
        case Locked():
            # Without the caller's credential nothing new can be learned: what a caller's credential showed stays.
            why = "the upstream wants a key to show what it runs: set upstream.api_key"
            back = identity.standing is Standing.AWAY
            return replace(_doubt(identity) if back else identity, trouble=why, locked=True)
        case Unidentified():
            return replace(_doubt(identity), trouble="the upstream does not show what it runs: set upstream.epoch")
        case _:
            assert_never(sighting)


def answered(identity: Identity) -> Identity:
    """What is known after the upstream gave an ordinary answer: one that was away is back, and may be another."""
    return _doubt(identity) if identity.standing is Standing.AWAY else identity


def _away(identity: Identity, why: str) -> Identity:
    if identity.fingerprint is None:
        return replace(identity, trouble=why)
    moved = identity.standing is not Standing.AWAY
    return replace(identity, epoch=identity.epoch + moved, standing=Standing.AWAY, trouble=why)


def _doubt(identity: Identity) -> Identity:
    if identity.fingerprint is None:
        return identity
    moved = identity.standing is not Standing.DOUBT
    return replace(identity, epoch=identity.epoch + moved, standing=Standing.DOUBT)


Changed = Callable[[Identity], Awaitable[None]]
Connected = Callable[[], Awaitable[None]]


class Tracker:
    """Keeps `current` true by looking every `poll_s` seconds and whenever something is suspicious."""

    def __init__(
        self,
        adapter: Adapter,
        probe: Probe,
        known: bytes | None,
        *,
        changed: Changed,
        connected: Connected,
        poll_s: float,
    ) -> None:
        """`known` is the fingerprint confirmed in an earlier run.

        `changed` hears of each newly confirmed one, `connected` of each time the upstream begins to answer.
        """
        self.adapter = adapter
        self._probe = probe
        self._changed = changed
        self._connected = connected
        self._answering = False
        self._poll_s = poll_s
        standing = Standing.UNKNOWN if known is None else Standing.AWAY
        self.current = Identity(known, standing=standing, trouble="not asked yet")
        self.looked = asyncio.Event()
        self._suspicious = asyncio.Event()
        self._turn = asyncio.Lock()
        self._checks = 0
        self._told = True
        self._lent: asyncio.Task[Identity] | None = None

    def unreachable(self) -> None:
        """An exchange failed: perhaps the server restarts."""
        self._note(after(self.current, Unreachable()))
        self._suspicious.set()

    def answered(self) -> None:
        """An exchange succeeded."""
        if self.current.standing is Standing.AWAY:
            self._note(answered(self.current))
            self._suspicious.set()

    async def look(self, probe: Probe | None = None) -> Identity:
        """Look again; with a caller's credential where one is lent."""
        async with self._turn:
            sighting = await self.adapter.look(probe or self._probe)
            before = self.current
            now = after(before, sighting)
            # What a caller's key showed is no more open to ourselves than before.
            self._note(now if probe is None else replace(now, locked=before.locked))
            if self.current.confirmed and self.current.fingerprint != before.fingerprint:
                await self._changed(self.current)
            answering = isinstance(sighting, Seen | Locked | Unidentified)
            if answering and not self._answering:
                await self._connected()
            self._answering = answering or (self._answering and isinstance(sighting, Silent))
        self.looked.set()
        return self.current

    def look_soon(self, probe: Probe) -> None:
        """Look in the background with a caller's credential, unless such a look is under way."""
        if self._lent is None or self._lent.done():
            self._lent = asyncio.create_task(self.look(probe), name="nearhit-lent-look")

    async def confirm(self, probe: Probe | None = None) -> Identity:
        """What is known after making sure that the same run still answers.

        One request serves all who ask while it is waiting for its turn.
        """
        if not self.adapter.capabilities.tells_instances or not self.current.confirmed:
            return self.current
        wanted = self._checks + 1
        async with self._turn:
            if self._checks < wanted:
                self._checks += 1
                started = self.current
                same = await self.adapter.same_instance(probe or self._probe, started.instance)
                self._told = same is not None
                if same is False and self.current is started:
                    self._note(_doubt(started))
                    self._suspicious.set()
        # A server too busy to tell confirms nobody's answer, and what is known of it stays known.
        return self.current if self._told else _doubt(self.current)

    async def run(self) -> None:
        """Look again and again until cancelled."""
        try:
            await self._watch()
        finally:
            if self._lent is not None:
                self._lent.cancel()
                await asyncio.gather(self._lent, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await self.look()
            self._suspicious.clear()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._suspicious.wait()
                # Whoever restarts needs a moment; looking without a pause would only be in its way.
                await asyncio.sleep(min(0.2, self._poll_s))
            except TimeoutError:
                pass

    def _note(self, identity: Identity) -> None:
        before, self.current = self.current, identity
        if before.standing is not identity.standing or before.trouble != identity.trouble:
            level = logging.INFO if identity.confirmed else logging.WARNING
            log.log(level, "upstream is %s%s", identity.standing, f": {identity.trouble}" if identity.trouble else "")
