"""Work in the background: one thing at a time, and calls come first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from proxy.upstream.adapter import Probe
from proxy.upstream.client import Upstream, UpstreamError, UpstreamUnreachable, client_session
from proxy.upstream.lane import Lane
from proxy.upstream.prefix import Hitch, Kept, Lead, Seeded, Style
from proxy.upstream.prefix_table import Entry, Job, Source, Work
from proxy.upstream.seeding import Outcome, Pending, Proof, Seeder, background
from tests.conftest import eventually
from tests.upstream.imitation import Counts, Imitation, Server, imitation_server, lead


@dataclass
class Agenda:
    """A list of things to do, one after another."""

    todo: list[Pending] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, pending: Pending) -> None:
        self.todo.append(pending)
        self.changed.set()

    def pending(self) -> Pending | None:
        return min(self.todo, key=lambda one: one.idle_s, default=None)

    def pause_s(self) -> float:
        return 60.0

    async def prepared(self, pending: Pending) -> Pending | None:
        return None if pending.file == "in-doubt.kv" else replace(pending, file=f"again-{pending.file}")

    async def done(self, pending: Pending, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.todo = [one for one in self.todo if one.job is not pending.job]


@dataclass
class Scene:
    server: Server
    lane: Lane
    agenda: Agenda
    seeder: Seeder
    counts: Counts


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with (
        imitation_server(tmp_path) as server,
        client_session(connect_timeout_s=5, read_timeout_s=0) as session,
    ):
        probe = Probe(Upstream(server.url, session, lambda: None), {}, 60.0)
        lane, agenda, counts = Lane(1), Agenda(), Counts()
        seeder = Seeder(agenda, lane, probe, counts, timeout_s=60.0)
        async with background(seeder.run, "seeding"):
            yield Scene(server, lane, agenda, seeder, counts)


def pending(topic: str = "support", *, idle_s: float = 0.0, prefixing: Imitation | None = None) -> Pending:
    entry = Entry(lead(topic), topic, "small", Source.CONFIG)
    return Pending(Job(Work.SEED, entry), prefixing or Imitation(), f"{topic}.kv", idle_s)


async def test_what_is_on_the_agenda_is_done(scene: Scene) -> None:
    scene.agenda.add(pending("one"))
    scene.agenda.add(pending("two"))
    await eventually(lambda: len(scene.agenda.outcomes) == 2)
    files = [outcome.file for outcome in scene.agenda.outcomes if isinstance(outcome, Seeded)]
    assert files == ["again-one.kv", "again-two.kv"], "as it was prepared"


async def test_it_waits_until_nobody_has_called_for_long_enough(scene: Scene) -> None:
    patient = pending("patient", idle_s=3600.0)
    scene.agenda.add(patient)
    scene.agenda.add(pending("urgent"))
    await eventually(lambda: len(scene.agenda.outcomes) == 1)
    assert scene.server.prefilled == ["urgent-0"]
    assert scene.agenda.todo == [patient]


async def test_it_waits_for_calls_under_way(scene: Scene) -> None:
    async with scene.lane.place(b"somebody"):
        scene.agenda.add(pending())
        asked = asyncio.create_task(scene.seeder.now(pending("asked")))
        await eventually(lambda: not scene.agenda.changed.is_set())
        assert scene.server.prefilled == []
        assert scene.server.prefilling == 0
    assert isinstance(await asked, Seeded)
    await eventually(lambda: len(scene.agenda.outcomes) == 2)


async def test_one_thing_at_a_time(scene: Scene) -> None:
    scene.server.open.clear()
    scene.agenda.add(pending("background"))
    await eventually(lambda: scene.server.prefilling == 1)
    asked = asyncio.create_task(scene.seeder.now(pending("asked")))
    await eventually(lambda: scene.server.prefilling == 1)
    scene.server.open.set()
    assert isinstance(await asked, Seeded)
    assert scene.server.prefilled == ["background-0", "asked-0"]


class Faulty(Imitation):
    """Fails as it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        raise self.error

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> bool | None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "hitch"),
    [
        (KeyError("slots"), Hitch.REFUSED),
        (ZeroDivisionError(), Hitch.REFUSED),
        (UpstreamUnreachable("gone"), Hitch.UNREACHABLE),
        (UpstreamError("odd"), Hitch.UNREACHABLE),
    ],
)
async def test_a_fault_does_not_end_all_seeding(scene: Scene, error: Exception, hitch: Hitch) -> None:
    scene.agenda.add(pending("faulty", prefixing=Faulty(error)))
    await eventually(lambda: scene.agenda.outcomes == [hitch])
    scene.agenda.add(pending())
    await eventually(lambda: scene.server.prefilled == ["support-0"])


async def test_what_cannot_be_prepared_is_not_asked_for(scene: Scene) -> None:
    scene.agenda.add(pending("in-doubt"))
    await eventually(lambda: scene.agenda.outcomes == [Hitch.UNREACHABLE])
    assert scene.server.prefilled == []


async def test_work_that_fails_unforeseen_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        raise KeyError("unforeseen")

    async with background(run, "seeding"):
        await eventually(lambda: runs == 3)
    critical = [one for one in caplog.records if one.levelname == "CRITICAL"]
    assert [one.message for one in critical] == ["seeding failed and begins again"], "once"


async def test_measuring_is_done_in_turn_too(scene: Scene) -> None:
    one = pending(prefixing=Imitation(Style.NAMED))
    scene.agenda.add(replace(one, job=Job(Work.PROVE, one.job.entry)))
    await eventually(lambda: scene.agenda.outcomes == [Proof(effect=True)])
    assert scene.server.measured == 1


async def test_a_caller_who_gives_up_waiting_leaves_the_rest_undisturbed(scene: Scene) -> None:
    scene.server.open.clear()
    asked = asyncio.create_task(scene.seeder.now(pending("asked")))
    await eventually(lambda: scene.server.prefilling == 1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await eventually(lambda: scene.server.prefilling == 0)
    scene.server.open.set()
    assert isinstance(await scene.seeder.now(pending()), Seeded)
    assert not scene.lane.seeding_now
