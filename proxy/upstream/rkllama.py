"""rkllama, a server for the NPU of Rockchip boards with Ollama's and OpenAI's API (port 8080, no authentication)."""

from __future__ import annotations

import hashlib
import json

from proxy.upstream.adapter import Capabilities, Json, Kind, Probe, Seen, Sighting, Unidentified, trouble
from proxy.upstream.prefix import Prefixing


class Rkllama:
    """Identified by its models: name, size, time of change and quantisation of each.

    Why it behaves as `capabilities` say:

    - `drains`: after an abandoned answer the end of it may come out at the start of the next, across clients.
    - `max_concurrency`: each model has one worker that takes one request after another. It queues them in no order of
      ours.
    - `honours_sampling`: temperature, top_p and top_k reach the runtime; a seed does not.
    - `tells_length`: an answer that was cut says `stop`. Usage counts tokens; the limit where a call states none is in
      the model's Modelfile, which is not shown.
    - `leaks_tail`: the worker ends an answer that was cut without emptying its list of tokens, so that the last one
      comes out at the start of the next answer.

    Models are loaded when they are asked for, several at a time, and each call is answered by the one that it names:
    what is loaded at a moment identifies nothing. A model's defaults are in its Modelfile: `epoch` is there for these.

    Nothing helps with prefixes. The server keeps KV files by itself, named after the system prompt *and* the first
    user's message: a warm-up makes one that no other conversation finds, and the same request again misses too, because
    its file is renamed. Only follow-up turns are fast, without our doing.
    """

    kind = Kind.RKLLAMA
    capabilities = Capabilities(
        drains=True,
        usage_from_timings=False,
        key_before_body=False,
        tells_instances=False,
        max_concurrency=1,
        tells_length=False,
        leaks_tail=True,
        open_to_all=True,
    )
    prefixing: Prefixing | None = None

    def __init__(self, epoch: str) -> None:
        """`epoch` is a text of the operator's that is part of the fingerprint."""
        self._epoch = epoch

    async def look(self, probe: Probe) -> Sighting:
        """Read Ollama's list of models, which says more of them than OpenAI's."""
        reply = await probe.get("/api/tags")
        sighting = trouble(reply)
        if sighting is not None:
            return sighting
        listed = reply.json.get("models") if reply is not None and isinstance(reply.json, dict) else None
        if not isinstance(listed, list):
            return Unidentified()
        models = [_identity(entry) for entry in listed]
        if not all(models):
            return Unidentified()
        text = json.dumps(["rkllama", 1, sorted(models, key=json.dumps), self._epoch])
        return Seen(hashlib.sha256(text.encode()).digest(), "", tuple(sorted({model[0] for model in models})))

    async def same_instance(self, probe: Probe, instance: str) -> bool:
        """Runs of this server cannot be told apart."""
        del probe, instance
        return True

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Nothing need be done: models are loaded beside each other."""
        del probe, path, body


def _identity(entry: Json) -> list[Json]:
    """What identifies a listed model; empty where less is shown than tells two files of one name apart."""
    if not isinstance(entry, dict):
        return []
    name, size, changed = entry.get("name"), entry.get("size"), entry.get("modified_at")
    if not (isinstance(name, str) and name and isinstance(size, int) and isinstance(changed, str)):
        return []
    return [name, size, changed, entry.get("digest"), entry.get("details")]
