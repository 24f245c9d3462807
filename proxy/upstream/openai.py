"""Any server that speaks the OpenAI API and is not known better."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable

from proxy.upstream.adapter import Capabilities, Kind, Probe, Seen, Sighting, Unidentified, hitch, model_ids, trouble
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Prefixing, Readied, Ready, Seeded, Style

_CHAT = "/v1/chat/completions"


class OpenAI:
    """Identified by the list of its models and the operator's own `epoch`."""

    kind = Kind.OPENAI
    capabilities = Capabilities(
        keeps_responses=True,
        drains=False,
        usage_from_timings=False,
        key_before_body=False,
        tells_instances=False,
        may_be_paid=True,
    )

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text that the operator changes when the model behind the list changed."""
        self._epoch = epoch
        self.prefixing: Prefixing | None = WarmUps()

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Nothing need be done."""
        del probe, path, body

    async def look(self, probe: Probe) -> Sighting:
        """Ask for the model list. A server that has none is identified by `epoch` alone."""
        listing = await probe.get("/v1/models")
        sighting = trouble(listing)
        absent = listing is not None and listing.status in (404, 405, 501)
        if sighting is not None and not (isinstance(sighting, Unidentified) and (absent or self._epoch)):
            return sighting
        models = model_ids(listing.json) if listing is not None and sighting is None else ()
        text = json.dumps(["openai", 1, list(models), self._epoch])
        return Seen(hashlib.sha256(text.encode()).digest(), "", models)

    async def same_instance(self, probe: Probe, instance: str) -> bool:
        """Runs of such a server cannot be told apart."""
        del probe, instance
        return True


class WarmUps:
    """A call with the lead and next to nothing else, thrown away: many servers keep the KV state of what came last.

    What stays is up to the server; only what replies tell of reuse shows whether it helped.
    """

    style = Style.WARM
    cancels = False
    """Unknown, so that it must not be relied on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds."""
        self._clock = clock

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        """Ask for one token with the lead; `file` is not used.

        The call names the lead's `model` where it has one, else the only model that the server lists; with
        several there is no telling which one the lead is for.
        """
        del file
        model = lead.model or await self._only_model(probe)
        if isinstance(model, Hitch):
            return model
        started = self._clock()
        body = {**lead.with_user("."), "model": model, "max_tokens": 1, "stream": False}
        sighting = trouble(await probe.post(_CHAT, body))
        return Seeded(0, b"", "", 0, self._clock() - started) if sighting is None else hitch(sighting)

    async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        """There is nothing to restore."""
        del probe, lead, kept
        return Ready(Readied.NOTHING)

    async def landed(self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
        """Nothing is remembered."""
        del probe, lead, ready, evidence

    async def forget(self, probe: Probe, kept: Kept) -> bool:
        """There is nothing to delete."""
        del probe, kept
        return False

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> None:
        """Replies tell, where the server counts cached tokens; elsewhere nothing does."""
        del probe, lead, kept

    def reset(self) -> None:
        """Nothing is remembered."""

    async def _only_model(self, probe: Probe) -> str | Hitch:
        listing = await probe.get("/v1/models")
        sighting = trouble(listing)
        models = model_ids(listing.json) if listing is not None and sighting is None else ()
        if sighting is not None and not isinstance(sighting, Unidentified):
            return hitch(sighting)
        return "default" if not models else models[0] if len(models) == 1 else Hitch.UNSUPPORTED
