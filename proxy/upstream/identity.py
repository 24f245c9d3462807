"""What runs behind the upstream, and how sure we are. `after` is the pure rule; `Tracker` looks and applies it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import assert_never

from proxy.upstream.adapter import (
    NO_ROOM,
    Adapter,
    Loading,
    Locked,
    Probe,
    Room,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
)
from proxy.upstream.canary import Ask, Recognised, Recogniser, Vectors

log = logging.getLogger("nearhit.upstream")

CHECKING = "its model is being checked"
"""The trouble of one that answers and may be another."""


_ANXIOUS_S = 1.0
"""Between two looks at an upstream that does not answer; a refused connection costs next to nothing."""


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
    loaded: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    room: Room = NO_ROOM
    looked: bool = True
    """Whether it was asked at all in this run."""
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
        case Seen(fingerprint, instance, models, loaded, files, room=room):
            same = (fingerprint, instance) == (identity.fingerprint, identity.instance)
            moved = not same or not identity.confirmed
            epoch = identity.epoch + moved
            known = Identity(fingerprint, instance, epoch, Standing.CONFIRMED, models, loaded=loaded, files=files)
            return replace(known, room=room)
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
        case Unidentified(why):
            unseen = "the upstream does not show what it runs: set upstream.epoch"
            return replace(_doubt(identity), trouble=why or unseen)
        case _:
            assert_never(sighting)


def answered(identity: Identity) -> Identity:
    """What is known after the upstream gave an ordinary answer: one that was away is back, and may be another."""
    return _doubt(identity) if identity.standing is Standing.AWAY else identity


def suspected(identity: Identity) -> Identity:
    """What is known while it is being found out whether the same model still answers."""
    return replace(_doubt(identity), trouble=CHECKING)


def _away(identity: Identity, why: str) -> Identity:
    if identity.fingerprint is None:
        return replace(identity, trouble=why)
    moved = identity.standing is not Standing.AWAY
    return replace(identity, epoch=identity.epoch + moved, standing=Standing.AWAY, trouble=why, looked=True)


def _doubt(identity: Identity) -> Identity:
    if identity.fingerprint is None:
        return identity
    moved = identity.standing is not Standing.DOUBT
    return replace(identity, epoch=identity.epoch + moved, standing=Standing.DOUBT)


Changed = Callable[[Identity], Awaitable[None]]
Connected = Callable[[], Awaitable[None]]


class Tracker:
    """Keeps `current` true by looking every `poll_s` seconds and whenever something is suspicious.

    A look takes the lightest of requests. Where an upstream has a canary, that is asked at first sight, whenever
    another may have taken its place, and every `canary_s` seconds while it is idle.
    """

    def __init__(
        self,
        adapter: Adapter,
        probe: Probe,
        known: bytes | None,
        *,
        changed: Changed,
        connected: Connected,
        poll_s: float,
        canary_s: float = 3600.0,
        idle: Callable[[], bool] = lambda: True,
        vectors: Vectors | None = None,
        restarted: Callable[[], None] = lambda: None,
        label: str = "",
    ) -> None:
        """`known` is the fingerprint confirmed in an earlier run.

        `changed` hears of each newly confirmed one, `connected` of each time the upstream begins to answer. `restarted`
        is called when an upstream that was seen before answers and is another run or shows another identity, was away
        or has slept: whatever it held in memory may be gone. It is called before anything of it is confirmed.

        `canary_s` 0: the canary is never asked, and the fingerprint is of what the upstream shows alone. `idle` says
        whether the upstream works on nothing that we know of. What canaries said is kept in `vectors`. `label` tells
        several upstreams apart in the log.
        """
        self.adapter = adapter
        self._probe = probe
        self._poll_s = poll_s
        self._canary_s = canary_s
        self._idle = idle
        self._changed = changed
        self._connected = connected
        self._restarted = restarted
        self._label = label
        self._recogniser = Recogniser(vectors, idle)
        standing = Standing.UNKNOWN if known is None else Standing.AWAY
        self.current = Identity(known, standing=standing, trouble="not asked yet", looked=False)
        self.looked = asyncio.Event()
        self._seen: Seen | None = None
        self._passed: tuple[bytes, str] | None = None
        self._asked_at = 0.0
        self._woken = False
        self._was_away = False
        self._answering: type | None = None
        self._suspicious = asyncio.Event()
        self._turn = asyncio.Lock()
        self._checks = 0
        self._told = True
        self._lent: asyncio.Task[Identity] | None = None
        self._settling: asyncio.Task[Identity] | None = None
        self._in_vain = False

    def unreachable(self) -> None:
        """An exchange failed: perhaps the server restarts."""
        self._note(after(self.current, Unreachable()))
        self._answering = None
        self._suspicious.set()

    def answered(self) -> None:
        """An exchange succeeded."""
        if self.current.standing is Standing.AWAY:
            self._note(answered(self.current))
            self._suspicious.set()

    async def look(self, probe: Probe | None = None) -> Identity:
        """Look again; with a caller's credential where one is lent."""
        asked, lent = probe or self._probe, probe is not None
        async with self._turn:
            sighting = await self.adapter.look(asked)
            await self._greet(sighting)
            ask = self._canary(sighting)
            if ask is None:
                await self._learn(self._with_canary(sighting), lent=lent)
            elif isinstance(sighting, Seen) and not self._vouched(sighting):
                self._note(suspected(self.current))
        if isinstance(sighting, Seen) and ask is not None:
            # Nobody who confirms an answer waits for this: it may take a minute.
            await self._examine(sighting, ask, asked, lent=lent)
        self.looked.set()
        return self.current

    def _canary(self, sighting: Sighting) -> Ask | None:
        """How to ask what the upstream does not show; None where there is no reason to, or no way."""
        if not isinstance(sighting, Seen) or sighting.canary is None or not self._canary_s:
            return None
        if not self._vouched(sighting):
            return sighting.canary
        is_due = self._now() - self._asked_at >= self._canary_s and self._idle()
        return sighting.canary if not sighting.asleep and (self._woken or is_due) else None

    def _with_canary(self, sighting: Sighting) -> Sighting:
        """With what the canary told of it, where that still holds."""
        if not isinstance(sighting, Seen) or not self._vouched(sighting) or self.current.fingerprint is None:
            return sighting
        return replace(sighting, fingerprint=self.current.fingerprint)

    def _vouched(self, seen: Seen) -> bool:
        return self.current.confirmed and self._passed == (seen.fingerprint, seen.instance)

    async def _examine(self, seen: Seen, ask: Ask, probe: Probe, *, lent: bool) -> None:
        epoch = self.current.epoch
        self._asked_at, self._woken = self._now(), False

        def doubt() -> None:
            nonlocal epoch
            if self.current.epoch == epoch:
                self._note(suspected(self.current))
                epoch = self.current.epoch

        found = await self._recogniser.recognise(ask, probe, seen.fingerprint, doubt)
        async with self._turn:
            if self.current.epoch != epoch:
                # It went away meanwhile, or another took its place: whatever was found out is of the past.
                return
            if isinstance(found, Recognised):
                self._passed = (seen.fingerprint, seen.instance)
                await self._learn(replace(seen, fingerprint=found.fingerprint), lent=lent)
            else:
                await self._learn(found, lent=lent)

    async def _learn(self, sighting: Sighting, *, lent: bool) -> None:
        before = self.current
        now = after(before, sighting)
        # What a caller's key showed is no more open to ourselves than before.
        self._note(replace(now, locked=before.locked) if lent else now)
        if self.current.confirmed and self.current.fingerprint != before.fingerprint:
            await self._changed(self.current)

    async def _greet(self, sighting: Sighting) -> None:
        """Tell those who want to know that the upstream answers, or that it forgot what it held."""
        answering = isinstance(sighting, Seen | Locked | Unidentified)
        if isinstance(sighting, Seen):
            before, self._seen = self._seen, sighting
            if before is not None:
                woken = before.asleep and not sighting.asleep
                self._woken = self._woken or woken
                same = (before.fingerprint, before.instance) == (sighting.fingerprint, sighting.instance)
                self._was_away = self._was_away or woken or not same
        # Whoever shows another model, or none any more, may have other rules for whom it answers.
        may_be_another = self._was_away or self._answering is not type(sighting)
        if answering and self._was_away:
            self._was_away = False
            self._restarted()
        if answering and may_be_another:
            await self._connected()
        if answering:
            self._answering = type(sighting)
        elif not isinstance(sighting, Silent):
            self._answering = None

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def look_soon(self, probe: Probe) -> None:
        """Look in the background with a caller's credential, unless such a look is under way."""
        if self._lent is None or self._lent.done():
            self._lent = asyncio.create_task(self.look(probe), name="nearhit-lent-look")

    async def settle(self, within_s: float) -> Identity:
        """What is known once one that is away or in doubt was looked at again, or after so many seconds.

        One look serves all who ask meanwhile. Where waiting was in vain, nobody waits until it is confirmed again.
        """
        if self.current.standing in (Standing.AWAY, Standing.DOUBT) and not self._in_vain:
            if self._settling is None or self._settling.done():
                self._settling = asyncio.create_task(self.look(), name="nearhit-settling-look")
            await asyncio.wait([self._settling], timeout=within_s)
            self._in_vain = not self.current.confirmed
        return self.current

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
            mine = [task for task in (self._lent, self._settling) if task is not None]
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)

    @property
    def _pause_s(self) -> float:
        # As long as nobody has seen it come back, its calls go without cache and prefix.
        return self._poll_s if self._answering else min(self._poll_s, _ANXIOUS_S)

    async def _watch(self) -> None:
        while True:
            self._suspicious.clear()
            await self.look()
            if self.current.away:
                # Looking itself told us so.
                self._suspicious.clear()
            try:
                async with asyncio.timeout(self._pause_s):
                    await self._suspicious.wait()
                # Whoever restarts needs a moment; looking without a pause would only be in its way.
                await asyncio.sleep(min(0.2, self._poll_s))
            except TimeoutError:
                pass

    def _note(self, identity: Identity) -> None:
        before, self.current = self.current, identity
        self._in_vain = self._in_vain and not identity.confirmed
        self._was_away = self._was_away or (identity.away and not before.away)
        if before.standing is not identity.standing or before.trouble != identity.trouble:
            is_usual = identity.confirmed or identity.trouble == CHECKING
            level = logging.INFO if is_usual else logging.WARNING
            why = f": {identity.trouble}" if identity.trouble else ""
            log.log(level, "upstream%s is %s%s", self._label, identity.standing, why)
