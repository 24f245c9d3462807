"""What llama.cpp shows of itself, asked for as lightly as can be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from proxy.upstream.adapter import Loading, Probe, Seen, Sighting, Unidentified
from proxy.upstream.client import Upstream, client_session
from proxy.upstream.llamacpp import LlamaCpp
from tests.fake_model import FakeModel


@pytest.fixture
async def probe(model: FakeModel) -> AsyncIterator[Probe]:
    model.props = props()
    async with client_session(connect_timeout_s=30, read_timeout_s=30) as session:
        yield Probe(Upstream(model.url, session, lambda: None), {}, 30)


def props(marker: str = "run-1", **fields: Any) -> dict[str, Any]:
    return {"media_marker": marker, "default_generation_settings": {"params": {}}, **fields}


class Adapters:
    """What the server says of its LoRA adapters, and how often it was asked."""

    def __init__(self, model: FakeModel, *listed: Any) -> None:
        self.listed: Any = list(listed)
        self.status = 200
        self.asked = 0
        model.extra = self._answer

    async def _answer(self, request: web.Request) -> web.StreamResponse | None:
        if request.path != "/lora-adapters":
            return None
        self.asked += 1
        return web.json_response(self.listed, status=self.status)


def fingerprint(sighting: Sighting) -> bytes:
    assert isinstance(sighting, Seen)
    return sighting.fingerprint


async def test_adapters_and_their_scales_are_part_of_the_fingerprint(model: FakeModel, probe: Probe) -> None:
    adapters, llama = Adapters(model, {"id": 0, "path": "a", "scale": 1.0}), LlamaCpp("")
    first = fingerprint(await llama.look(probe))
    adapters.listed[0]["scale"] = 0.5
    assert fingerprint(await llama.look(probe)) != first
    adapters.listed[0]["scale"] = 1.0
    assert fingerprint(await llama.look(probe)) == first


async def test_a_run_without_adapters_is_asked_for_them_once_for_that_keeps_it_from_sleeping(
    model: FakeModel, probe: Probe
) -> None:
    adapters, llama = Adapters(model), LlamaCpp("")
    first = [fingerprint(await llama.look(probe)) for _ in range(3)]
    assert adapters.asked == 1
    model.props, adapters.listed = props("run-2"), [{"id": 0, "path": "a", "scale": 1.0}]
    assert fingerprint(await llama.look(probe)) not in first
    assert adapters.asked == 2


async def test_one_that_sleeps_is_not_woken_for_its_adapters(model: FakeModel, probe: Probe) -> None:
    adapters, llama = Adapters(model, {"id": 0, "path": "a", "scale": 1.0}), LlamaCpp("")
    first = fingerprint(await llama.look(probe))
    model.props = props(is_sleeping=True)
    asleep = await llama.look(probe)
    assert (fingerprint(asleep), adapters.asked) == (first, 1)
    assert isinstance(asleep, Seen)
    assert asleep.asleep


@pytest.mark.parametrize(("status", "expected"), [(500, Unidentified()), (503, Loading())])
async def test_a_passing_trouble_with_the_adapters_is_not_a_server_without_any(
    model: FakeModel, probe: Probe, status: int, expected: Sighting
) -> None:
    adapters = Adapters(model, {"id": 0, "path": "a", "scale": 1.0})
    adapters.status = status
    assert await LlamaCpp("").look(probe) == expected


async def test_a_server_without_that_path_is_seen_all_the_same(model: FakeModel, probe: Probe) -> None:
    assert isinstance(await LlamaCpp("").look(probe), Seen)


@pytest.mark.parametrize("meta", [None, "text", [], 7, {"n_vocab": 1}])
async def test_whatever_a_server_says_of_its_model_is_no_error(model: FakeModel, probe: Probe, meta: Any) -> None:
    async def listing(request: web.Request) -> web.StreamResponse | None:
        return web.json_response({"data": [{"id": "m", "meta": meta}]}) if request.path == "/v1/models" else None

    model.extra = listing
    assert isinstance(await LlamaCpp("").look(probe), Seen)
