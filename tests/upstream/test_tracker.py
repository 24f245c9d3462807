"""When the canary is asked, and what becomes of what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from proxy.upstream import canary
from proxy.upstream.adapter import Probe
from proxy.upstream.client import Upstream, client_session
from proxy.upstream.identity import CHECKING, Identity, Standing, Tracker
from proxy.upstream.llamacpp import LlamaCpp
from tests.conftest import eventually
from tests.fake_model import FakeModel

A = [(99, -1.85), (286, -2.73), (471, -3.11), (30, -3.61)]
B = [(token, logprob - 0.3) for token, logprob in A]


def props(marker: str = "run-1", **fields: Any) -> dict[str, Any]:
    return {
        "media_marker": marker,
        "model_path": "/models/a.gguf",
        "default_generation_settings": {"params": {}},
        **fields,
    }


@dataclass
class Watched:
    """A tracker in front of a fake model, and what it told."""

    tracker: Tracker
    model: FakeModel
    probe: Probe
    confirmed: list[Identity] = field(default_factory=list)
    restarts: list[Standing] = field(default_factory=list)

    @property
    def current(self) -> Identity:
        return self.tracker.current

    async def looks(self, count: int) -> None:
        """Wait until it looked so many times more."""
        wanted = self._looks + count
        await eventually(lambda: self._looks >= wanted)

    @property
    def _looks(self) -> int:
        return sum(seen.target == "/v1/models" for seen in self.model.seen)

    async def settled(self) -> bytes:
        """The fingerprint once it is confirmed."""
        await eventually(lambda: self.current.confirmed)
        assert self.current.fingerprint is not None
        return self.current.fingerprint


@asynccontextmanager
async def watched(
    model: FakeModel, *, known: bytes | None = None, poll_s: float = 0.05, runs: bool = True, **options: Any
) -> AsyncIterator[Watched]:
    async def changed(identity: Identity) -> None:
        seen.confirmed.append(identity)

    async def connected() -> None:
        pass

    async with client_session(connect_timeout_s=2, read_timeout_s=5) as session:
        upstream = Upstream(model.url, session, lambda: tracker.unreachable())
        probe = Probe(upstream, {}, 2)
        tracker = Tracker(
            LlamaCpp(""),
            probe,
            known,
            changed=changed,
            connected=connected,
            poll_s=poll_s,
            restarted=lambda: seen.restarts.append(tracker.current.standing),
            **options,
        )
        seen = Watched(tracker, model, probe)
        task = asyncio.create_task(tracker.run()) if runs else None
        try:
            yield seen
        finally:
            model.release.set()
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def llama(model: FakeModel) -> FakeModel:
    model.props, model.vector = props(), A
    return model


def holding(model: FakeModel, path: str) -> None:
    """Answers to this path wait for `release`."""

    async def hold(request: web.Request) -> web.StreamResponse | None:
        if request.path == path:
            await model.release.wait()
        return None

    model.extra = hold


async def test_looking_again_and_again_asks_the_canary_once(llama: FakeModel) -> None:
    async with watched(llama) as seen:
        await seen.looks(8)
        assert (llama.canaries, len(seen.confirmed), seen.restarts) == (1, 1, [])


async def test_it_is_asked_on_a_timer_only_while_the_server_is_idle(llama: FakeModel) -> None:
    idle = False
    async with watched(llama, canary_s=0.01, idle=lambda: idle) as seen:
        await seen.looks(5)
        assert llama.canaries == 1
        idle = True
        await eventually(lambda: llama.canaries > 3)
        assert seen.current.epoch == 1


async def test_the_timer_finds_other_weights_and_the_old_ones_when_they_are_back(llama: FakeModel) -> None:
    async with watched(llama, canary_s=0.01) as seen:
        first = await seen.settled()
        llama.vector = B
        await eventually(lambda: seen.current.confirmed and seen.current.fingerprint != first)
        llama.vector = A
        await eventually(lambda: seen.current.confirmed and seen.current.fingerprint == first)
        assert [identity.fingerprint for identity in seen.confirmed][::2] == [first, first]


async def test_without_an_interval_it_is_never_asked(llama: FakeModel) -> None:
    async with watched(llama, canary_s=0) as seen:
        await seen.settled()
        llama.props = props("run-2")
        await eventually(lambda: seen.current.instance == "run-2")
        assert llama.canaries == 0


@pytest.mark.parametrize("noise", [0.0, 0.019])
async def test_after_a_restart_it_is_asked_before_anything_is_confirmed(llama: FakeModel, noise: float) -> None:
    async with watched(llama) as seen:
        first, epoch = await seen.settled(), seen.current.epoch
        holding(llama, "/completion")
        llama.props, llama.vector = props("run-2"), [(token, logprob + noise) for token, logprob in A]
        await eventually(lambda: llama.canaries == 2)
        assert (seen.current.standing, seen.current.trouble) == (Standing.DOUBT, CHECKING)
        llama.release.set()
        assert await seen.settled() == first
        assert (seen.current.instance, len(seen.confirmed)) == ("run-2", 1)
        assert seen.current.epoch > epoch
        assert len(seen.restarts) == 1


async def test_after_a_failed_exchange_it_is_asked_again(llama: FakeModel) -> None:
    async with watched(llama, poll_s=3600) as seen:
        first, epoch = await seen.settled(), seen.current.epoch
        seen.tracker.unreachable()
        assert seen.current.trusted
        await eventually(lambda: llama.canaries == 2)
        assert await seen.settled() == first
        assert seen.current.epoch > epoch
        assert seen.restarts == [Standing.AWAY]


async def test_a_model_known_from_an_earlier_run_is_checked_before_it_is_served(llama: FakeModel) -> None:
    async with watched(llama) as seen:
        known = await seen.settled()
    holding(llama, "/completion")
    llama.release.clear()
    async with watched(llama, known=known) as seen:
        assert seen.current.trusted
        await eventually(lambda: llama.canaries == 2)
        assert not seen.current.trusted
        llama.release.set()
        assert await seen.settled() == known
        assert (seen.confirmed, seen.restarts) == ([], [])


async def test_a_server_that_sleeps_is_left_to_sleep_and_checked_when_it_wakes(llama: FakeModel) -> None:
    async with watched(llama, canary_s=0.01) as seen:
        first = await seen.settled()
        llama.props = props(is_sleeping=True)
        await seen.looks(2)
        asked = llama.canaries
        await seen.looks(5)
        assert llama.canaries == asked
        # It loads its file anew, and that may be another by now.
        llama.props, llama.vector = props(is_sleeping=False), B
        await eventually(lambda: seen.current.confirmed and seen.current.fingerprint != first)
        assert len(seen.restarts) == 1


async def test_one_that_woke_is_checked_without_waiting_for_the_timer(llama: FakeModel) -> None:
    async with watched(llama, idle=lambda: False) as seen:
        await seen.settled()
        llama.props = props(is_sleeping=True)
        await seen.looks(2)
        llama.props = props()
        await eventually(lambda: llama.canaries == 2)


async def test_nobody_who_confirms_an_answer_waits_for_the_canary(llama: FakeModel) -> None:
    async with watched(llama, canary_s=0.01) as seen:
        await seen.settled()
        holding(llama, "/completion")
        asked = llama.canaries
        await eventually(lambda: llama.canaries > asked)
        async with asyncio.timeout(60):
            assert (await seen.tracker.confirm()).confirmed


async def test_what_was_asked_before_the_server_went_away_confirms_nothing(llama: FakeModel) -> None:
    async with watched(llama, runs=False) as seen:
        await seen.tracker.look()
        llama.props = props("run-2")
        holding(llama, "/completion")
        look = asyncio.create_task(seen.tracker.look())
        await eventually(lambda: llama.canaries == 2)
        seen.tracker.unreachable()
        llama.release.set()
        await look
        assert seen.current.standing is Standing.AWAY
        await seen.tracker.look()
        assert seen.current.confirmed


async def test_a_server_too_busy_for_the_timers_canary_stays_what_it_is(
    llama: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "LIMIT_S", 0.05)
    async with watched(llama, canary_s=0.01) as seen:
        await seen.settled()
        holding(llama, "/completion")
        asked = llama.canaries
        await eventually(lambda: llama.canaries > asked + 2)
        assert (seen.current.confirmed, seen.current.epoch) == (True, 1)


async def test_an_error_puts_in_doubt_what_was_confirmed_and_no_more(llama: FakeModel) -> None:
    async with watched(llama, canary_s=0.01) as seen:
        first = await seen.settled()
        llama.completion_status = 500
        await eventually(lambda: "HTTP 500" in seen.current.trouble)
        assert seen.current.standing is Standing.DOUBT
        llama.completion_status = 200
        assert await seen.settled() == first
        assert len(seen.confirmed) == 1


async def test_a_lent_key_is_shown_to_the_canary_too(llama: FakeModel) -> None:
    async with watched(llama) as seen:
        open_to_all = await seen.settled()
    llama.key = "mine"
    async with watched(llama) as seen:
        await eventually(lambda: seen.current.locked)
        lent = Probe(seen.probe._upstream, {"Authorization": "Bearer mine"}, 2)
        assert (await seen.tracker.look(lent)).fingerprint == open_to_all
        assert (await seen.tracker.confirm(lent)).confirmed
        assert seen.current.locked


async def test_the_name_of_the_file_is_told_by_model(llama: FakeModel) -> None:
    llama.props = props(model_path="C:\\models\\small\\a.gguf")
    async with watched(llama, runs=False) as seen:
        identity = await seen.tracker.look()
    assert (identity.loaded, dict(identity.files)) == ("tiny", {"tiny": "a.gguf"})
