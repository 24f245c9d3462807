"""What nearhit does about prefixes, against a server that imitates slots, and with real files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.upstream.adapter import Probe
from proxy.upstream.prefix import Evidence, Hitch, Kept, Lead, Readied, Ready, Style
from proxy.upstream.prefix_cache import running_prefixes
from proxy.upstream.prefix_terms import Configured, NotRunning, PrefixRefused, Running
from tests.conftest import eventually
from tests.upstream.imitation import Imitation, Scene, Stage, imitation_server, lead

SUPPORT = Configured("support", lead("support"))
LEGAL = Configured("legal", lead("legal"))
SALES = Configured("sales", lead("sales"))


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    files = tmp_path / "slots"
    await asyncio.to_thread(files.mkdir)
    async with imitation_server(files) as server:
        yield Scene(tmp_path, server)


async def on_disk(scene: Scene) -> list[str]:
    """The names of the records."""
    folder = scene.folder / "prefixes"
    return await asyncio.to_thread(lambda: sorted(path.stem for path in folder.rglob("*.json")))


async def slot_files(scene: Scene) -> list[int]:
    """The sizes of the files that the server keeps."""
    folder = scene.server.files
    assert folder is not None
    return await asyncio.to_thread(lambda: [path.stat().st_size for path in folder.iterdir()])


async def is_ready(stage: Stage) -> None:
    await eventually(lambda: stage.cache.readiness()[0])


async def learned(stage: Stage, prompt: Lead) -> str:
    """Call until a prompt was learned and seeded; its name."""
    for _ in range(stage.scene.terms.learn_after):
        await stage.call(prompt)
    name = f"learned-{prompt.id.hex()[:12]}"
    await eventually(lambda: stage.states().get(name) in ("seeded", "warm"))
    return name


async def test_configured_prefixes_are_seeded_before_readiness_and_found_by_the_first_call(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin(SUPPORT, LEGAL) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
        ready, reason = stage.cache.readiness()
        assert not ready
        assert "legal" in reason
        assert "support" in reason
        scene.server.open.set()
        await is_ready(stage)
        assert stage.cache.readiness() == (True, "2 of 2 prefixes are seeded")
        assert stage.states() == {"legal": "seeded", "support": "seeded"}
        assert await stage.cached(SUPPORT.lead) == 100
        assert stage.counts.seeds == 2
        assert stage.counts.tokens == 100


async def test_more_system_prompts_than_slots_are_all_restored(scene: Scene) -> None:
    prompts = [Configured(f"service-{number}", lead(f"service{number}")) for number in range(8)]
    async with scene.begin(*prompts) as stage:
        await is_ready(stage)
        for turn in range(2):
            for one in prompts:
                assert await stage.cached(one.lead, f"question {turn}") >= 100, one.name
        assert stage.counts.restores.count(Readied.RESTORED) >= 14
        assert stage.counts.loads == stage.counts.restores.count(Readied.RESTORED)
        assert len(scene.server.prefilled) == 8
        assert stage.row("service-3").effective is True
        assert stage.row("service-3").restores >= 1


async def test_what_clients_use_is_learned_and_seeded_when_idle(scene: Scene) -> None:
    async with scene.begin() as stage:
        assert stage.cache.readiness() == (True, "no prefixes are configured")
        for _ in range(2):
            await stage.call(SUPPORT.lead)
            await stage.call(None)
        assert stage.cache.listing() == []
        name = await learned(stage, SUPPORT.lead)
        row = stage.row(name)
        assert (row.source, row.model, row.chars, row.tokens) == ("learned", "small", SUPPORT.lead.chars, 100)
        assert row.bytes > 0
        assert row.created_at > 0


async def test_nothing_is_learned_with_zero(scene: Scene) -> None:
    scene.terms = replace(scene.terms, learn_after=0)
    async with scene.begin() as stage:
        for _ in range(20):
            await stage.call(SUPPORT.lead)
        assert stage.cache.listing() == []


async def test_a_call_stops_a_seeding_which_is_not_lost(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin(SUPPORT) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
        await stage.call(LEGAL.lead)
        assert stage.counts.preemptions == 1
        scene.server.open.set()
        await is_ready(stage)
        assert stage.states()["support"] == "seeded"


async def test_a_server_that_cannot_be_interrupted_is_left_to_finish(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin(SUPPORT, prefixing=Imitation(cancels=False)) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
        await stage.call(LEGAL.lead)
        assert scene.server.prefilling == 1
        scene.server.open.set()
        await is_ready(stage)
        assert stage.counts.preemptions == 0


async def test_files_survive_restarts_of_nearhit_and_of_the_server(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        learned_name = await learned(stage, LEGAL.lead)
    scene.server.restart()
    async with scene.begin(SUPPORT) as stage:
        assert stage.cache.readiness()[0]
        assert stage.states() == {"support": "seeded", learned_name: "seeded"}
        assert await stage.cached(SUPPORT.lead) == 100
        assert await stage.cached(LEGAL.lead) == 100
        scene.server.restart()
        stage.cache.restarted()
        assert stage.prefixing.resets == 1
        assert await stage.cached(SUPPORT.lead) == 100
        assert scene.server.prefilled == ["support-0", "legal-0"]


async def test_when_it_was_used_is_known_after_a_restart(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        seeded_at = stage.row("support").used_at
        await stage.call(SUPPORT.lead)
        used_at = stage.row("support").used_at
        assert used_at > seeded_at
    async with scene.begin(SUPPORT) as stage:
        assert stage.row("support").used_at == used_at


async def test_another_model_is_seeded_anew_and_the_first_finds_its_files_again(scene: Scene) -> None:
    first, second = Running(b"\1" * 32, "small"), Running(b"\2" * 32, "small")
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        name = await learned(stage, LEGAL.lead)
        scene.running = second
        assert stage.cache.listing()[0].state == "wanted"
        await eventually(lambda: {stage.row("support").state, stage.row(name).state} == {"seeded"})
        assert scene.server.prefilled == ["support-0", "legal-0"] * 2
        assert len(await slot_files(scene)) == 4
        scene.running = first
        assert await stage.cached(SUPPORT.lead) == 100
        assert stage.counts.restores[-1] is Readied.RESTORED
    async with scene.begin(SUPPORT) as stage:
        assert stage.cache.readiness()[0]
        assert stage.states()["support"] == "seeded"
        scene.running = second
        assert {stage.row("support").state, stage.row(name).state} == {"seeded"}
    assert len(scene.server.prefilled) == 4


async def test_a_refused_file_is_dropped_and_seeded_once_more(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        await stage.call(SUPPORT.lead)
        scene.server.refuses_files = True
        await stage.call(SUPPORT.lead)
        assert stage.counts.restores[-1] is Readied.REFUSED
        await eventually(lambda: stage.counts.seeds == 2 and stage.row("support").state == "seeded")
        stage.prefixing.reset()
        await stage.call(SUPPORT.lead)
        assert stage.row("support").state == "failed"
        assert stage.row("support").reason == "the server refused its file, twice"
        await stage.cache.settled()
        assert await slot_files(scene) == []
        assert await on_disk(scene) == []
        assert stage.counts.seeds == 2


async def test_files_that_do_not_help_are_dropped_and_never_tried_again(scene: Scene) -> None:
    scene.server.useless_files = True
    async with scene.begin(SUPPORT, LEGAL, SALES) as stage:
        await is_ready(stage)
        for _ in range(2):
            for one in (SUPPORT, LEGAL, SALES):
                await stage.call(one.lead)
        assert len(scene.server.restored) == 2
        row = stage.row("legal")
        assert row.effective is not True
        assert row.reason == "restoring its file does not help this model"
        await stage.cache.settled()
        assert await slot_files(scene) == []
    scene.server.restored.clear()
    async with scene.begin(SUPPORT, LEGAL, SALES) as stage:
        await is_ready(stage)
        assert set(stage.states().values()) == {"warm"}
        for _ in range(3):
            await stage.call(SUPPORT.lead)
        assert scene.server.restored == []


async def test_warm_ups_that_do_not_help_end_too(scene: Scene) -> None:
    scene.server.files, scene.server.forgetful = None, True
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert stage.states() == {"support": "warm"}
        await stage.call(SUPPORT.lead)
        await eventually(lambda: stage.counts.seeds == 2 and stage.states() == {"support": "warm"})
        await stage.call(SUPPORT.lead)
        assert stage.states() == {"support": "ineffective"}
        assert stage.row("support").effective is False
        stage.cache.restarted()
        await stage.call(SUPPORT.lead)
        assert stage.counts.seeds == 2


async def test_calls_in_between_say_nothing_about_a_warm_up(scene: Scene) -> None:
    scene.server.files, scene.server.forgetful = None, True
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        for _ in range(3):
            await stage.call(LEGAL.lead)
            await stage.call(SUPPORT.lead)
        assert stage.row("support").state == "warm"
        assert stage.row("support").effective is None


async def test_without_files_prefixes_are_warmed_again_once_after_each_restart(scene: Scene) -> None:
    scene.server.files = None
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert await stage.cached(SUPPORT.lead) == 100
        scene.server.restart()
        stage.cache.restarted()
        await eventually(lambda: stage.counts.seeds == 2 and stage.states() == {"support": "warm"})
        assert await stage.cached(SUPPORT.lead) == 100
        assert stage.row("support").effective is True
        assert stage.counts.tokens == 200
    assert scene.server.prefilled == ["support-0"] * 2


async def test_a_server_that_saves_nothing_is_not_asked_for_ever(scene: Scene) -> None:
    scene.server.save_status = 500
    async with scene.begin(SUPPORT) as stage:
        await eventually(lambda: stage.states() == {"support": "failed"})
        assert stage.row("support").reason == "the server computed it, and did not save it, twice"
        assert stage.cache.readiness()[0]
        assert len(scene.server.prefilled) == 2


async def test_a_refused_seed_is_tried_once_more(scene: Scene) -> None:
    scene.server.prefill_status = 500
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert stage.row("support").reason == "the server refused to compute it, twice"
        assert "support (the server refused to compute it, twice)" in stage.cache.readiness()[1]
        assert stage.counts.hitches == [Hitch.REFUSED] * 2


async def test_a_server_that_is_loading_is_asked_until_it_answers(scene: Scene) -> None:
    scene.server.prefill_status = 503
    async with scene.begin(SUPPORT) as stage:
        await eventually(lambda: len(stage.counts.hitches) > 2)
        assert not stage.cache.readiness()[0]
        assert stage.row("support").reason == "the server did not answer"
        scene.server.prefill_status = 200
        await is_ready(stage)
        assert stage.states() == {"support": "seeded"}


async def test_what_is_too_short_is_left_alone(scene: Scene) -> None:
    async with scene.begin(Configured("brief", lead("brief", words=3))) as stage:
        await is_ready(stage)
        assert stage.row("brief").state == "failed"
        assert stage.row("brief").reason == "it is too short to be worth the trouble"


async def test_seeding_that_takes_too_long_is_given_up_after_two_times(scene: Scene) -> None:
    scene.terms = replace(scene.terms, seed_timeout_s=0.05)
    scene.server.open.clear()
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert stage.row("support").reason == "it took longer than 0.05 seconds, twice"


async def test_readiness_has_a_limit_and_latches(scene: Scene) -> None:
    scene.terms = replace(scene.terms, ready_timeout_s=0.05)
    scene.running = None
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        first = stage.cache.readiness()
        assert first == (True, "prefixes are not seeded: the upstream does not show what it runs")
        scene.running = Running(b"\1" * 32, "small")
        await eventually(lambda: stage.states() == {"support": "seeded"})
        assert stage.cache.readiness() == first


@pytest.mark.parametrize("model", ["large", "small", "tiny", ""])
async def test_a_prefix_of_another_model_is_not_waited_for(scene: Scene, model: str) -> None:
    scene.running = Running(b"\1" * 32, "small", frozenset({"tiny"}))
    async with scene.begin(replace(SUPPORT, model=model)) as stage:
        await is_ready(stage)
        reason = stage.cache.readiness()[1]
        if model == "large":
            assert reason == "0 of 1 prefixes are seeded; not large/support (model large is not loaded)"
            assert stage.row("support").reason == "its model is not loaded"
        else:
            assert reason == "1 of 1 prefixes are seeded"
            assert [row.model for row in stage.cache.listing()] == ["small"]


async def test_a_kind_of_server_that_cannot_be_seeded_is_said_to_be_one(scene: Scene) -> None:
    async with scene.begin(SUPPORT, prefixing=Imitation(Style.NONE)) as stage:
        assert stage.cache.readiness() == (True, "prefixes are not seeded: this kind of server cannot be")
        assert await stage.cached(SUPPORT.lead) == 0
        assert stage.row("support").state == "failed"
        with pytest.raises(PrefixRefused, match="cannot be seeded"):
            await stage.cache.create("mine", LEGAL.lead)


async def test_named_caches_are_used_only_once_measured(scene: Scene) -> None:
    scene.server.silent = True
    scene.server.caches_help = None
    async with scene.begin(SUPPORT, LEGAL, prefixing=Imitation(Style.NAMED, cancels=False)) as stage:
        await eventually(lambda: scene.server.measured >= 1)
        assert len(scene.server.prefilled) == 1
        assert (await stage.call(SUPPORT.lead)).json["use_cache"] is None
        scene.server.caches_help = True
        await eventually(lambda: set(stage.states().values()) == {"seeded"} and stage.row("legal").reason == "")
        assert str((await stage.call(SUPPORT.lead)).json["use_cache"]).startswith("nearhit-")
        assert stage.counts.restores == [Readied.NAMED]
        assert stage.row("support").effective is True


async def test_named_caches_that_do_not_help_are_deleted_and_left_alone(scene: Scene) -> None:
    scene.server.silent, scene.server.caches_help = True, False
    async with scene.begin(SUPPORT, LEGAL, prefixing=Imitation(Style.NAMED)) as stage:
        await is_ready(stage)
        await eventually(lambda: set(stage.states().values()) == {"ineffective"})
        assert (await stage.call(SUPPORT.lead)).json["use_cache"] is None
        await eventually(lambda: len(scene.server.deleted) == 1)
    async with scene.begin(SUPPORT, LEGAL, prefixing=Imitation(Style.NAMED)) as stage:
        assert set(stage.states().values()) == {"ineffective"}
        assert stage.cache.readiness()[0]
        await stage.call(SUPPORT.lead)
    assert len(scene.server.prefilled) == 1
    assert scene.server.measured == 1


async def test_named_caches_are_measured_again_after_a_restart_of_the_server(scene: Scene) -> None:
    scene.server.silent = True
    async with scene.begin(SUPPORT, prefixing=Imitation(Style.NAMED)) as stage:
        await eventually(lambda: stage.row("support").reason == "" and stage.row("support").state == "seeded")
        stage.cache.restarted()
        assert (await stage.call(SUPPORT.lead)).json["use_cache"] is None
        await eventually(lambda: scene.server.measured == 2)
        assert len(scene.server.prefilled) == 1


async def test_words_are_not_kept_where_only_digests_may_be(scene: Scene) -> None:
    async with scene.begin() as stage:
        await learned(stage, LEGAL.lead)
    assert (len(await on_disk(scene)), len(await slot_files(scene))) == (1, 1)
    scene.terms = replace(scene.terms, keeps_readable=False)
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        await stage.cache.settled()
        assert await on_disk(scene) == ["support"]
        name = await learned(stage, SALES.lead)
        assert stage.states() == {"support": "seeded", name: "warm"}
        assert await stage.cached(SALES.lead) >= 100
        await stage.cache.settled()
        assert await on_disk(scene) == ["support"]
        assert len(await slot_files(scene)) == 1


async def test_disk_space_is_bounded_and_what_was_asked_for_stays(scene: Scene) -> None:
    scene.max_bytes = 9_000
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        names = [await learned(stage, lead(f"topic{number}")) for number in range(6)]
        await stage.cache.settled()
        assert sum(await slot_files(scene)) <= 9_000
        assert stage.states()["support"] == "seeded"
        assert stage.states()[names[-1]] == "seeded"
        assert names[0] not in stage.states()
        # It takes more calls than before to have it seeded again.
        before = stage.counts.seeds
        for _ in range(scene.terms.learn_after):
            await stage.call(lead("topic0"))
        assert names[0] not in stage.states()
        assert stage.counts.seeds == before


async def test_a_file_larger_than_all_room_is_not_kept(scene: Scene) -> None:
    scene.max_bytes = 5_000
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        await stage.cache.create("huge", lead("huge", words=2_000))
        assert stage.row("huge").reason == "its file alone is larger than prefixes.max_bytes"
        await stage.cache.settled()
        assert len(await slot_files(scene)) == 1
        assert stage.states()["support"] == "seeded"


async def test_where_files_are_not_seen_names_are_used_again(scene: Scene) -> None:
    scene.sees_files, scene.ring = False, 3
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        names = [await learned(stage, lead(f"topic{number}")) for number in range(4)]
        assert len(await slot_files(scene)) == 3
        assert stage.states() == {"support": "seeded", names[2]: "seeded", names[3]: "seeded"}
        stage.prefixing.reset()
        assert await stage.cached(lead("topic3")) >= 100
        assert await stage.cached(SUPPORT.lead) >= 100
    async with scene.begin(SUPPORT) as stage:
        assert stage.states() == {"support": "seeded", names[2]: "seeded", names[3]: "seeded"}


async def test_more_configured_than_names_says_what_to_do(scene: Scene) -> None:
    scene.sees_files, scene.ring = False, 1
    async with scene.begin(SUPPORT, LEGAL) as stage:
        await is_ready(stage)
        assert sorted(stage.states().values()) == ["failed", "seeded"]
        assert "raise prefixes.ring" in stage.cache.readiness()[1]
        with pytest.raises(PrefixRefused, match=r"prefixes\.ring"):
            await stage.cache.create("mine", SALES.lead)


async def test_without_any_place_for_files_there_are_warm_ups(scene: Scene) -> None:
    scene.sees_files, scene.ring = False, 0
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert stage.states() == {"support": "warm"}
        assert await slot_files(scene) == []


async def test_prefixes_can_be_made_replaced_and_deleted(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        made = await stage.cache.create("mine", LEGAL.lead, "small")
        assert made.hitch is None
        assert made.seconds > 0
        assert (made.row.name, made.row.state, made.row.source) == ("mine", "seeded", "api")
        again = await stage.cache.create("mine", SALES.lead)
        assert again.row.state == "seeded"
        assert sorted(stage.states()) == ["mine", "support"]
        assert await stage.cache.remove("mine", "small")
        assert not await stage.cache.remove("mine", "small")
        assert not await stage.cache.remove("support", "large")
        assert await on_disk(scene) == ["support"]
        assert len(await slot_files(scene)) == 1
        with pytest.raises(NotRunning, match="'large' is not loaded; 'small' is"):
            await stage.cache.create("mine", SALES.lead, "large")
        with pytest.raises(PrefixRefused, match="'support' is configured"):
            await stage.cache.create("support", SALES.lead)
        scene.running = None
        with pytest.raises(NotRunning):
            await stage.cache.create("mine", SALES.lead)


async def test_one_that_was_asked_for_survives_and_follows_the_model(scene: Scene) -> None:
    async with scene.begin() as stage:
        await stage.cache.create("mine", LEGAL.lead)
    scene.running = Running(b"\2" * 32, "small")
    async with scene.begin() as stage:
        await eventually(lambda: stage.states().get("mine") == "seeded")
        assert scene.server.prefilled == ["legal-0"] * 2


async def test_one_asked_for_while_calls_come_is_seeded_later(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin() as stage:
        asked = asyncio.create_task(stage.cache.create("mine", LEGAL.lead))
        await eventually(lambda: scene.server.prefilling == 1)
        await stage.call(SALES.lead)
        assert (await asked).hitch is Hitch.BUSY
        assert stage.row("mine").reason == "calls came in between"
        scene.server.open.set()
        await eventually(lambda: stage.states()["mine"] == "seeded")


async def test_a_configured_one_that_is_deleted_comes_back(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert await stage.cache.remove("support", "small")
        await eventually(lambda: stage.counts.seeds == 2 and stage.states() == {"support": "seeded"})


async def test_a_fault_in_preparing_costs_no_call(scene: Scene) -> None:
    class Broken(Imitation):
        async def ready(self, probe: object, lead: Lead | None, kept: Kept | None) -> Ready:
            raise KeyError("slots")

        async def landed(self, probe: object, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
            raise ValueError("tokens")

    async with scene.begin(SUPPORT, prefixing=Broken()) as stage:
        await is_ready(stage)
        assert (await stage.call(SUPPORT.lead)).status == 200
        assert (await stage.call(None)).status == 200
        assert stage.counts.restores == [Readied.SKIPPED]


async def test_preparing_a_call_has_a_limit(scene: Scene) -> None:
    class Slow(Imitation):
        async def ready(self, probe: object, lead: Lead | None, kept: Kept | None) -> Ready:
            await asyncio.Event().wait()
            raise AssertionError

    scene.terms = replace(scene.terms, restore_timeout_s=0.02)
    async with scene.begin(SUPPORT, prefixing=Slow()) as stage:
        await is_ready(stage)
        assert (await stage.call(SUPPORT.lead)).status == 200
        assert stage.counts.restores == [Readied.SKIPPED]


async def test_a_full_disk_costs_nothing_but_the_memory_of_it(scene: Scene) -> None:
    folder = scene.folder / "prefixes"
    await asyncio.to_thread(folder.write_text, "no folder")
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert stage.states() == {"support": "seeded"}
        assert await stage.cached(SUPPORT.lead) == 100
        assert await stage.cached(SUPPORT.lead) >= 100
        await stage.cache.remove("support", "small")


async def test_closing_in_the_middle_of_a_seeding_leaves_nothing(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin(SUPPORT) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
    await eventually(lambda: scene.server.prefilling == 0)
    await stage.cache.close()
    scene.server.open.set()
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
    with pytest.raises(RuntimeError):
        async with running_prefixes(stage.cache):
            raise AssertionError("it was closed")


async def test_what_another_model_computed_is_thrown_away(scene: Scene) -> None:
    scene.server.open.clear()
    async with scene.begin(SUPPORT, prefixing=Imitation(Style.NAMED, cancels=False)) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
        scene.running = Running(b"\2" * 32, "small")
        scene.server.open.set()
        await eventually(lambda: len(scene.server.deleted) == 1)
        await eventually(lambda: stage.states() == {"support": "seeded"})
        assert len(scene.server.prefilled) == 2


async def test_a_folder_that_is_not_the_servers_is_noticed(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = scene.folder / "elsewhere"
    await asyncio.to_thread(elsewhere.mkdir)
    scene.slot_dir, scene.ring = elsewhere, 1
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        assert "do not appear in upstream.slot_dir" in caplog.text
        assert await stage.cached(SUPPORT.lead) == 100
        for number in range(3):
            await learned(stage, lead(f"topic{number}"))
        assert len(await slot_files(scene)) == 2


async def test_what_is_being_restored_makes_no_room(scene: Scene) -> None:
    class Slow(Imitation):
        hold = asyncio.Event()
        restoring = 0

        async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
            if kept is not None:
                self.restoring += 1
                await self.hold.wait()
            return await super().ready(probe, lead, kept)

    async with scene.begin() as stage:
        names = [await learned(stage, SUPPORT.lead), await learned(stage, LEGAL.lead)]
    folder = scene.folder / "prefixes" / "small"
    records = await asyncio.to_thread(lambda: sum(path.stat().st_size for path in folder.glob("*.json")))
    scene.max_bytes = sum(await slot_files(scene)) + records + 1_000
    prefixing = Slow()
    async with scene.begin(prefixing=prefixing) as stage:
        assert sorted(stage.states()) == sorted(names)
        asked = asyncio.create_task(stage.cache.before(stage.probe, SUPPORT.lead, b"\1" * 32))
        await eventually(lambda: prefixing.restoring == 1)
        await stage.cache.create("mine", SALES.lead)
        assert stage.states() == {names[0]: "seeded", "mine": "seeded"}
        prefixing.hold.set()
        assert (await asked).how is Readied.RESTORED


async def test_what_was_learned_and_is_configured_then_is_not_computed_again(scene: Scene) -> None:
    async with scene.begin() as stage:
        await learned(stage, SUPPORT.lead)
    async with scene.begin(SUPPORT) as stage:
        assert stage.cache.readiness() == (True, "1 of 1 prefixes are seeded")
        assert stage.states() == {"support": "seeded"}
        assert stage.row("support").source == "config"
        assert await stage.cached(SUPPORT.lead) >= 100
        assert len(scene.server.prefilled) == 1


async def test_a_record_that_people_have_broken_is_left_alone(scene: Scene) -> None:
    async with scene.begin() as stage:
        name = await learned(stage, SUPPORT.lead)
        lead_id = SUPPORT.lead.id.hex()
    path = scene.folder / "prefixes" / "small" / f"{name}.json"
    text = await asyncio.to_thread(path.read_text)
    await asyncio.to_thread(path.write_text, text.replace(lead_id, "no number"))
    async with scene.begin() as stage:
        assert stage.cache.listing() == []
        assert (await stage.call(SUPPORT.lead)).status == 200


async def test_replies_that_land_after_the_end_do_no_harm(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        stage.prefixing.reset()
        ready = await stage.cache.before(stage.probe, SUPPORT.lead, b"\1" * 32)
        await stage.cache.close()
        await stage.cache.after(stage.probe, SUPPORT.lead, ready, Evidence(100, 5), b"\1" * 32)
        assert stage.counts.tokens == 100


async def test_leads_that_come_once_do_not_pile_up(scene: Scene) -> None:
    scene.terms = replace(scene.terms, learn_after=1, max_known=4)
    async with scene.begin() as stage:
        for number in range(12):
            await stage.call(lead(f"topic{number}"))
        await eventually(lambda: set(stage.states().values()) == {"seeded"})
        assert len(stage.states()) <= 8
        for number in range(12, 24):
            await learned(stage, lead(f"topic{number}"))
        assert len(stage.states()) <= 8
        await stage.cache.settled()
        assert len(await slot_files(scene)) <= 8


FIRST, SECOND = Running(b"\1" * 32, "small"), Running(b"\2" * 32, "small")


def swap(scene: Scene, running: Running, weights: str) -> None:
    """Another model, in another run of the server."""
    scene.running, scene.server.weights = running, weights
    scene.server.restart()


@pytest.mark.parametrize("model", ["small", "large"])
@pytest.mark.parametrize("ring", [1, 2, 3])
async def test_no_model_is_given_what_another_computed_under_the_same_name(scene: Scene, ring: int, model: str) -> None:
    scene.sees_files, scene.ring = False, ring
    prompts = [SUPPORT.lead, *(lead(f"topic{number}") for number in range(2))]

    async def use(stage: Stage) -> None:
        await eventually(lambda: stage.row("support").state == "seeded")
        for prompt in prompts[1:] * scene.terms.learn_after:
            await stage.call(prompt)
        await eventually(lambda: stage.cache.pending() is None and not stage.lane.seeding_now)
        for prompt in prompts:
            stage.prefixing.reset()
            await stage.call(prompt)

    async with scene.begin(SUPPORT) as stage:
        for running, weights in ((FIRST, "first"), (replace(SECOND, model=model), "second")) * 2:
            swap(scene, running, weights)
            await use(stage)
    for running, weights in ((FIRST, "first"), (replace(SECOND, model=model), "second")) * 2:
        swap(scene, running, weights)
        async with scene.begin(SUPPORT) as stage:
            await use(stage)
    assert scene.server.poisoned == 0
    assert scene.server.restored
    assert len(await slot_files(scene)) <= ring


async def test_a_name_is_not_used_again_while_the_disk_remembers_what_it_stood_for(scene: Scene) -> None:
    scene.sees_files, scene.ring = False, 1
    folder, away = scene.folder / "prefixes" / "small", scene.folder / "away"
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
        await stage.cache.settled()
        await asyncio.to_thread(folder.rename, away)
        await asyncio.to_thread(folder.write_text, "in the way")
        swap(scene, SECOND, "second")
        await eventually(lambda: stage.row("support").state == "failed")
        assert stage.row("support").reason == "the disk refused to forget what was kept under its name, twice"
    await asyncio.to_thread(folder.unlink)
    await asyncio.to_thread(away.rename, folder)
    swap(scene, FIRST, "first")
    async with scene.begin(SUPPORT) as stage:
        assert await stage.cached(SUPPORT.lead) == 100
        assert stage.counts.restores == [Readied.RESTORED]
    assert scene.server.poisoned == 0


async def test_what_somebody_asked_for_comes_back_after_another_model_took_its_name(scene: Scene) -> None:
    scene.sees_files, scene.ring = False, 1
    async with scene.begin() as stage:
        await stage.cache.create("mine", LEGAL.lead)
        swap(scene, replace(SECOND, model="large"), "second")
        await stage.cache.create("theirs", SALES.lead)
        assert stage.states() == {"mine": "wanted", "theirs": "seeded"}
        swap(scene, FIRST, "first")
        await eventually(lambda: stage.states() == {"mine": "seeded", "theirs": "wanted"})
        assert await stage.cached(LEGAL.lead) == 100


async def test_of_two_processes_one_keeps_files_under_names_that_are_used_again(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.sees_files, scene.ring = False, 2
    async with scene.begin(SUPPORT) as one:
        await is_ready(one)
        async with scene.begin(SUPPORT, LEGAL) as other:
            await is_ready(other)
            assert other.states() == {"legal": "warm", "support": "warm"}
            await other.call(SUPPORT.lead)
            assert other.counts.restores == []
        assert await one.cached(SUPPORT.lead) >= 100
        assert one.states()["support"] == "seeded"
    assert caplog.text.count("another process keeps prefixes of this upstream") == 1
    async with scene.begin(LEGAL) as stage:
        await eventually(lambda: stage.states()["legal"] == "seeded")


@pytest.mark.parametrize("again", [Running(b"\1" * 32, "small", run="2"), None])
async def test_what_another_run_may_have_computed_is_computed_again(scene: Scene, again: Running | None) -> None:
    scene.running = Running(b"\1" * 32, "small", run="1")
    scene.server.open.clear()
    async with scene.begin(SUPPORT, prefixing=Imitation(cancels=False)) as stage:
        await eventually(lambda: scene.server.prefilling == 1)
        scene.running = again
        scene.server.open.set()
        await eventually(lambda: scene.server.prefilled == ["support-0"] and not stage.lane.seeding_now)
        scene.running = Running(b"\1" * 32, "small", run="2")
        await eventually(lambda: stage.states() == {"support": "seeded"})
        assert scene.server.prefilled == ["support-0"] * 2
        assert stage.counts.seeds == 1


async def test_what_a_run_computed_that_nobody_has_looked_at_is_computed_again(scene: Scene) -> None:
    scene.running, scene.server.instance = replace(FIRST, instance="one"), "two"
    async with scene.begin(SUPPORT) as stage:
        await eventually(lambda: len(scene.server.prefilled) >= 2)
        assert stage.states()["support"] != "seeded"
        assert stage.counts.seeds == 0
        scene.running = replace(FIRST, run="2", instance="two")
        await eventually(lambda: stage.states() == {"support": "seeded"})


async def test_the_run_that_a_call_goes_to_is_told_to_whoever_restores(scene: Scene) -> None:
    class Curious(Imitation):
        def __init__(self) -> None:
            super().__init__()
            self.instances: list[str] = []

        async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
            self.instances.append(kept.instance if kept is not None else "none")
            return await super().ready(probe, lead, kept)

    prefixing = Curious()
    scene.instance = "a run"
    async with scene.begin(SUPPORT, prefixing=prefixing) as stage:
        await is_ready(stage)
        await stage.call(SUPPORT.lead)
        assert prefixing.instances == ["a run"]


async def test_what_takes_longer_to_restore_than_to_compute_is_not_restored(scene: Scene) -> None:
    class Slow(Imitation):
        async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
            ready = await super().ready(probe, lead, kept)
            slow = lead is not None and lead.id == SUPPORT.lead.id
            return replace(ready, seconds=60.0 if slow else 0.0) if ready.how is Readied.RESTORED else ready

    async with scene.begin(SUPPORT, LEGAL, prefixing=Slow()) as stage:
        await is_ready(stage)
        for _ in range(5):
            stage.prefixing.reset()
            await stage.call(SUPPORT.lead)
            await stage.call(LEGAL.lead)
        assert scene.server.restored.count("support-0") == 2
        assert scene.server.restored.count("legal-0") > 2
        await stage.cache.settled()
        assert len(await slot_files(scene)) == 1
    async with scene.begin(SUPPORT, LEGAL, prefixing=Slow()) as stage:
        row = stage.row("support")
        assert (row.state, row.reason) == ("ineffective", "restoring it takes longer than computing it")
        assert row.effective is False
        assert stage.row("legal").effective is True
        assert stage.cache.readiness()[0]


async def test_restoring_that_does_not_come_to_an_end_is_given_up(scene: Scene) -> None:
    class Hanging(Imitation):
        asked = 0

        async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
            if kept is not None:
                self.asked += 1
                await asyncio.Event().wait()
            return Ready(Readied.NOTHING)

    scene.terms = replace(scene.terms, restore_timeout_s=0.02)
    prefixing = Hanging()
    async with scene.begin(SUPPORT, prefixing=prefixing) as stage:
        await is_ready(stage)
        for _ in range(5):
            await stage.call(SUPPORT.lead)
        assert prefixing.asked == 2
        assert stage.states() == {"support": "ineffective"}


async def test_a_clock_in_the_prompt_makes_no_files_for_ever(scene: Scene) -> None:
    scene.terms = replace(scene.terms, max_unproved=4)
    minutes = [lead(f"minute{number}") for number in range(20)]

    async def ask(stage: Stage, prompt: Lead, times: int = 3) -> str:
        for _ in range(times):
            await stage.call(prompt)
        return f"learned-{prompt.id.hex()[:12]}"

    async with scene.begin() as stage:
        names = [await ask(stage, prompt) for prompt in minutes]
        await eventually(lambda: stage.states() == dict.fromkeys(names[:4], "seeded"))
        # One that is in use more than they were takes the place of the one that was called longest ago.
        busy = await ask(stage, SUPPORT.lead, 4)
        assert sorted(stage.states()) == sorted([*names[1:4], busy])
        await eventually(lambda: stage.states()[busy] == "seeded")
        stage.prefixing.reset()
        await stage.call(SUPPORT.lead)
        assert stage.row(busy).restores == 1
        # It is in use for certain, and does not count any more.
        other = await ask(stage, LEGAL.lead)
        await eventually(lambda: stage.states().get(other) == "seeded")
        assert sorted(stage.states()) == sorted([*names[1:4], busy, other])
        assert len(scene.server.prefilled) == 6
    async with scene.begin() as stage:
        for prompt in minutes[10:]:
            await ask(stage, prompt)
        assert len(stage.states()) == 5
        assert busy in stage.states()


async def test_only_so_many_are_learned_in_an_hour(scene: Scene) -> None:
    scene.terms = replace(scene.terms, learn_per_hour=2, learn_after=1)
    async with scene.begin() as stage:
        for number in range(6):
            await stage.call(lead(f"topic{number}"))
        assert len(stage.states()) == 2


async def test_two_upstreams_have_prefixes_of_one_name(scene: Scene) -> None:
    async with scene.begin(SUPPORT) as stage:
        await is_ready(stage)
    record = scene.folder / "prefixes" / "small" / "support.json"
    theirs = (await asyncio.to_thread(record.read_text)).replace(scene.server.url, "http://elsewhere")
    await asyncio.to_thread(record.write_text, theirs)
    scene.upstream = scene.server.url
    for _ in range(2):
        async with scene.begin(SUPPORT) as stage:
            await is_ready(stage)
            assert stage.states() == {"support": "seeded"}
            assert await stage.cached(SUPPORT.lead) >= 100
    assert scene.server.prefilled == ["support-0"] * 2, "the second start has found it"
    assert await asyncio.to_thread(record.read_text) == theirs
