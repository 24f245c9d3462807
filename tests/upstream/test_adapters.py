"""What every adapter must do, whatever its server is like. A new kind of server needs a `Rig` here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, assert_never

import pytest
from aiohttp import web

from proxy.upstream.adapter import (
    Adapter,
    Kind,
    Loading,
    Locked,
    Probe,
    Seen,
    Sighting,
    Silent,
    Unidentified,
    Unreachable,
)
from proxy.upstream.detect import ADAPTERS, Detected
from proxy.upstream.prefix import Evidence, Hitch, Kept, Readied, Ready, Seeded, Style, lead_of, lead_of_prompt
from tests.emulators import Handle, never, serving
from tests.emulators.asking import SYSTEM, probing
from tests.emulators.rkllama import Rkllama, rkllama
from tests.emulators.rkllm_flask import RkllmFlask, rkllm_flask
from tests.emulators.rockchipllama import TINY, RockchipLlama, rockchipllama
from tests.fake_model import FakeModel, fake_model

Json = Any
LEAD = lead_of_prompt(SYSTEM)
KEPT = Kept("sw_0123456789abcdef", 0)


@dataclass(frozen=True)
class Rig:
    """A kind of server for the contract.

    `start` runs one, `swaps` make it run something else, `forgiving`: it is identified even where it shows nothing.
    """

    start: Callable[[], AbstractAsyncContextManager[Any]]
    swaps: tuple[Callable[[Any], None], ...]
    forgiving: bool = False


def props(**changes: Json) -> dict[str, Json]:
    base = {"media_marker": "run-1", "model_path": "/a.gguf", "model_ftype": "Q4_0", "chat_template": "{{x}}"}
    return {**base, "default_generation_settings": {"params": {"temperature": 0.8}}, **changes}


@asynccontextmanager
async def llamacpp() -> AsyncIterator[FakeModel]:
    async with fake_model() as model:
        model.props = props()
        yield model


def shows(**changes: Json) -> Callable[[FakeModel], None]:
    def swap(model: FakeModel) -> None:
        model.props = props(**changes)

    return swap


def lists(*models: str) -> Callable[[FakeModel], None]:
    def swap(model: FakeModel) -> None:
        model.models = list(models)

    return swap


def loads(**changes: Json) -> Callable[[RockchipLlama], None]:
    """Run another file in the place of the one that is loaded."""

    def swap(server: RockchipLlama) -> None:
        server.models[0] = replace(server.models[0], **changes)
        server.loaded = server.models[0].name

    return swap


def loads_other(server: RockchipLlama) -> None:
    server.loaded = TINY.name


def changes_model(**changes: Json) -> Callable[[Rkllama], None]:
    def swap(server: Rkllama) -> None:
        server.models[0] = replace(server.models[0], **changes)

    return swap


def renames(server: RkllmFlask) -> None:
    server.model = "another"


RIGS = {
    Kind.OPENAI: Rig(fake_model, (lists("another"), lists("tiny", "another"), lists()), forgiving=True),
    Kind.LLAMACPP: Rig(
        llamacpp,
        (
            shows(model_path="/b.gguf"),
            shows(model_ftype="Q8_0"),
            shows(chat_template="other"),
            shows(default_generation_settings={"params": {"temperature": 0.1}}),
        ),
    ),
    Kind.ROCKCHIPLLAMA: Rig(
        rockchipllama,
        (loads(name="another"), loads(filename="Qwen3-0.6B-w4a16-rk3588.rkllm"), loads(size_mb=900.26), loads_other),
    ),
    Kind.RKLLAMA: Rig(
        rkllama,
        (
            changes_model(name="another"),
            changes_model(size=5),
            changes_model(quantization="W4A16"),
            changes_model(modified_at="2026-02-01T00:00:00.000000Z"),
        ),
    ),
    Kind.RKLLM_FLASK: Rig(rkllm_flask, (renames,)),
}


@pytest.fixture(params=list(Kind))
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def adapter(kind: Kind) -> Adapter:
    return ADAPTERS[kind]("")


async def seen(adapter: Adapter, probe: Probe) -> Seen:
    sighting = await adapter.look(probe)
    assert isinstance(sighting, Seen), sighting
    return sighting


def test_every_kind_has_an_adapter_and_a_rig(adapter: Adapter, kind: Kind) -> None:
    assert adapter.kind is kind
    assert RIGS.keys() == ADAPTERS.keys() == set(Kind)


def test_capabilities_agree_with_each_other(adapter: Adapter) -> None:
    can = adapter.capabilities
    assert can.max_concurrency >= 0
    assert can.default_limit is None or can.default_limit > 0
    if can.usage_unit == "words" or can.default_limit is not None:
        assert not can.tells_length, "whoever tells the length needs no inference from counts"
    if can.leaks_tail:
        assert can.max_concurrency == 1, "the next answer must be known"
    if can.open_to_all:
        assert not can.key_before_body


async def test_it_is_recognised(kind: Kind) -> None:
    async with RIGS[kind].start() as server, probing(server.url) as probe:
        detected = Detected("", None)
        await seen(detected, probe)
        assert (detected.kind, detected.doubt) == (kind, "")


async def test_the_same_server_has_the_same_identity(adapter: Adapter, kind: Kind) -> None:
    async with RIGS[kind].start() as server, probing(server.url) as probe:
        first = await seen(adapter, probe)
        asked = {"model": first.loaded or first.models[0], "messages": [{"role": "user", "content": "hi"}]}
        assert (await probe.post("/v1/chat/completions", asked)) is not None
        again = await seen(ADAPTERS[kind](""), probe)
        assert (again.fingerprint, again.instance, again.models) == (first.fingerprint, first.instance, first.models)
        assert len(first.fingerprint) == 32
        assert first.loaded in ("", *first.models)
        assert set(first.files) <= set(first.models)
        assert await adapter.same_instance(probe, first.instance) is True


async def test_the_operators_epoch_is_part_of_the_identity(adapter: Adapter, kind: Kind) -> None:
    async with RIGS[kind].start() as server, probing(server.url) as probe:
        prints = {(await seen(ADAPTERS[kind](epoch), probe)).fingerprint for epoch in ("", "a", "b")}
        assert len(prints) == 3


async def test_another_model_is_another_identity(adapter: Adapter, kind: Kind) -> None:
    prints = []
    for swap in (None, *RIGS[kind].swaps):
        async with RIGS[kind].start() as server, probing(server.url) as probe:
            if swap is not None:
                swap(server)
            prints.append((await seen(adapter, probe)).fingerprint)
    assert len(set(prints)) == len(prints)


def answering(status: int, body: bytes = b"{}") -> Handle:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, content_type="application/json")

    return handle


async def silent(request: web.Request) -> web.StreamResponse:
    await never()
    return web.Response()


@pytest.mark.parametrize(
    ("handle", "sighting", "timeout_s"),
    [
        (answering(503), Loading(), 20),
        (answering(401), Locked(), 20),
        (answering(403), Locked(), 20),
        (answering(500), Unidentified(), 20),
        (answering(302), Unidentified(), 20),
        (silent, Silent(), 0.1),
    ],
)
async def test_trouble_has_a_name(adapter: Adapter, handle: Handle, sighting: Sighting, timeout_s: float) -> None:
    async with serving(handle) as url, probing(url, timeout_s) as probe:
        assert await adapter.look(probe) == sighting
        if adapter.capabilities.tells_instances:
            assert await adapter.same_instance(probe, "run-1") is (None if sighting == Silent() else False)


async def test_nobody_there(adapter: Adapter) -> None:
    async with serving(silent) as url:
        pass
    async with probing(url) as probe:
        assert await adapter.look(probe) == Unreachable()
        await adapter.make_way(probe, "/v1/models/load", b'{"model": "a"}')
        await every_part(adapter, probe)


WRONG_TYPES: tuple[dict[str, Json], ...] = (
    {
        "data": 3,
        "models": 3,
        "loaded": True,
        "model_name": 3,
        "model_path": {},
        "default_generation_settings": 3,
    },
    {"data": [3, None, [], {"id": 5}], "models": [3, None, [], {"name": 5, "path": 1}], "loaded": "yes"},
    {
        "data": [{"id": "a", "meta": [1]}, {"id": "b"}],
        "default_generation_settings": {"params": [1]},
        "media_marker": 5,
    },
    {"data": {"a": 3, "b": [3, {}]}, "loaded": True, "model_name": "\ud800", "model_path": "/a"},
    {"loaded": True, "model_name": "a", "model_path": "/a", "models": [{"name": "a", "path": "/a"}]},
    {"loaded": True, "model_name": "a/../b", "model_path": "/a", "models": {}, "object": "cache.created"},
    {"loaded": True, "model_name": "", "model_path": "", "size_mb": -1, "object": "cache.created"},
    {"loaded": True, "model_name": "a", "model_path": "/a", "object": "cache.created", "size_mb": 10**400},
)

NONSENSE: tuple[bytes, ...] = (
    b"",
    b"<html>",
    b"\xff\xfe",
    b"null",
    b"3",
    b'"text"',
    b"[]",
    b"{}",
    b"[" * 100_000,
    b'"' + b"x" * (5 * 1024 * 1024) + b'"',
    *(json.dumps(value).encode() for value in WRONG_TYPES),
    b'{"loaded": true, "model_name": "a", "model_path": "/a", "object": "cache.created", "size_mb": NaN}',
)
"""Answers to every request that no server in its right mind gives."""


@pytest.mark.parametrize("body", NONSENSE, ids=lambda body: body[:40].decode("latin-1"))
async def test_nonsense_is_no_identity(adapter: Adapter, kind: Kind, body: bytes) -> None:
    # What llama.cpp shows may be nonsense beside the part that only it has.
    may_be_seen = RIGS[kind].forgiving or (kind is Kind.LLAMACPP and b"default_generation_settings" in body)
    async with serving(answering(200, body)) as url, probing(url) as probe:
        sighting = await adapter.look(probe)
        assert isinstance(sighting, Unidentified) or (may_be_seen and isinstance(sighting, Seen))
        await Detected("", kind).look(probe)
        await adapter.same_instance(probe, "run-1")
        await adapter.make_way(probe, "/v1/models/load", b'{"model": "b"}')
        await every_part(adapter, probe)


async def test_making_way_for_what_asks_for_nothing_changes_nothing(adapter: Adapter, kind: Kind) -> None:
    bodies = [b"", b"{", b"\xff", b"[]", b"3", b'{"model": 3}', b'{"model": "nope"}', b"[" * 90_000]
    async with RIGS[kind].start() as server, probing(server.url) as probe:
        before = await seen(adapter, probe)
        for path in ("/v1/models/load", "/v1/models/load?x=1", "/load_model", "/v1/models", "/", "", "?"):
            for body in bodies:
                await adapter.make_way(probe, path, body)
        await adapter.make_way(probe, "/v1/models", b'{"model": "tiny-b"}')
        after = await seen(adapter, probe)
        assert (after.fingerprint, after.loaded) == (before.fingerprint, before.loaded)
        asked = server.asked if hasattr(server, "asked") else server.seen
        assert {request.method for request in asked} == {"GET"}


async def every_part(adapter: Adapter, probe: Probe) -> None:
    """Whatever its prefixing is asked to do in trouble, it answers with a value."""
    prefixing = adapter.prefixing
    if prefixing is None:
        return
    assert prefixing.style in Style
    assert prefixing.cancels in (True, False)
    tools = lead_of({"messages": [{"role": "system", "content": SYSTEM}], "tools": [{"type": "function"}]})
    assert tools is not None
    for lead in (LEAD, tools):
        for name in (KEPT.file, "system", "", "../x", "\ud800"):
            assert isinstance(await prefixing.seed(probe, lead, name), Hitch | Seeded)
    for lead_, kept in ((None, None), (LEAD, None), (None, KEPT), (LEAD, KEPT)):
        ready = await prefixing.ready(probe, lead_, kept)
        assert isinstance(ready, Ready)
        await prefixing.landed(probe, lead_, ready, Evidence())
        await prefixing.landed(probe, lead_, ready, Evidence(0, 10))
    assert await prefixing.forget(probe, KEPT) in (True, False)
    assert await prefixing.prove(probe, LEAD, KEPT) in (True, False, None)
    prefixing.reset()


@pytest.mark.parametrize("handle", [answering(503), answering(401), answering(500), answering(404)])
async def test_prefixes_in_trouble_are_told_by_values(adapter: Adapter, handle: Handle) -> None:
    async with serving(handle) as url, probing(url) as probe:
        await every_part(adapter, probe)
        if adapter.prefixing is not None:
            assert isinstance(await adapter.prefixing.seed(probe, LEAD, KEPT.file), Hitch)
            assert (await adapter.prefixing.ready(probe, LEAD, KEPT)).how is not Readied.NAMED


async def test_a_server_that_does_not_answer_is_busy(adapter: Adapter) -> None:
    async with serving(silent) as url, probing(url, 0.1) as probe:
        if adapter.prefixing is not None:
            assert await adapter.prefixing.seed(probe, LEAD, KEPT.file) is Hitch.BUSY


async def test_seeding_tells_what_it_made(adapter: Adapter, kind: Kind) -> None:
    async with RIGS[kind].start() as server, probing(server.url) as probe:
        await seen(adapter, probe)
        match adapter.prefixing:
            case None:
                return
            case prefixing:
                seeded = await prefixing.seed(probe, LEAD, KEPT.file)
                ready = await prefixing.ready(probe, None, None)
        assert ready.edits == {}
        if isinstance(seeded, Hitch):
            assert kind is Kind.LLAMACPP, "the fake one cannot; the real one has tests of its own"
            return
        assert seeded.seconds >= 0
        match prefixing.style:
            case Style.FILE | Style.NAMED:
                assert seeded.file == KEPT.file
            case Style.WARM | Style.NONE:
                assert seeded.file == ""
            case other:
                assert_never(other)
