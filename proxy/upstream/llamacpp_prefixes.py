"""llama.cpp's slots: a prefix is computed in one, saved to a file of the server's, and restored into one.

What the server does by itself, observed on build 2026.10, and what follows from it:

- With its prompt cache in memory (`--cache-ram`, on by default) it finds the conversation that a call continues, but
  looks only where no slot begins like the call. A restored lead would hide the conversation: there, calls that continue
  one are left alone.
- That cache takes over what a slot holds when a task is launched that needs none of it, not when a file is restored
  over it. So a tiny task goes before a restore that costs a conversation.
- A prompt whose client left is computed to the end of its batch, 2048 tokens by default. Seeds are computed piece by
  piece, so that hanging up on one frees the server soon.
- A restore that fails leaves the slot empty. One that asks for a slot which is busy waits for it: only idle ones are
  asked for.
- What other weights of the same shape have computed is restored without a complaint. So a file is restored only into
  the run that is known to be of its model, by `media_marker`, which is random for each start.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from proxy.upstream.adapter import Json, Probe, Reply, Silent, Unidentified, hitch, trouble
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Seeded, Style
from proxy.upstream.residency import Crowded, Into, Residency, Resident, Slots, slots_of
from proxy.upstream.silence import Silence

MIN_TOKENS = 64
"""Shorter prefixes are computed in less time than it takes to look after them."""

REUSED = 0.9
"""The part of a prefix that a reply must have found in the cache for the prefix to have been there."""

_FILE = re.compile(r"[0-9a-f]{32}\.kv")
_USERS = ("Alpha?", "Zeta one two")
"""What two users say: what their prompts share is what all share."""
_PIECE_TOKENS = 128
_TRIAL_TOKENS = 32
_TINY = {"prompt": ".", "n_predict": 0, "cache_prompt": True, "response_fields": ["id_slot"]}
_MOST_LEADS = 4096


class _Refused(Exception):
    """The server did not do what a seeding needs."""

    def __init__(self, why: Hitch) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class _Prepared(Ready):
    """`since` is the server's newest task when the call was prepared."""

    since: int = -1


class LlamaCppPrefixes:
    """The prefixes of one server. Whether it keeps files, lists slots and caches in memory is found out on the way."""

    cancels = True

    def __init__(
        self,
        *,
        min_tokens: int = MIN_TOKENS,
        slots_timeout_s: float = 1.0,
        restore_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`slots_timeout_s` is what a call waits for the list of slots, or for any other word of the server's.

        `restore_timeout_s` is what it waits for a file, at most.
        """
        self._min_tokens = min_tokens
        self._slots_timeout_s = slots_timeout_s
        self._restore_timeout_s = restore_timeout_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._residency = Residency(clock)
        self._silence = Silence(clock)
        self._tokens: dict[bytes, int] = {}
        self._style = Style.FILE
        # None until tried: most servers do.
        self._in_memory: bool | None = None
        self._tried = False

    @property
    def style(self) -> Style:
        """Files, until the server has shown that it has none or lists no slots: then warming up is all."""
        return self._style

    def reset(self) -> None:
        """Forget what is where, and find out again what the server can do: it may have other flags now."""
        self._residency.clear()
        self._silence.answered()
        self._style = Style.FILE
        self._tried = False

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        """Compute the prefix in an idle slot, and save it under `file`, 32 hexadecimal digits and `.kv`.

        `probe` must wait for as long as computing may take.
        """
        started = self._clock()
        try:
            instance = await self._instance(probe)
            tokens = await self._shared_tokens(probe, lead)
            if len(tokens) < self._min_tokens:
                return Hitch.TOO_SHORT
            slot = await self._compute(probe, lead, tokens)
            async with self._lock:
                size = await self._save(probe, lead, tokens, slot, file)
            if await self._instance(probe) != instance:
                self.reset()
                return Hitch.UNREACHABLE
        except _Refused as refused:
            return refused.why
        digest = hashlib.sha256(struct.pack(f"<{len(tokens)}I", *tokens)).digest()
        return Seeded(len(tokens), digest, file if size else "", size, self._clock() - started, slot, instance)

    async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        """See that a slot holds the lead: by one request where one is believed to, else from the file."""
        if lead is None or kept is None or self._style is not Style.FILE or not _FILE.fullmatch(kept.file):
            return Ready(Readied.NOTHING)
        self._remember(lead, kept.tokens)
        if self._silence.lasts:
            return Ready(Readied.SKIPPED)
        started = self._clock()
        try:
            async with asyncio.timeout(self._slots_timeout_s):
                await self._lock.acquire()
        except TimeoutError:
            return Ready(Readied.SKIPPED, self._clock() - started)
        try:
            how, slot = await self._prepare(probe, lead, kept)
            if slot is not None:
                self._residency.claim(slot)
        finally:
            self._lock.release()
        return _Prepared(how, self._clock() - started, slot, since=self._residency.newest)

    async def landed(self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
        """Find out in which slot the lead is now; one request, and none for leads that were never kept."""
        if not isinstance(ready, _Prepared) or lead is None:
            return
        tokens = self._tokens.get(lead.id, 0)
        if ready.slot is not None:
            self._residency.release(ready.slot, ready.since)
        absent = evidence.cached is not None and evidence.cached < REUSED * tokens
        if absent and ready.slot is not None:
            # The slot was not as believed, or another was taken: start from what is certain.
            self._residency.drop(ready.slot)
            return
        if isinstance(await self._look(probe), Hitch):
            return
        prompt = (evidence.cached or 0) + (evidence.computed or 0)
        self._residency.landed(lead.id, tokens, prompt=prompt, since=ready.since, hint=ready.slot)

    async def forget(self, probe: Probe, kept: Kept) -> bool:
        """Nothing: the server deletes no files."""
        del probe, kept
        return False

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> bool | None:
        """None: every reply tells what it found in the cache."""
        del probe, lead, kept
        return None

    async def _prepare(self, probe: Probe, lead: Lead, kept: Kept) -> tuple[Readied, int | None]:
        if isinstance(await self._look(probe), Hitch):
            return Readied.SKIPPED, None
        match self._residency.choose(lead.id):
            case Resident(slot):
                return Readied.RESIDENT, slot
            case Crowded():
                return Readied.SKIPPED, None
            case Into(slot, talk):
                kept_by_server = self._in_memory is not False or self._residency.may_hold(self._tokens[lead.id])
                if lead.continued and kept_by_server:
                    return Readied.NOTHING, None
                how = await self._fill(probe, lead, kept, slot, talk=talk)
                return how, slot if how is Readied.RESTORED else None
            case never:
                assert_never(never)

    async def _look(self, probe: Probe) -> Slots | Hitch:
        """List the slots and take notice of them."""
        if self._silence.lasts:
            return Hitch.BUSY
        reply = await probe.within(self._slots_timeout_s).get("/slots")
        if isinstance(trouble(reply), Silent):
            self._silence.unanswered()
        else:
            self._silence.answered()
        if reply is not None and reply.status in (404, 501):
            self._style = Style.WARM
            return Hitch.UNSUPPORTED
        listed = slots_of(reply.json) if reply is not None and reply.status == 200 else None
        if listed is None:
            return hitch(trouble(reply) or Unidentified())
        self._residency.observe(listed)
        return listed

    async def _fill(self, probe: Probe, lead: Lead, kept: Kept, slot: int, *, talk: bool) -> Readied:
        """Restore the file into the slot, if the run that is known answers before and after."""
        until = self._clock() + self._restore_timeout_s
        if talk and not await self._put_by(self._before(until, probe), slot):
            return Readied.SKIPPED
        if not await self._is_run(probe, kept.instance):
            self.reset()
            return Readied.SKIPPED
        restored = await self._restore(self._before(until, probe), kept, slot)
        if not await self._is_run(probe, kept.instance):
            # Another model's tokens in the slot would spoil what is said next.
            await probe.within(self._slots_timeout_s).post(f"/slots/{slot}?action=erase", {})
            self.reset()
            return Readied.SKIPPED
        if isinstance(restored, Readied):
            return restored
        self._remember(lead, restored)
        self._residency.filled(slot, lead.id, restored)
        return Readied.RESTORED

    def _before(self, until: float, probe: Probe) -> Probe:
        return probe.within(max(0.0, until - self._clock()))

    async def _is_run(self, probe: Probe, instance: str) -> bool:
        """Whether the run answers; also where no run is known."""
        if not instance:
            return True
        try:
            return await self._instance(probe) == instance
        except _Refused:
            return False

    async def _instance(self, probe: Probe) -> str:
        """The run that answers, empty where it does not tell.

        Raises:
            _Refused: nothing answers.
        """
        reply = await probe.within(self._slots_timeout_s).get("/props")
        if reply is not None and reply.status in (404, 501):
            return ""
        marker = _accepted(reply).get("media_marker")
        return marker if isinstance(marker, str) else ""

    async def _put_by(self, probe: Probe, slot: int) -> bool:
        """Have the server's cache in memory take over the slot's conversation; False where the slot was lost on it."""
        if self._in_memory is False:
            return True
        self._residency.drop(slot)
        reply = await probe.post("/completion", {**_TINY, "id_slot": slot})
        listed = await self._look(probe) if trouble(reply) is None else Hitch.BUSY
        return not isinstance(listed, Hitch) and slot in listed and not listed[slot].busy

    async def _restore(self, probe: Probe, kept: Kept, slot: int) -> int | Readied:
        """The tokens restored, or why there are none to rely on."""
        # Until the server has confirmed, nobody knows what the slot holds.
        self._residency.drop(slot)
        reply = await probe.post(f"/slots/{slot}?action=restore", {"filename": kept.file})
        if reply is not None and reply.status == 501:
            self._style = Style.WARM
            return Readied.SKIPPED
        if reply is not None and reply.status == 400:
            return Readied.REFUSED
        if reply is None or trouble(reply) is not None:
            return Readied.SKIPPED
        restored = _count(reply.json, "n_restored")
        return Readied.REFUSED if not restored or (kept.tokens and restored != kept.tokens) else restored

    async def _shared_tokens(self, probe: Probe, lead: Lead) -> Sequence[int]:
        """The tokens that all prompts with this lead begin with, found by rendering two of them."""
        first, second = [await self._prompt_tokens(probe, lead.with_user(text)) for text in _USERS]
        shared = 0
        while shared < min(len(first), len(second)) and first[shared] == second[shared]:
            shared += 1
        return first[:shared]

    async def _prompt_tokens(self, probe: Probe, body: Mapping[str, Json]) -> Sequence[int]:
        rendered = _accepted(await probe.post("/apply-template", body)).get("prompt")
        asked = {"content": rendered, "add_special": True, "parse_special": True}
        tokens = _accepted(await probe.post("/tokenize", asked)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < 2**32 for token in tokens):
            raise _Refused(Hitch.REFUSED)
        return tokens

    async def _compute(self, probe: Probe, lead: Lead, tokens: Sequence[int]) -> int | None:
        """Have an idle slot hold just these tokens, and say which; None where the server lists none."""
        listed = await self._look(probe)
        if listed is Hitch.UNSUPPORTED:
            await self._compute_in(probe, tokens, None)
            return None
        if isinstance(listed, Hitch):
            raise _Refused(listed)
        chosen = self._residency.choose(lead.id)
        if isinstance(chosen, Crowded):
            raise _Refused(Hitch.BUSY)
        self._residency.drop(chosen.slot)
        if not self._tried:
            await self._try_memory(probe, tokens, chosen.slot)
        await self._compute_in(probe, tokens, chosen.slot)
        return chosen.slot

    async def _compute_in(self, probe: Probe, tokens: Sequence[int], slot: int | None) -> None:
        for end in range(_PIECE_TOKENS, len(tokens), _PIECE_TOKENS):
            await self._complete(probe, tokens[:end], slot)
        await self._complete(probe, tokens, slot)

    async def _try_memory(self, probe: Probe, tokens: Sequence[int], slot: int) -> None:
        """Find out whether the server keeps in memory what a slot loses, by tokens that it needs anyway."""
        part = tokens[:_TRIAL_TOKENS]
        await self._complete(probe, part, slot)
        _accepted(await probe.post("/completion", {**_TINY, "id_slot": slot}))
        again = await self._complete(probe, part, slot)
        cached = _count(again.get("timings"), "cache_n")
        self._in_memory, self._tried = cached is not None and cached >= len(part) // 2, True

    async def _complete(self, probe: Probe, tokens: Sequence[int], slot: int | None) -> Mapping[str, Json]:
        body = {
            "prompt": list(tokens),
            "n_predict": 0,
            "cache_prompt": True,
            "response_fields": ["tokens_evaluated", "timings", "id_slot"],
            **({} if slot is None else {"id_slot": slot}),
        }
        answer = _accepted(await probe.post("/completion", body))
        if _count(answer, "tokens_evaluated") != len(tokens):
            raise _Refused(Hitch.REFUSED)
        return answer

    async def _save(self, probe: Probe, lead: Lead, tokens: Sequence[int], slot: int | None, file: str) -> int:
        """Save the slot; the file's bytes, 0 where there is none to rely on."""
        if slot is None:
            return 0
        listed = await self._look(probe)
        if isinstance(listed, Hitch):
            raise _Refused(listed)
        if slot not in listed or listed[slot].busy or listed[slot].tokens not in (None, len(tokens)):
            # Another call has taken it meanwhile.
            raise _Refused(Hitch.BUSY)
        self._remember(lead, len(tokens))
        self._residency.filled(slot, lead.id, len(tokens))
        if self._style is not Style.FILE or not _FILE.fullmatch(file):
            return 0
        reply = await probe.post(f"/slots/{slot}?action=save", {"filename": file})
        if reply is not None and reply.status == 501:
            self._style = Style.WARM
        if reply is None or trouble(reply) is not None or _count(reply.json, "n_saved") != len(tokens):
            return 0
        return _count(reply.json, "n_written") or 0

    def _remember(self, lead: Lead, tokens: int) -> None:
        """How many tokens a lead has; 0 tells nothing new."""
        known = self._tokens.pop(lead.id, 0)
        self._tokens[lead.id] = tokens or known
        if len(self._tokens) > _MOST_LEADS:
            del self._tokens[next(iter(self._tokens))]


def _accepted(reply: Reply | None) -> Mapping[str, Json]:
    """The document of a success.

    Raises:
        _Refused: it was none.
    """
    sighting = trouble(reply)
    if sighting is not None:
        raise _Refused(hitch(sighting))
    if reply is None or not isinstance(reply.json, dict):
        raise _Refused(Hitch.REFUSED)
    return reply.json


def _count(document: Json, name: str) -> int | None:
    value = document.get(name) if isinstance(document, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
