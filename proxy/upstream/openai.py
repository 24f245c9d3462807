"""Any server that speaks the OpenAI API and is not known better."""

from __future__ import annotations

import hashlib
import json

from proxy.upstream.adapter import Capabilities, Kind, Probe, Seen, Sighting, Unidentified, model_ids, trouble
from proxy.upstream.prefix import Prefixing


class OpenAI:
    """Identified by the list of its models and the operator's own `epoch`."""

    kind = Kind.OPENAI
    capabilities = Capabilities(drains=False, usage_from_timings=False, key_before_body=False, tells_instances=False)

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text that the operator changes when the model behind the list changed."""
        self._epoch = epoch

    prefixing: Prefixing | None = None

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
