"""What can be done about prefixes on a real llama.cpp server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.upstream.adapter import Probe
from proxy.upstream.client import Upstream, client_session
from proxy.upstream.llamacpp_prefixes import LlamaCppPrefixes
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Seeded, Style, lead_of
from tests.emulators.llamacpp import LlamaCpp, llamacpp
from tests.llama_server import Flags, LlamaServer

pytestmark = pytest.mark.model

WORDS = [
    *("apple", "river", "stone", "cloud", "train", "music", "paper", "light"),
    *("horse", "green", "north", "table", "winter", "coffee", "garden", "number"),
]
FOLDS = "{% for m in messages %}{% if loop.first %}[INST] {% endif %}{{ m.content }}\n\n{% endfor %}[/INST]"
RAISES = "{% if 'shop' in messages[0].content %}{{ raise_exception('no shops') }}{% endif %}{{ messages[0].content }}"


def system(service: str, words: int = 40) -> str:
    """A system prompt of about so many tokens that shares nothing with another service's."""
    start = hashlib.sha256(service.encode()).digest()[0]
    return f"{service}: " + " ".join(WORDS[(i * 7 + i // 5 + start) % 16] for i in range(words))


def chat(service: str, *said: str, words: int = 40, **fields: Any) -> dict[str, Any]:
    """A chat body in which user and assistant speak in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    head = [{"role": "system", "content": system(service, words)}]
    return {"messages": [*head, *messages], "max_tokens": 1, "temperature": 0, **fields}


def name_of(lead: Lead) -> str:
    return lead.id.hex()[:32] + ".kv"


class Client:
    """Does as nearhit does: readies, sends, and tells what the reply said."""

    def __init__(self, probe: Probe, prefixes: LlamaCppPrefixes) -> None:
        self.probe = probe
        self.prefixes = prefixes
        self.kept: dict[bytes, Kept] = {}

    async def seed(self, service: str, words: int = 40) -> Seeded:
        lead = lead_of(chat(service, "", words=words))
        assert lead is not None
        seeded = await self.prefixes.seed(self.probe, lead, name_of(lead))
        assert isinstance(seeded, Seeded), seeded
        if seeded.file:
            self.kept[lead.id] = Kept(seeded.file, seeded.tokens, await self.instance())
        return seeded

    async def instance(self) -> str:
        """The run that answers."""
        reply = await self.probe.get("/props")
        assert reply is not None
        marker: str = reply.json["media_marker"]
        return marker

    async def ask(self, body: dict[str, Any]) -> tuple[Readied, int]:
        """How the call was readied, and the tokens of its prompt that the server had to compute."""
        ready, lead = await self.ready(body)
        return ready.how, await self.send(body, ready, lead)

    async def ready(self, body: dict[str, Any]) -> tuple[Ready, Lead | None]:
        lead = lead_of(body)
        return await self.prefixes.ready(self.probe, lead, self.kept.get(lead.id) if lead else None), lead

    async def send(self, body: dict[str, Any], ready: Ready, lead: Lead | None) -> int:
        reply = await self.probe.post("/v1/chat/completions", body)
        assert reply is not None
        assert reply.status == 200, reply
        timings = reply.json["timings"]
        evidence = Evidence(timings["cache_n"], timings["prompt_n"])
        await self.prefixes.landed(self.probe, lead, ready, evidence)
        computed: int = timings["prompt_n"]
        return computed

    async def restart(self, server: LlamaServer) -> None:
        """Restart the server, and notice it."""
        await asyncio.to_thread(server.restart)
        await self.notice()

    async def notice(self) -> None:
        """See that another run of the same model answers."""
        instance = await self.instance()
        self.kept = {lead: replace(kept, instance=instance) for lead, kept in self.kept.items()}
        self.prefixes.reset()

    async def leave(self, body: dict[str, Any]) -> None:
        """Hang up once the answer has begun."""
        ready, lead = await self.ready(body)
        begun = asyncio.Event()
        heard = self.probe.streamed("/v1/chat/completions", {**body, "stream": True}, lambda _: begun.set())
        asking = asyncio.create_task(heard)
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        await self.prefixes.landed(self.probe, lead, ready, Evidence())

    async def slots(self) -> list[dict[str, Any]]:
        reply = await self.probe.get("/slots")
        assert reply is not None
        listed: list[dict[str, Any]] = reply.json
        return listed


Connect = Callable[..., Client]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with client_session(connect_timeout_s=5, read_timeout_s=60) as session:

        def client(server: LlamaServer | LlamaCpp, **options: Any) -> Client:
            return Client(
                Probe(Upstream(server.url, session, lambda: None), {}, 60),
                LlamaCppPrefixes(**{"min_tokens": 32, **options}),
            )

        yield client


def _serving(**flags: Any) -> LlamaServer:
    return LlamaServer(Flags(**flags))


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[LlamaServer]:
    """Two slots, files, no cache in memory."""
    async with _serving(slot_save_path=f"{tmp_path}/") as server:
        yield server


@pytest.fixture
async def caching(tmp_path: Path) -> AsyncIterator[LlamaServer]:
    """One slot, files, and the server's own cache in memory."""
    async with _serving(slot_save_path=f"{tmp_path}/", slots=1, cache_ram_mib=256) as server:
        yield server


async def test_more_leads_than_slots_are_each_computed_once(
    plain: LlamaServer, connect: Connect, tmp_path: Path
) -> None:
    client = connect(plain)
    seeds = [await client.seed(service) for service in ("shop", "bank", "post")]
    asked = [await client.ask(chat(service, "Hello")) for service in ("shop", "post", "bank", "shop")]
    sizes = await asyncio.to_thread(lambda: [(tmp_path / seed.file).stat().st_size for seed in seeds])
    assert all(seed.tokens > 40 for seed in seeds)
    assert sizes == [seed.bytes for seed in seeds]
    assert [how for how, _ in asked] == [Readied.RESTORED, Readied.RESIDENT, Readied.RESTORED, Readied.RESTORED]
    assert all(computed < 12 for _, computed in asked), asked


async def test_a_lead_that_is_there_is_not_restored(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    await client.seed("shop")
    asked = [await client.ask(chat("shop", text)) for text in ("Hello", "Good evening")]
    assert [how for how, _ in asked] == [Readied.RESIDENT, Readied.RESIDENT]
    assert all(computed < 12 for _, computed in asked), asked


async def test_a_call_past_us_that_takes_the_slot_is_noticed(plain: LlamaServer, connect: Connect) -> None:
    client, other = connect(plain), connect(plain)
    await client.seed("shop")
    await client.ask(chat("shop", "Hello"))
    for stranger in ("Ann", "Bob"):
        await other.ask(chat(stranger, "Hello", words=20))
    how, computed = await client.ask(chat("shop", "Good evening"))
    assert how is Readied.RESTORED
    assert computed < 12


async def test_two_calls_at_once_do_not_take_each_others_slot(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    for service in ("shop", "bank", "post"):
        await client.seed(service)
    bodies = [chat("shop", "Hello"), chat("bank", "Hello")]
    prepared = await asyncio.gather(*(client.ready(body) for body in bodies))
    third, _ = await client.ready(chat("post", "Hello"))
    computed = [await client.send(b, *ready) for b, ready in zip(bodies, prepared, strict=True)]
    assert len({ready.slot for ready, _ in prepared}) == 2
    assert third.how is Readied.SKIPPED, "both slots are spoken for"
    assert max(computed) < 12


async def test_a_restarted_server_gets_its_leads_from_files(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    await client.seed("shop")
    await client.restart(plain)
    first = await client.ask(chat("shop", "Hello"))
    second = await client.ask(chat("shop", "Good evening"))
    assert first[0] is Readied.RESTORED
    assert second[0] is Readied.RESIDENT
    assert max(first[1], second[1]) < 12


async def test_what_another_model_computed_is_not_restored_before_the_restart_is_noticed(
    plain: LlamaServer, connect: Connect
) -> None:
    client = connect(plain)
    for service in ("shop", "bank", "post"):
        await client.seed(service)
    await asyncio.to_thread(plain.restart)
    asked = [await client.ask(chat(service, "Hello")) for service in ("post", "shop")]
    assert [how for how, _ in asked] == [Readied.SKIPPED, Readied.SKIPPED]
    assert min(computed for _, computed in asked) > 40
    await client.notice()
    how, computed = await client.ask(chat("bank", "Hello"))
    assert how is Readied.RESTORED
    assert computed < 12


async def test_a_slot_that_another_model_was_restored_into_is_erased(connect: Connect, tmp_path: Path) -> None:
    async with llamacpp(tmp_path) as server:
        client = connect(server)
        for service in ("shop", "bank", "post"):
            await client.seed(service)
        server.swaps_at = "restore"
        asked = [await client.ask(chat("shop", text)) for text in ("Hello", "Good evening")]
        assert [how for how, _ in asked] == [Readied.SKIPPED, Readied.RESIDENT], "by now it has computed it itself"
        assert server.poisoned == 0
        assert (server.count("restore"), server.count("erase")) == (1, 1)


async def test_a_prefix_is_not_kept_that_two_runs_computed(connect: Connect, tmp_path: Path) -> None:
    async with llamacpp(tmp_path) as server:
        client = connect(server)
        lead = lead_of(chat("shop", ""))
        assert lead is not None
        server.swaps_at = "save"
        assert await client.prefixes.seed(client.probe, lead, name_of(lead)) is Hitch.UNREACHABLE
        seeded = await client.prefixes.seed(client.probe, lead, name_of(lead))
        assert isinstance(seeded, Seeded)
        assert seeded.instance == await client.instance()


async def test_a_file_that_is_none_is_refused_and_made_anew(
    plain: LlamaServer, connect: Connect, tmp_path: Path
) -> None:
    client = connect(plain)
    seeded = await client.seed("shop")
    await client.restart(plain)
    await asyncio.to_thread((tmp_path / seeded.file).write_bytes, b"no slot file")
    refused, computed = await client.ask(chat("shop", "Hello"))
    assert refused is Readied.REFUSED
    assert computed > 40
    again = await client.seed("shop")
    assert again == replace(seeded, seconds=again.seconds, slot=again.slot, instance=again.instance)
    await client.restart(plain)
    how, computed = await client.ask(chat("shop", "Hello"))
    assert how is Readied.RESTORED
    assert computed < 12


async def test_the_file_of_another_lead_is_refused(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    shop, bank = await client.seed("shop"), await client.seed("bank", words=50)
    client.prefixes.reset()
    client.kept = {lead: Kept(bank.file, shop.tokens) for lead, kept in client.kept.items() if kept.file == shop.file}
    how, _ = await client.ask(chat("shop", "Hello"))
    assert how is Readied.REFUSED


async def test_what_was_never_kept_costs_no_request(connect: Connect) -> None:
    client = connect(LlamaServer())
    for body in (chat("shop", "Hello"), {"messages": [{"role": "user", "content": "Hello"}]}):
        ready, lead = await client.ready(body)
        await client.prefixes.landed(client.probe, lead, ready, Evidence())
        assert ready == Ready(Readied.NOTHING)


async def test_a_server_that_is_gone_or_silent_delays_nobody(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain, slots_timeout_s=2.0)
    lead = lead_of(chat("shop", ""))
    assert lead is not None
    client.kept[lead.id] = Kept(name_of(lead), 0)
    plain.pause()
    silent, _ = await client.ready(chat("shop", "Hello"))
    plain.resume()
    await asyncio.to_thread(plain.kill)
    gone, _ = await client.ready(chat("shop", "Hello"))
    unseeded = await client.prefixes.seed(client.probe, lead, name_of(lead))
    await client.prefixes.landed(client.probe, lead, gone, Evidence(0, 100))
    await asyncio.to_thread(plain.start)
    assert (silent.how, gone.how) == (Readied.SKIPPED, Readied.SKIPPED)
    assert unseeded is Hitch.UNREACHABLE


async def test_a_server_that_lists_no_slots_in_time_is_left_alone_for_a_while(
    plain: LlamaServer, connect: Connect
) -> None:
    now = [0.0]
    client = connect(plain, slots_timeout_s=2.0, clock=lambda: now[0])
    for service in ("shop", "bank", "post"):
        await client.seed(service)
    plain.pause()
    silent = [await client.ready(chat("shop", "Hello")) for _ in range(2)]
    plain.resume()
    # It would answer again.
    unasked, _ = await client.ready(chat("shop", "Hello"))
    now[0] = 30.0
    asked, _ = await client.ready(chat("shop", "Hello"))
    assert [ready.how for ready, _ in silent] == [Readied.SKIPPED, Readied.SKIPPED]
    assert unasked.how is Readied.SKIPPED
    assert asked.how is Readied.RESTORED


async def test_hanging_up_on_a_seeding_frees_the_slot(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    lead = lead_of(chat("encyclopedia", "", words=600))
    assert lead is not None
    seeding = asyncio.create_task(client.prefixes.seed(client.probe, lead, name_of(lead)))
    while not any(slot["is_processing"] and slot.get("n_prompt_tokens", 0) > 32 for slot in await client.slots()):
        assert not seeding.done()
    seeding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await seeding
    while any(slot["is_processing"] for slot in await client.slots()):
        pass
    held = [slot.get("n_prompt_tokens", 0) for slot in await client.slots()]
    assert max(held) < 600, "it stopped before the end"


async def test_no_idle_slot_is_no_place_to_seed(caching: LlamaServer, connect: Connect) -> None:
    client, other = connect(caching), connect(caching)
    long = asyncio.create_task(other.ask(chat("poet", "Go on", words=20, max_tokens=400, ignore_eos=True)))
    while not any(slot["is_processing"] for slot in await client.slots()):
        pass
    lead = lead_of(chat("shop", ""))
    assert lead is not None
    client.kept[lead.id] = Kept(name_of(lead), 0)
    seeded = await client.prefixes.seed(client.probe, lead, name_of(lead))
    ready, _ = await client.ready(chat("shop", "Hello"))
    long.cancel()
    assert seeded is Hitch.BUSY
    assert ready.how is Readied.SKIPPED


async def test_a_restore_costs_nobody_the_conversation_that_the_server_would_keep(
    caching: LlamaServer, connect: Connect
) -> None:
    client = connect(caching)
    for service in ("shop", "bank"):
        await client.seed(service)
    long = " ".join(WORDS * 6)
    await client.ask(chat("shop", long))
    how, computed = await client.ask(chat("bank", "Hello"))
    continued, more = await client.ask(chat("shop", long, "Fine.", "Go on"))
    assert how is Readied.RESTORED
    assert computed < 12
    assert continued is Readied.NOTHING, "the restored lead would hide the conversation"
    assert more < 24


async def test_a_conversation_that_the_server_has_lost_gets_its_lead(plain: LlamaServer, connect: Connect) -> None:
    client = connect(plain)
    await client.seed("shop")
    await client.restart(plain)
    how, computed = await client.ask(chat("shop", "Hello", "Fine.", "Go on"))
    assert how is Readied.RESTORED
    assert computed < 32


async def test_a_conversation_goes_on_where_its_answer_was_broken_off(connect: Connect, tmp_path: Path) -> None:
    async with _serving(slots=1, slot_save_path=f"{tmp_path}/") as server:
        client = connect(server)
        await client.seed("shop")
        long = " ".join(WORDS * 6)
        await client.leave(chat("shop", long, max_tokens=300, ignore_eos=True))
        while any(slot["is_processing"] for slot in await client.slots()):
            pass
        how, computed = await client.ask(chat("shop", long, "Fine.", "Go on"))
        assert how is Readied.RESIDENT
        assert computed < 32


async def test_a_slot_that_may_hold_the_conversation_is_left_as_it_is(connect: Connect, tmp_path: Path) -> None:
    async with _serving(slots=1, slot_save_path=f"{tmp_path}/") as server:
        client, other = connect(server), connect(server)
        for service in ("shop", "bank"):
            await client.seed(service)
        long = " ".join(WORDS * 6)
        await other.ask(chat("shop", long))
        how, computed = await client.ask(chat("shop", long, "Fine.", "Go on"))
        assert how is Readied.NOTHING
        assert computed < 32
        await client.ask(chat("bank", "Hello"))
        how, _ = await client.ask(chat("shop", long, "Fine.", "Go on", "Well.", "More"))
        assert how is Readied.RESTORED, "the other lead's call has taken it"


async def test_a_server_that_keeps_no_files_is_warmed(connect: Connect) -> None:
    async with _serving(slots=1) as server:
        client = connect(server)
        seeded = await client.seed("shop")
        how, computed = await client.ask(chat("shop", "Hello"))
        assert (seeded.file, seeded.bytes, client.prefixes.style) == ("", 0, Style.WARM)
        assert how is Readied.NOTHING
        assert computed < 12


async def test_a_server_that_lists_no_slots_is_warmed(connect: Connect, tmp_path: Path) -> None:
    async with _serving(slots=1, show_slots=False, slot_save_path=f"{tmp_path}/") as server:
        client = connect(server)
        seeded = await client.seed("shop")
        _, computed = await client.ask(chat("shop", "Hello"))
        assert (seeded.file, client.prefixes.style) == ("", Style.WARM)
        assert computed < 12


async def test_a_unified_cache_is_restored_into(connect: Connect, tmp_path: Path) -> None:
    async with _serving(slots=4, kv_unified=True, cache_ram_mib=256, slot_save_path=f"{tmp_path}/") as server:
        client = connect(server)
        for service in ("shop", "bank"):
            await client.seed(service)
        first = await client.ask(chat("shop", "Hello"))
        second = await client.ask(chat("bank", "Hello"))
        third = await client.ask(chat("bank", "Good evening"))
        assert [how for how, _ in (first, second, third)] == [Readied.RESTORED, Readied.RESTORED, Readied.RESIDENT]
        assert max(computed for _, computed in (first, second, third)) < 12


async def test_a_template_may_fold_the_system_prompt_into_the_users_turn(connect: Connect, tmp_path: Path) -> None:
    async with _serving(chat_template=FOLDS, slot_save_path=f"{tmp_path}/") as server:
        client = connect(server)
        seeded = await client.seed("shop")
        await client.restart(server)
        how, computed = await client.ask(chat("shop", "Hello"))
        assert seeded.tokens > 40
        assert how is Readied.RESTORED
        assert computed < 12


async def test_what_cannot_be_rendered_or_is_short_is_not_seeded(connect: Connect, tmp_path: Path) -> None:
    async with _serving(chat_template=RAISES, slot_save_path=f"{tmp_path}/") as server:
        client = connect(server)
        lead = lead_of(chat("shop", ""))
        assert lead is not None
        raised = await client.prefixes.seed(client.probe, lead, name_of(lead))
        await asyncio.to_thread(server.restart, replace(server.flags, chat_template=""))
        short = lead_of(chat("shop", "", words=5))
        assert short is not None
        assert raised is Hitch.REFUSED
        assert await client.prefixes.seed(client.probe, short, name_of(short)) is Hitch.TOO_SHORT
