"""Who shares answers with whom, and which callers the upstream would accept.

The verdict on the upstream comes from showing it a credential that cannot be valid. An upstream that takes anybody is
`open`; one that does not, or that we could not ask, has every caller's credential confirmed by the upstream itself
before anything is read from the cache. Where clients are named, the upstream hears nearhit's own key from all of them,
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
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from multidict import CIMultiDict

from proxy.upstream.adapter import Capabilities, Probe, Reply, model_ids
from proxy.upstream.lane import LaneBusy

log = logging.getLogger("nearhit.upstream")

PROBE_PATH = "/v1/chat/completions"
_SHORT_CHAT: Mapping[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
_SHORT: Mapping[str, Mapping[str, Any]] = {
    PROBE_PATH: _SHORT_CHAT,
    "/v1/messages": _SHORT_CHAT,
    "/v1/embeddings": {"input": "hi"},
}
"""The least that can be asked, by path; the first path that a server has decides."""
_ABSENT = (404, 405, 501)
_CREDENTIAL = re.compile(
    r"auth|cookie|token|secret|session|credential|api-?key|access-?key|subscription-?key|openai-(organization|project)",
    re.IGNORECASE,
)
"""In the names of header fields that tell an upstream who asks; a field too many only tells callers apart too often."""

TURN_S = 5.0
"""How long nearhit's own question may wait for its turn and its answer."""
CONFIRMED_S = 60.0
"""How long a confirmed credential is believed; a revoked key reads its own answers for at most this long."""
REFUSED_S = 2.0
_REMEMBERED = 10_000


class Sharing(StrEnum):
    """The setting."""

    AUTO = "auto"
    SHARED = "shared"
    PER_CREDENTIAL = "per-credential"
    CLIENTS = "clients"


class Verdict(StrEnum):
    """What showing an invalid credential told."""

    ACCEPTED = "accepted"
    REFUSED_UNREAD = "refused-unread"
    """Refused although the body was empty: this server checks the credential before the body."""
    REFUSED = "refused"
    UNCLEAR = "unclear"


Turn = Callable[[], AbstractAsyncContextManager[object]]
"""A place among the calls that the upstream works on."""


async def ask_verdict(probe: Probe, *, key_before_body: bool, turn: Turn = nullcontext) -> Verdict:
    """Whether a generation endpoint accepts the probe's credential: an empty body first, which costs nothing.

    A complaint about the body proves that the credential passed only where that is checked first; elsewhere one
    well-formed request of one token decides.
    """
    path, reply = await _first_path(probe)
    verdict = _plain_verdict(reply)
    if verdict is not None:
        return Verdict.REFUSED_UNREAD if verdict is Verdict.REFUSED else verdict
    if reply is None or reply.status not in (400, 422):
        return Verdict.UNCLEAR
    if key_before_body:
        return Verdict.ACCEPTED
    listing = await probe.get("/v1/models")
    models = model_ids(listing.json) if listing is not None else ()
    question = {"model": models[0] if models else "default", **_SHORT[path]}
    try:
        # It makes the model work: not beside a call that may be all it can do.
        async with asyncio.timeout(TURN_S), turn():
            return _plain_verdict(await probe.post(path, question)) or Verdict.UNCLEAR
    except (TimeoutError, LaneBusy):
        return Verdict.UNCLEAR


async def _first_path(probe: Probe) -> tuple[str, Reply | None]:
    """The first generation endpoint that the server has, and what it says to an empty body there."""
    for path in _SHORT:
        reply = await probe.post(path, {})
        if reply is None or reply.status not in _ABSENT:
            return path, reply
    return PROBE_PATH, None


def _plain_verdict(reply: Reply | None) -> Verdict | None:
    if reply is not None and reply.status in (401, 403):
        return Verdict.REFUSED
    return Verdict.ACCEPTED if reply is not None and 200 <= reply.status < 300 else None


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
        self._until: OrderedDict[bytes, tuple[bool | None, float]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[bool]] = {}

    @property
    def open(self) -> bool:
        """Whether the upstream takes any caller."""
        return self.verdict is Verdict.ACCEPTED

    @property
    def shared(self) -> bool:
        """Whether all callers share one namespace."""
        return self.sharing is Sharing.SHARED or (self.sharing is Sharing.AUTO and self.open)

    async def ask(self, capabilities: Capabilities) -> Verdict:
        """Show the upstream an invalid credential; an unclear answer leaves the last verdict.

        Where clients are named, it makes no difference whom else the upstream would take.
        """
        if self.sharing is Sharing.CLIENTS:
            return self.verdict
        headers = {"Authorization": f"Bearer nearhit-probe-{secrets.token_hex(16)}"}
        # Where nobody is refused, asking would only cost the server an answer.
        verdict = (
            Verdict.ACCEPTED
            if capabilities.open_to_all
            else await ask_verdict(
                self._probe_for(headers), key_before_body=capabilities.key_before_body, turn=self._turn
            )
        )
        if verdict is not Verdict.UNCLEAR and verdict is not self.verdict:
            self._conclude(verdict)
            await self._remember(verdict)
        return verdict

    def knows(self, headers: Mapping[str, str]) -> bool:
        """Whether the upstream has accepted this caller before, as far as is remembered."""
        return bool(self._until.get(self.credential_of(headers), (None, 0.0))[0])

    async def admit(self, headers: Mapping[str, str], capabilities: Capabilities, *, away: bool) -> Caller:
        """What this caller may do. `away`: the upstream does not answer, so that nobody can be confirmed now."""
        if self.anybody is not None:
            return self.anybody
        if self.sharing is Sharing.CLIENTS:
            # A client was known by its key before; this is nobody, who has nothing and gets nothing.
            return Caller(self._nobody, may_read=False, may_lead=False)
        credential = self.credential_of(headers)
        namespace = b"" if self.shared else credential
        accepted = self.open or await self._accepted(credential, shown_credential(headers), capabilities, away=away)
        return Caller(namespace, may_read=accepted, may_lead=accepted or namespace == credential)

    async def heard(self, headers: Mapping[str, str], status: int, *, generation: bool) -> None:
        """Learn from what the upstream said to a caller; `generation` where it was asked for an answer.

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
        credential = self.credential_of(headers)
        if refused:
            self._believe(credential, accepted=False)
            if self.verdict in (Verdict.ACCEPTED, Verdict.UNCLEAR):
                self._conclude(Verdict.REFUSED)
                await self._remember(Verdict.REFUSED)
        elif self._until.get(credential, (None, 0.0))[0] is not False:
            # What was refused by itself and accepted here was accepted for something that we do not see.
            self._believe(credential, accepted=True)

    def _heard_of_own_key(self, *, refused: bool, accepted: bool) -> None:
        if refused and not self.trouble:
            log.warning("the upstream%s: %s", self._label, _REFUSED)
        if refused or accepted:
            self.trouble = _REFUSED if refused else ""

    async def _accepted(
        self, credential: bytes, shown: CIMultiDict[str], capabilities: Capabilities, *, away: bool
    ) -> bool:
        accepted, until = self._until.get(credential, (None, 0.0))
        if time.monotonic() < until:
            return bool(accepted)
        if away:
            # An own namespace holds only what the upstream once gave to this very credential.
            return bool(accepted) or (accepted is None and not self.shared)
        task = self._asking.get(credential)
        if task is None:
            task = asyncio.create_task(self._confirm(credential, shown, capabilities), name="nearhit-credential")
            self._asking[credential] = task
            task.add_done_callback(lambda _: self._asking.pop(credential, None))
        return await asyncio.shield(task)

    async def _confirm(self, credential: bytes, shown: CIMultiDict[str], capabilities: Capabilities) -> bool:
        key_first = capabilities.key_before_body or self.verdict is Verdict.REFUSED_UNREAD
        verdict = await ask_verdict(self._probe_for(shown), key_before_body=key_first, turn=self._turn)
        # An upstream that is too busy to tell is not asked again for every call.
        self._believe(credential, accepted=None if verdict is Verdict.UNCLEAR else verdict is Verdict.ACCEPTED)
        return verdict is Verdict.ACCEPTED

    def _conclude(self, verdict: Verdict) -> None:
        if verdict is not self.verdict:
            keys = "takes any key" if verdict is Verdict.ACCEPTED else "checks keys"
            log.info("the upstream%s %s", self._label, keys)
        self.verdict = verdict
        self.anybody = _ANYBODY if self.open and self.shared else None

    def _believe(self, credential: bytes, *, accepted: bool | None) -> None:
        self._until.pop(credential, None)
        self._until[credential] = (accepted, time.monotonic() + (CONFIRMED_S if accepted else REFUSED_S))
        if len(self._until) > _REMEMBERED:
            self._until.popitem(last=False)

    def credential_of(self, headers: Mapping[str, str]) -> bytes:
        """The digest of what a caller shows, with this installation's secret."""
        text = "\n".join(sorted(f"{name.lower()}: {value}" for name, value in shown_credential(headers).items()))
        return hmac.digest(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256)


def is_credential(name: str) -> bool:
    """Whether a header field of this name tells the upstream who asks."""
    return _CREDENTIAL.search(name) is not None


def shown_credential(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The header fields by which a caller tells the upstream who it is, repeated ones included."""
    return CIMultiDict((name, value) for name, value in headers.items() if is_credential(name))
