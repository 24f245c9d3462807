"""The demo server of Rockchip's RKLLM toolkit, `flask_server.py` (port 8080, no authentication)."""

from __future__ import annotations

import hashlib
import json

from proxy.upstream.adapter import Capabilities, Kind, Probe, Seen, Sighting, Unidentified, model_ids, trouble
from proxy.upstream.prefix import Prefixing


class RkllmFlask:
    """Identified by the name of its only model and the operator's `epoch`.

    Why it behaves as `capabilities` say:

    - `cached`: only the last new message reaches the model, and what is new is counted from the previous request, of
      whichever client. The system prompt is left out unless a call has tools. An answer depends on the request before.
    - `multi_turn`: the history never reaches the model.
    - `drains`: an abandoned stream is computed to its end, and until then the server answers 503, or mixes its tokens
      into the next answer.
    - `max_concurrency`: one inference at a time, 503 for whoever comes meanwhile.
    - `honours_sampling`: temperature, top_p and top_k reach the runtime; a seed does not.
    - `tells_length`: an answer that was cut says `stop`. Usage counts words, and a stream has none; the limit where a
      call states none is 4096 tokens.

    Nothing helps with prefixes: the system prompt that a warm-up would leave behind is not part of prompts at all.
    """

    kind = Kind.RKLLM_FLASK
    capabilities = Capabilities(
        drains=True,
        usage_from_timings=False,
        key_before_body=False,
        tells_instances=False,
        max_concurrency=1,
        cached=False,
        multi_turn=False,
        tells_length=False,
        usage_unit="words",
        default_limit=4096,
        open_to_all=True,
    )
    prefixing: Prefixing | None = None

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text that the operator changes when the model behind its name changed."""
        self._epoch = epoch

    async def look(self, probe: Probe) -> Sighting:
        """Ask for the model list, the only thing that the server shows; its `created` is always now."""
        listing = await probe.get("/v1/models")
        sighting = trouble(listing)
        if sighting is not None:
            return sighting
        models = model_ids(listing.json) if listing is not None else ()
        if len(models) != 1:
            return Unidentified()
        text = json.dumps(["rkllm_flask", 1, models[0], self._epoch])
        return Seen(hashlib.sha256(text.encode()).digest(), "", models, models[0])

    async def same_instance(self, probe: Probe, instance: str) -> bool:
        """Runs of this server cannot be told apart."""
        del probe, instance
        return True

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Nothing need be done: its model cannot be changed."""
        del probe, path, body
