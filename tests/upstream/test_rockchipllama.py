"""RockchipLlama: identity by what is loaded, no deadlock, and caches that are mentioned only once they are proved."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from aiohttp import ClientSession

from proxy.upstream.adapter import Probe, Seen, Unidentified
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Seeded, lead_of, lead_of_prompt
from proxy.upstream.rockchipllama import RockchipLlama as Adapter
from proxy.upstream.rockchipllama_prefixes import NamedCaches
from tests.conftest import eventually
from tests.emulators.asking import SYSTEM, ask, chat, client, events, post, probing, said
from tests.emulators.rockchipllama import QWEN, RUN_FAILED, TINY, RockchipLlama, chatml, rockchipllama

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LEAD = lead_of_prompt(SYSTEM)
NAME = "sw_0123456789abcdef01234567"
KEPT = Kept(NAME, 0)


@pytest.fixture
async def server() -> AsyncIterator[RockchipLlama]:
    async with rockchipllama() as running:
        yield running


@pytest.fixture
async def probe(server: RockchipLlama) -> AsyncIterator[Probe]:
    async with probing(server.url) as asking:
        yield asking


@pytest.fixture
async def session(server: RockchipLlama) -> AsyncIterator[ClientSession]:
    async with client(server.url) as asking:
        yield asking


@pytest.fixture
def caches(server: RockchipLlama) -> NamedCaches:
    """With the time that the NPU worked for a clock."""
    return NamedCaches(lambda: server.npu.now)


# What the server is


async def test_it_shows_what_is_loaded_and_every_models_file(probe: Probe) -> None:
    seen = await Adapter("").look(probe)
    assert isinstance(seen, Seen)
    assert seen.loaded == QWEN.name
    assert seen.models == (QWEN.name, TINY.name)
    assert seen.files == {QWEN.name: QWEN.filename, TINY.name: TINY.filename}


async def test_with_nothing_loaded_it_has_no_identity_and_says_why(server: RockchipLlama, probe: Probe) -> None:
    server.loaded = None
    sighting = await Adapter("").look(probe)
    assert isinstance(sighting, Unidentified)
    assert "no model loaded" in sighting.why
    server.models = []
    assert isinstance(await Adapter("an epoch").look(probe), Unidentified)


async def test_loading_another_beside_it_does_not_change_it(server: RockchipLlama, probe: Probe) -> None:
    before = await Adapter("").look(probe)
    server.models.append(replace(TINY, name="third", filename="third.rkllm"))
    after = await Adapter("").look(probe)
    assert isinstance(before, Seen)
    assert isinstance(after, Seen)
    assert after.fingerprint == before.fingerprint


async def test_of_two_files_under_one_name_the_one_that_is_loaded_counts(server: RockchipLlama, probe: Probe) -> None:
    before = await Adapter("").look(probe)
    server.models.append(replace(QWEN, filename="Qwen3-0.6B-w4a16.rkllm", size_mb=500.0))
    after = await Adapter("").look(probe)
    assert isinstance(before, Seen)
    assert isinstance(after, Seen)
    assert (after.fingerprint, after.files) == (before.fingerprint, before.files)


async def test_a_model_loaded_by_the_name_of_its_file_is_found_by_its_path(
    server: RockchipLlama, probe: Probe, session: ClientSession
) -> None:
    server.loaded = None
    await post(session, "/v1/models/load", {"model": QWEN.names[1]})
    seen = await Adapter("").look(probe)
    assert isinstance(seen, Seen)
    assert seen.loaded == QWEN.names[1]
    assert seen.loaded in seen.models


async def test_an_answer_is_confirmed_only_by_the_model_that_gave_it(server: RockchipLlama, probe: Probe) -> None:
    adapter = Adapter("")
    seen = await adapter.look(probe)
    assert isinstance(seen, Seen)
    for loaded, same in ((QWEN.name, True), (TINY.name, False), (None, False)):
        server.loaded = loaded
        assert await adapter.same_instance(probe, seen.instance) is same
    server.deadlocked = True
    assert await adapter.same_instance(probe.within(0.1), seen.instance) is None


# Loading


@pytest.mark.parametrize("wanted", [TINY.name, TINY.name.upper(), f"{TINY.name}.rkllm", TINY.filename])
async def test_what_is_loaded_is_unloaded_before_another(server: RockchipLlama, probe: Probe, wanted: str) -> None:
    await Adapter("").make_way(probe, "/v1/models/load", f'{{"model": "{wanted}"}}'.encode())
    assert server.loaded is None
    assert len(server.bodies("/v1/models/unload")) == 1


async def test_however_the_path_is_written(server: RockchipLlama, probe: Probe) -> None:
    await Adapter("").make_way(probe, "/v1/models/lo%61d/?x=1", b'{"model": "tiny-b"}')
    assert server.loaded is None


async def test_then_loading_works(server: RockchipLlama, probe: Probe, session: ClientSession) -> None:
    await Adapter("").make_way(probe, "/v1/models/load", b'{"model": "tiny-b"}')
    status, told = await post(session, "/v1/models/load", {"model": TINY.name})
    assert (status, told["model_name"], server.deadlocked) == (200, TINY.name, False)


@pytest.mark.parametrize("wanted", [QWEN.name, f"{QWEN.name}.rkllm", "nope"])
async def test_nothing_is_unloaded_without_need(server: RockchipLlama, probe: Probe, wanted: str) -> None:
    await Adapter("").make_way(probe, "/v1/models/load", f'{{"model": "{wanted}"}}'.encode())
    assert (server.loaded, server.bodies("/v1/models/unload")) == (QWEN.name, [])


async def test_loading_over_a_loaded_model_hangs_the_server_for_ever(server: RockchipLlama, probe: Probe) -> None:
    """What `make_way` is there for."""
    brief = probe.within(0.1)
    reply = await brief.post("/v1/models/load", {"model": TINY.name})
    assert reply is not None
    assert reply.status == 0
    health = await brief.get("/v1/health")
    assert health is not None
    assert health.status == 0


# Caches


async def test_a_seed_is_what_every_chat_with_the_lead_begins_with(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    two = lead_of({"messages": [{"role": "system", "content": SYSTEM}, {"role": "system", "content": "Be brief."}]})
    assert two is not None
    for lead in (LEAD, two):
        seeded = await caches.seed(probe, lead, NAME)
        assert isinstance(seeded, Seeded)
        kept = server.caches[QWEN.name][NAME]
        assert chatml(lead.with_user("hello")["messages"]).startswith(kept.prompt)
        assert kept.prompt.endswith("<|im_end|>\n")
        assert (seeded.file, seeded.bytes) == (NAME, len(kept.prompt))
        assert seeded.seconds > 0
    assert all("messages" not in body for body in server.bodies(f"/v1/cache/{QWEN.name}"))


def leads() -> list[tuple[Lead | None, str, Hitch]]:
    system = {"role": "system", "content": SYSTEM}
    parts = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    return [
        (lead_of({"messages": [system], "tools": [{"type": "function"}]}), NAME, Hitch.UNSUPPORTED),
        (lead_of({"messages": [system], "enable_thinking": True}), NAME, Hitch.UNSUPPORTED),
        (lead_of({"messages": [{"role": "developer", "content": SYSTEM}]}), NAME, Hitch.UNSUPPORTED),
        (lead_of({"messages": [parts]}), NAME, Hitch.UNSUPPORTED),
        (lead_of_prompt("Be brief."), NAME, Hitch.TOO_SHORT),
        (LEAD, "system", Hitch.UNSUPPORTED),
        (LEAD, "a b", Hitch.UNSUPPORTED),
        (LEAD, "", Hitch.UNSUPPORTED),
    ]


@pytest.mark.parametrize(("lead", "name", "hitch"), leads())
async def test_what_is_not_seeded_has_a_reason(
    server: RockchipLlama, probe: Probe, caches: NamedCaches, lead: Lead, name: str, hitch: Hitch
) -> None:
    assert await caches.seed(probe, lead, name) is hitch
    assert server.caches == {}


async def test_nothing_is_seeded_without_a_model_or_a_runtime(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    server.loaded = None
    assert await caches.seed(probe, LEAD, NAME) is Hitch.UNREACHABLE
    server.loaded, server.fails = QWEN.name, True
    assert await caches.seed(probe, LEAD, NAME) is Hitch.REFUSED
    server.models = [replace(QWEN, name="org/name")]
    server.loaded, server.fails = "org/name", False
    assert await caches.seed(probe, LEAD, NAME) is Hitch.UNSUPPORTED


async def seeded(probe: Probe, caches: NamedCaches) -> None:
    assert isinstance(await caches.seed(probe, LEAD, NAME), Seeded)


async def test_a_cache_is_mentioned_only_after_it_was_measured_to_help(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    server.reuses = True
    await seeded(probe, caches)
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.NOTHING
    assert await caches.prove(probe, LEAD, KEPT) is True
    ready = await caches.ready(probe, LEAD, KEPT)
    assert (ready.how, ready.edits) == (Readied.NAMED, {"model": QWEN.name, "use_cache": NAME})
    await caches.landed(probe, LEAD, ready, Evidence())
    other = lead_of_prompt("Something else. " * 40)
    assert (await caches.ready(probe, other, KEPT)).how is Readied.NOTHING
    assert (await caches.ready(probe, None, KEPT)).how is Readied.NOTHING
    assert (await caches.ready(probe, LEAD, None)).how is Readied.NOTHING


async def test_a_hit_that_saves_nothing_proves_nothing(
    server: RockchipLlama, probe: Probe, caches: NamedCaches, session: ClientSession
) -> None:
    await seeded(probe, caches)
    body = {**LEAD.with_user("hello"), "model": QWEN.name, "use_cache": NAME}
    _, answer = await post(session, CHAT, body)
    assert answer["usage"]["cache_hit"] is True
    assert await caches.prove(probe, LEAD, KEPT) is False
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.NOTHING


async def test_measuring_sends_whole_prompts_in_turn_and_never_the_same_twice(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    await seeded(probe, caches)
    await caches.prove(probe, LEAD, KEPT)
    bodies = server.bodies(CHAT)
    assert [body.get("use_cache") for body in bodies] == [None, NAME] * 3
    assert all(body["messages"][0]["content"] == SYSTEM for body in bodies)
    assert len({body["messages"][-1]["content"] for body in bodies}) == 6
    assert len({len(run.fed) for run in server.npu.runs}) == 1
    assert all((body["stream"], body["max_tokens"], body["model"]) == (True, 1, QWEN.name) for body in bodies)


@pytest.mark.parametrize(("saving", "helps"), [(0.25, False), (0.35, True)])
async def test_thirty_per_cent_of_the_time_must_be_saved(probe: Probe, saving: float, helps: bool) -> None:
    told = itertools.count()

    def clock() -> float:
        """Asked at the beginning and at the first token of each run, every other of which has a cache."""
        run, is_end = divmod(next(told), 2)
        return is_end * (1 - saving * (run % 2))

    assert await NamedCaches(clock).prove(probe, LEAD, KEPT) is helps


@pytest.mark.parametrize("fault", ["fails", "breaks", "run_error", "deadlocked"])
async def test_a_failed_call_is_no_measurement(
    server: RockchipLlama, probe: Probe, caches: NamedCaches, fault: str
) -> None:
    """Errors come faster than answers, under status 200."""
    await seeded(probe, caches)
    setattr(server, fault, True)
    assert await caches.prove(probe.within(0.1) if fault == "deadlocked" else probe, LEAD, KEPT) is None
    server.deadlocked = False
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.NOTHING


async def proved(server: RockchipLlama, probe: Probe, caches: NamedCaches) -> None:
    server.reuses = True
    await seeded(probe, caches)
    assert await caches.prove(probe, LEAD, KEPT) is True


async def test_another_models_cache_is_never_mentioned(
    server: RockchipLlama, probe: Probe, caches: NamedCaches, session: ClientSession
) -> None:
    await proved(server, probe, caches)
    server.loaded = TINY.name
    ready = await caches.ready(probe, LEAD, KEPT)
    assert (ready.how, ready.edits) == (Readied.SKIPPED, {})
    assert server.poisoned == 0
    await post(session, CHAT, {**LEAD.with_user("hello"), "model": QWEN.name, "use_cache": NAME})
    assert server.poisoned == 1, "the server itself does not care"


async def test_a_cache_that_is_gone_is_refused_once(server: RockchipLlama, probe: Probe, caches: NamedCaches) -> None:
    await proved(server, probe, caches)
    del server.caches[QWEN.name][NAME]
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.REFUSED
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.NOTHING


async def test_a_server_in_trouble_is_sent_the_call_as_it_is(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    await proved(server, probe, caches)
    server.loaded = None
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.SKIPPED
    server.deadlocked = True
    assert (await caches.ready(probe.within(0.1), LEAD, KEPT)).how is Readied.SKIPPED


@pytest.mark.parametrize("how", ["restart", "seed", "forget"])
async def test_what_was_proved_is_measured_again(
    server: RockchipLlama, probe: Probe, caches: NamedCaches, how: str
) -> None:
    await proved(server, probe, caches)
    match how:
        case "restart":
            caches.reset()
        case "seed":
            await seeded(probe, caches)
        case _:
            assert await caches.forget(probe, KEPT)
    assert (await caches.ready(probe, LEAD, KEPT)).how is Readied.NOTHING


async def test_forgetting_deletes_it_whichever_model_it_was_for(
    server: RockchipLlama, probe: Probe, caches: NamedCaches
) -> None:
    await seeded(probe, caches)
    server.loaded = TINY.name
    assert await caches.forget(probe, KEPT) is True
    assert server.caches[QWEN.name] == {}
    assert await caches.forget(probe, KEPT) is False


async def test_the_servers_own_caches_are_listed(server: RockchipLlama, probe: Probe, caches: NamedCaches) -> None:
    await seeded(probe, caches)
    listed = await caches.listing(probe)
    assert listed is not None
    (one,) = listed
    prompt = server.caches[QWEN.name][NAME].prompt
    assert (one.name, one.model, one.bytes, one.chars, one.source) == (NAME, QWEN.name, len(prompt), len(prompt), "api")
    assert one.created_at > 0
    server.loaded = None
    assert await caches.listing(probe) is None


# What the server does: the emulator keeps to what was seen of the real one


async def test_sampling_fields_have_no_effect_and_limits_are_silent(
    server: RockchipLlama, session: ClientSession
) -> None:
    server.answer = lambda prompt: [" word"] * 600
    for limit, words in ((None, 512), (0, 512), (-1, 512), (3, 3)):
        _, answer = await post(session, CHAT, chat("hi", max_tokens=limit, temperature=0, seed=1, stop=["w"]))
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == words


async def test_any_model_name_is_answered_by_what_is_loaded(server: RockchipLlama, session: ClientSession) -> None:
    _, answer = await post(session, CHAT, {**chat("hi"), "model": "gpt-4o"})
    assert answer["model"] == "gpt-4o"
    server.loaded = None
    await post(session, CHAT, {**chat("hi"), "model": "gpt-4o"})
    assert server.loaded == TINY.name, "the smallest"
    server.loaded = None
    await ask(session, "hi")
    assert server.loaded == QWEN.name


async def test_one_inference_at_a_time_and_a_queue(server: RockchipLlama, session: ClientSession) -> None:
    server.npu.go.clear()
    calls = [asyncio.create_task(ask(session, str(number))) for number in range(3)]
    await eventually(lambda: len(server.asked) == 3)
    assert len(server.npu.runs) == 1
    server.npu.go.set()
    assert len(set(await asyncio.gather(*calls))) == 3


async def leave_early(session: ClientSession, server: RockchipLlama, path: str, body: object) -> None:
    """Begin a stream, and hang up after its first piece."""
    server.npu.free = 1
    server.npu.go.clear()
    async with session.post(path, json=body) as response:
        await response.content.readany()


async def test_an_abandoned_chat_goes_on_and_the_next_call_waits(server: RockchipLlama, session: ClientSession) -> None:
    await leave_early(session, server, CHAT, chat("hi", stream=True))
    next_call = asyncio.create_task(ask(session, "next"))
    await eventually(lambda: len(server.asked) == 2)
    assert len(server.npu.runs) == 1
    server.npu.go.set()
    assert await next_call
    assert len(server.npu.runs[0].said) == len(server.npu.runs[0].tokens)


async def test_after_an_abandoned_completion_the_next_call_fails(server: RockchipLlama, session: ClientSession) -> None:
    await leave_early(session, server, COMPLETIONS, {"prompt": "hi", "stream": True})
    await eventually(lambda: not server.npu.lane.locked())
    assert await post(session, CHAT, chat("next")) == (500, {"detail": RUN_FAILED})


async def test_streams_end_as_they_should_or_with_an_error(server: RockchipLlama, session: ClientSession) -> None:
    _, stream = await post(session, CHAT, chat("hi", stream=True))
    chunks = events(stream)
    assert chunks[-1] == "[DONE]"
    assert [chunk["usage"] for chunk in chunks[:-2]] == [None] * 4
    assert chunks[-2]["usage"]["completion_tokens"] == len(said(stream).split())
    server.fails = True
    status, stream = await post(session, CHAT, chat("hi", stream=True))
    assert (status, events(stream)) == (200, [{"error": {"message": RUN_FAILED, "type": "internal_error"}}])


async def test_a_run_that_breaks_off_is_an_empty_answer(server: RockchipLlama, session: ClientSession) -> None:
    server.run_error = True
    assert await ask(session, "hi") == ""


async def test_later_turns_reach_the_model_without_their_history(server: RockchipLlama, session: ClientSession) -> None:
    first = await ask(session, "hi")
    await ask(session, "hi", first, "and?")
    assert server.npu.runs[-1].fed.startswith("<|im_end|>\n<|im_start|>user\nand?")


@pytest.mark.parametrize(
    "body",
    [
        {},
        chat("hi", n=2),
        chat("hi", top_k=0),
        {"messages": [{"role": "developer", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": None}]},
    ],
)
async def test_what_its_schema_refuses(session: ClientSession, body: object) -> None:
    status, answer = await post(session, CHAT, body)
    assert status == 422
    assert answer["detail"][0]["loc"][0] == "body"


async def test_cache_errors_and_ollama(server: RockchipLlama, session: ClientSession) -> None:
    here = f"/v1/cache/{QWEN.name}"
    for body, text in (
        ({}, "cache_name is required"),
        ({"cache_name": "a"}, "Either 'prompt' or 'messages' is required"),
        ({"cache_name": "a b", "prompt": "x"}, "cache_name must be alphanumeric (hyphens and underscores allowed)"),
    ):
        assert await post(session, here, body) == (400, {"detail": text})
    assert (await post(session, f"/v1/cache/{TINY.name}", {"cache_name": "a", "prompt": "x"}))[0] == 400
    async with session.delete(f"{here}/system") as response:
        assert response.status == 403
    async with session.get(f"{here}/none") as response:
        assert await response.json() == {"detail": f"Cache 'none' not found for model '{QWEN.name}'"}
    _, answer = await post(session, "/api/chat", chat("hi", stream=True))
    assert answer["done"] is True
    assert server.npu.runs[-1].fed == "User: hi\nAssistant:"
    assert (await post(session, "/v1/embeddings", {"input": "x"}))[0] == 500
