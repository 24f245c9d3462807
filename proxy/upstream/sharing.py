"""Who shares answers with whom, and which callers the upstream would accept.

The verdict on the upstream comes from showing it a credential that cannot be valid, on every path whose answers are
kept. An upstream that refuses it nowhere is `open`; elsewhere, or where we could not ask, every caller's credential is
confirmed by the upstream itself before anything is read from the cache, on the path that the caller asks: a server may
check keys on some of its paths alone. Where clients are named, the upstream hears nearhit's own key from all of them,
and theirs are checked before it is asked anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum

from multidict import CIMultiDict

from proxy.upstream.adapter import Capabilities, Probe
from proxy.upstream.verdict import PATHS, Trial, Turn, Verdict

__all__ = ["CONFIRMED_S", "REFUSED_S", "Caller", "Gate", "Sharing", "Verdict", "is_credential", "shown_credential"]

log = logging.getLogger("nearhit.upstream")

_CREDENTIAL = re.compile(
    r"auth|cookie|token|secret|session|credential|(api|access|subscription)[-_]?key"
    r"|openai-(organization|project)|anthropic-(workspace|user-profile)",
    re.IGNORECASE,
)
"""In the names of header fields that tell an upstream who asks; a field too many only tells callers apart too often."""

CONFIRMED_S = 60.0
"""How long a confirmed credential is believed; a revoked key reads its own answers for at most this long."""
REFUSED_S = 2.0
_AGAIN_S = 60.0
"""How long a path that did not tell is left alone."""
_REMEMBERED = 10_000


class Sharing(StrEnum):
    """The setting."""

    AUTO = "auto"
    SHARED = "shared"
    PER_CREDENTIAL = "per-credential"
    CLIENTS = "clients"


@dataclass(frozen=True, slots=True)
class Caller:
    """What sharing makes of one caller; see `proxy.cache.answers.Asking`."""

    namespace: bytes
    may_read: bool
    may_lead: bool


_ANYBODY = Caller(b"", may_read=True, may_lead=True)
_REFUSED = "it refuses upstream.api_key, which is sent for all clients"

Remember = Callable[[Verdict], Awaitable[None]]
ProbeFor = Callable[[Mapping[str, str]], Probe]
_Known = tuple[bytes, str]
"""A credential's digest and the path that it was shown to; "" where that was not told."""
_REFUSALS = (Verdict.REFUSED, Verdict.REFUSED_UNREAD)
_SAID = {
    Verdict.ACCEPTED: "takes any key",
    Verdict.PARTLY: "takes any key on some paths, and does not tell on others",
}


class Gate:
    """Applies a sharing setting to callers. Named clients are known by their keys before they come here."""

    def __init__(
        self,
        sharing: Sharing,
        secret: bytes,
        known: Verdict | None,
        probe_for: ProbeFor,
        remember: Remember,
        label: str = "",
        turn: Turn = nullcontext,
    ) -> None:
        """`secret` (32 bytes) keys the digests of credentials; `known` is an earlier run's verdict.

        `label` tells several upstreams apart in the log; `turn` is a place in its queue.
        """
        self._label = label
        self._turn = turn
        self.sharing = sharing
        self.verdict = Verdict.UNCLEAR
        self.anybody: Caller | None = None
        """What every caller may do, where that is the same for all: the upstream takes anybody, and all share."""
        self.trouble = ""
        """What is wrong with the key that is sent for named clients; empty where nothing is known to be."""
        self._conclude(known or Verdict.UNCLEAR)
        self._secret = secret
        self._nobody = hmac.digest(secret, b"nobody\0", hashlib.sha256)
        self._probe_for = probe_for
        self._remember = remember
        self._until: OrderedDict[_Known, tuple[bool | None, float]] = OrderedDict()
        self._served: OrderedDict[bytes, None] = OrderedDict()
        self._asking: dict[_Known, asyncio.Task[bool]] = {}
        self._invalid: dict[str, Verdict] = {}
        """What became of an invalid credential, by path, as far as is known."""
        self._absent: frozenset[str] = frozenset()
        self._unasked: frozenset[str] = frozenset()
        self._mute: frozenset[str] = frozenset()
        """Paths that answered a call, and then did not tell."""
        self._unheard = False
        """Whether the upstream did not answer when it was asked last."""
        self._not_before: dict[str, float] = {}

    @property
    def open(self) -> bool:
        """Whether the upstream refuses nobody, as far as it tells."""
        return self.verdict in (Verdict.ACCEPTED, Verdict.PARTLY)

    @property
    def shared(self) -> bool:
        """Whether all callers share one namespace, on all paths that there is reason to speak of.

        Not where a path did not tell; one that was not asked yet counts once it has answered a call.
        """
        told = {path for path, verdict in self._invalid.items() if verdict is Verdict.ACCEPTED}
        silent = self._unasked - self._mute
        all_told = not self._unheard and bool(told) and {*told, *self._absent, *silent} >= {*PATHS}
        return self._pooled or (self.sharing is Sharing.AUTO and self.open and all_told)

    @property
    def _pooled(self) -> bool:
        return self.sharing is Sharing.SHARED or (self.sharing is Sharing.AUTO and self.verdict is Verdict.ACCEPTED)

    def anybody_on(self, path: str) -> Caller | None:
        """What every caller may do on a path, where that is the same for all."""
        if self.anybody is not None or self.sharing is not Sharing.AUTO:
            return self.anybody
        # On this path, whatever it would say on others.
        return _ANYBODY if self.open and self._invalid.get(path) is Verdict.ACCEPTED else None

    async def ask(self, capabilities: Capabilities) -> Verdict:
        """Show the upstream an invalid credential; an unclear answer leaves the last verdict.

        Where clients are named, it makes no difference whom else the upstream would take.
        """
        if self.sharing is Sharing.CLIENTS:
            return self.verdict
        told = await self._trial(_invalid_credential(), capabilities).everywhere()
        self._invalid, self._absent, self._unasked = told.paths, told.absent, told.unasked
        self._mute = frozenset()
        self._unheard = not told.heard
        if told.verdict is Verdict.UNCLEAR and self.verdict is Verdict.ACCEPTED:
            # Something answers, and it may be another than the one that took any key.
            self._conclude(Verdict.PARTLY)
        elif told.verdict is not Verdict.UNCLEAR:
            await self._settle(told.verdict)
        return told.verdict

    def wonders(self, path: str) -> bool:
        """Whether a path just answered a call that has not told yet whether it takes anybody."""
        if self.sharing is Sharing.CLIENTS or self.verdict in _REFUSALS or path in self._invalid:
            return False
        # One that was not there may have come since, or have said so of the model that was not named.
        pending = self._unheard or path in self._unasked or path in self._absent
        return pending and time.monotonic() >= self._not_before.get(path, 0.0)

    async def learn(self, path: str, model: str, capabilities: Capabilities) -> None:
        """Show an invalid credential to a path that just answered a call to `model`: it is loaded, and costs least."""
        self._not_before[path] = time.monotonic() + _AGAIN_S
        if self._unheard:
            before = self._invalid
            if await self.ask(capabilities) is Verdict.UNCLEAR:
                self._invalid = {**before, **self._invalid}
        if self.verdict not in _REFUSALS and path not in self._invalid:
            await self._tell(path, await self._trial(_invalid_credential(), capabilities, model).at(path))

    async def _tell(self, path: str, told: Verdict | None) -> None:
        """Keep what became of an invalid credential on a path, and what follows for all."""
        if told is None or told is Verdict.UNCLEAR:
            self._mute |= {path}
            return
        self._invalid[path] = told
        if self.verdict in _REFUSALS:
            return
        if told is Verdict.ACCEPTED:
            told = (
                Verdict.ACCEPTED
                if self.verdict is Verdict.ACCEPTED or {*self._invalid, *self._absent} >= {*PATHS}
                else Verdict.PARTLY
            )
        await self._settle(told)

    async def _settle(self, verdict: Verdict) -> None:
        if verdict is not self.verdict:
            self._conclude(verdict)
            await self._remember(verdict)

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether the upstream has accepted this caller before, as far as is remembered."""
        credential = self.credential_of(headers)
        return any(self._until.get((credential, path), (None, 0.0))[0] for path in ("", *PATHS))

    def serves(self, headers: Mapping[str, str]) -> bool:
        """Whether the upstream takes this caller, or took one who showed the same: enough to make a call ready."""
        is_free = self.open or self.sharing is Sharing.CLIENTS
        return is_free or self.knows(headers) or self.credential_of(headers) in self._served

    async def admit(
        self, headers: Mapping[str, str], capabilities: Capabilities, *, away: bool, path: str = ""
    ) -> Caller:
        """What this caller may do. `away`: the upstream does not answer, so that nobody can be confirmed now.

        `path` is the one that is asked. Without it, it is one that is known to refuse invalid credentials, if any is.
        """
        if (anybody := self.anybody_on(path)) is not None:
            return anybody
        if self.sharing is Sharing.CLIENTS:
            # A client was known by its key before; this is nobody, who has nothing and gets nothing.
            return Caller(self._nobody, may_read=False, may_lead=False)
        takes_all = self.open and self._invalid.get(path, self.verdict) is Verdict.ACCEPTED
        credential = self.credential_of(headers)
        namespace = b"" if self._pooled else credential
        known = credential, path if path in PATHS else ""
        accepted = takes_all or (self.open and namespace == credential and path not in self._unasked)
        accepted = accepted or await self._accepted(known, shown_credential(headers), capabilities, away=away)
        return Caller(namespace, may_read=accepted, may_lead=accepted or namespace == credential)

    async def heard(self, headers: Mapping[str, str], status: int, *, generation: bool, path: str = "") -> None:
        """Learn from what the upstream said to a caller; `generation` where it was asked for an answer, on `path`.

        Elsewhere only a 401 says anything: lists of models and the like are often public, and a 403 may be about the
        path.
        """
        refused = status == 401 or (generation and status == 403)
        accepted = generation and 200 <= status < 300
        if self.sharing is Sharing.CLIENTS:
            self._heard_of_own_key(refused=status == 401, accepted=accepted)
            return
        if not refused and (self.open or not accepted):
            return
        credential, path = self.credential_of(headers), path if path in PATHS else ""
        if refused:
            self._served.pop(credential, None)
            for one in {"", path} if path else {"", *PATHS}:
                self._believe((credential, one), accepted=False)
            if self.verdict not in _REFUSALS:
                # Where anybody was taken before, keys may be checked by now.
                self._invalid = {}
                await self._settle(Verdict.REFUSED)
        elif self._until.get((credential, path), (None, 0.0))[0]:
            # Where it was not asked by itself, it may have been accepted for something that we do not see: a key in the
            # query, say.
            self._believe((credential, path), accepted=True)
        if accepted:
            self._served[credential] = None
            if len(self._served) > _REMEMBERED:
                self._served.popitem(last=False)

    def _heard_of_own_key(self, *, refused: bool, accepted: bool) -> None:
        if refused and not self.trouble:
            log.warning("the upstream%s: %s", self._label, _REFUSED)
        if refused or accepted:
            self.trouble = _REFUSED if refused else ""

    async def _accepted(
        self, known: _Known, shown: CIMultiDict[str], capabilities: Capabilities, *, away: bool
    ) -> bool:
        accepted, until = self._until.get(known, (None, 0.0))
        if time.monotonic() < until:
            return bool(accepted)
        if away:
            # An own namespace holds only what the upstream once gave to this very credential.
            return bool(accepted) or (accepted is None and not self._pooled)
        task = self._asking.get(known)
        if task is None:
            task = asyncio.create_task(self._confirm(known, shown, capabilities), name="nearhit-credential")
            self._asking[known] = task
            task.add_done_callback(lambda _: self._asking.pop(known, None))
        return await asyncio.shield(task)

    async def _confirm(self, known: _Known, shown: CIMultiDict[str], capabilities: Capabilities) -> bool:
        path = known[1] or next((path for path, told in self._invalid.items() if told in _REFUSALS), "")
        trial = self._trial(shown, capabilities)
        verdict = await (self._compared(trial, path) if path else trial.anywhere())
        # An upstream that is too busy to tell is not asked again for every call.
        told = verdict in (Verdict.ACCEPTED, *_REFUSALS)
        self._believe(known, accepted=verdict is Verdict.ACCEPTED if told else None)
        return verdict is Verdict.ACCEPTED

    async def _compared(self, trial: Trial, path: str) -> Verdict | None:
        """What becomes of a caller's credential on a path, in the light of what becomes of an invalid one."""
        known = self._invalid
        invalid = known.get(path)
        if invalid is None:
            invalid = await self._trial(_invalid_credential(), trial.capabilities).at(path)
            if known is self._invalid:
                await self._tell(path, invalid)
        if invalid is Verdict.ACCEPTED:
            return invalid
        return await trial.at(path, unread=invalid is Verdict.REFUSED_UNREAD)

    def _trial(self, credential: Mapping[str, str], capabilities: Capabilities, model: str | None = None) -> Trial:
        guesses = self.verdict in _REFUSALS
        return Trial(self._probe_for(credential), capabilities, self._turn, model, guesses)

    def _conclude(self, verdict: Verdict) -> None:
        if verdict is not self.verdict:
            log.info("the upstream%s %s", self._label, _SAID.get(verdict, "checks keys"))
        self.verdict = verdict
        self.anybody = _ANYBODY if verdict is Verdict.ACCEPTED and self._pooled else None

    def _believe(self, known: _Known, *, accepted: bool | None) -> None:
        self._until.pop(known, None)
        self._until[known] = (accepted, time.monotonic() + (CONFIRMED_S if accepted else REFUSED_S))
        if len(self._until) > _REMEMBERED:
            self._until.popitem(last=False)

    def credential_of(self, headers: Mapping[str, str]) -> bytes:
        """The digest of what a caller shows, with this installation's secret."""
        text = "\n".join(sorted(f"{name.lower()}: {value}" for name, value in shown_credential(headers).items()))
        return hmac.digest(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256)


def _invalid_credential() -> Mapping[str, str]:
    return {"Authorization": f"Bearer nearhit-probe-{secrets.token_hex(16)}"}


def is_credential(name: str) -> bool:
    """Whether a header field of this name tells the upstream who asks."""
    return _CREDENTIAL.search(name) is not None


def shown_credential(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The header fields by which a caller tells the upstream who it is, repeated ones included."""
    return CIMultiDict((name, value) for name, value in headers.items() if is_credential(name))
