"""Whose system prompts are learned and computed ahead: nobody's who forbids it, or whom the server would refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy
from tests.emulators.llamacpp import LlamaCpp, error
from tests.fake_model import Json
from tests.web.test_clients import CLIENTS, by
from tests.web.test_seeding import CHAT, SECONDS, House, system

OURS = "own"


@dataclass
class Keyed(LlamaCpp):
    """A `llama-server --api-key own`."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        is_open = request.path in ("/health", "/v1/models")
        if not is_open and request.headers.get("Authorization") != f"Bearer {OURS}":
            return error(401, "Invalid API Key")
        return await super().handle(request)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LlamaCpp]:
    folder = tmp_path / "slots"
    await asyncio.to_thread(folder.mkdir)
    running = Keyed(folder)
    running.go.set()
    await running.start()
    yield running
    await running.stop()


@pytest.fixture
def house(tmp_path: Path, server: LlamaCpp) -> House:
    return House(tmp_path, server)


KEYED: dict[str, Json] = {"upstream": {"api_key": OURS}, "learn_after": 2, "seed_idle_s": 0}


async def ask(proxy: Proxy, service: str, number: int, headers: dict[str, str], **fields: Any) -> Answer:
    """A call that no other one is equal to; only its system prompt is."""
    messages = [{"role": "system", "content": system(service)}, {"role": "user", "content": f"{number}?"}]
    answer = await proxy.chat(messages=messages, headers=headers, **fields)
    await proxy.settled()
    return answer


async def learned(proxy: Proxy) -> list[Json]:
    """All prefixes that nearhit knows of."""
    answer = await proxy.send("GET", "/v1/cache", headers={"X-Nearhit-Admin": proxy.services.local_token})
    return [row for rows in answer.json["data"].values() for row in rows]


async def until_seeded(proxy: Proxy) -> list[Json]:
    """All prefixes, once each of them is computed and kept."""
    async with asyncio.timeout(SECONDS):
        while not (rows := await learned(proxy)) or {row["state"] for row in rows} != {"seeded"}:
            await asyncio.sleep(0.02)
    return rows


MINE = {"Authorization": f"Bearer {OURS}"}
FORBIDDEN: list[tuple[dict[str, str], dict[str, Json]]] = [
    ({"Cache-Control": "no-store"}, {}),
    ({}, {"cache": {"no-store": True}}),
    # Passed by the cache for another reason, too: its `cache` object is not looked into.
    ({}, {"cache": {"no-store": True}, "store": True}),
    ({"Cache-Control": "no-store"}, {"store": True}),
]


@pytest.mark.parametrize("mode", ["exact", "off"])
@pytest.mark.parametrize(("headers", "fields"), FORBIDDEN)
async def test_of_calls_that_are_not_to_be_kept_no_system_prompt_is(
    house: House, server: LlamaCpp, mode: str, headers: dict[str, str], fields: dict[str, Json]
) -> None:
    async with house.open(cache={"mode": mode}, **KEYED) as proxy:
        for number in range(4):
            answer = await ask(proxy, "timer", number, {**MINE, **headers}, **fields)
            assert (answer.status, answer.outcome) == (200, "BYPASS")
        assert await learned(proxy) == []
        # What comes after it and may be learned is; nothing of the other was on its way.
        for number in range(2):
            await ask(proxy, "lights", number, MINE)
        assert len(await until_seeded(proxy)) == 1
    assert b"timer-7" not in await asyncio.to_thread(house.texts, "data")
    assert b"lights-7" in await asyncio.to_thread(house.texts, "data/prefixes")
    assert server.count("save") == 1


@pytest.mark.parametrize(("who", "count"), [("reader", 0), ("hermit", 0), ("cat", 1)])
async def test_of_clients_whose_answers_are_not_kept_no_system_prompt_is(house: House, who: str, count: int) -> None:
    async with house.open(sections={"sharing": "clients", "clients": CLIENTS}, **KEYED) as proxy:
        for number in range(4):
            assert (await ask(proxy, "timer", number, by(who))).status == 200
        assert len(await learned(proxy)) == count


async def test_what_another_had_learned_helps_them_all_the_same(house: House, server: LlamaCpp) -> None:
    async with house.open(sections={"sharing": "clients", "clients": CLIENTS}, **KEYED) as proxy:
        for number in range(2):
            await ask(proxy, "timer", number, by("cat"))
        await until_seeded(proxy)
        # There are two slots only.
        for service in ("lights", "weather"):
            await ask(proxy, service, 0, by("hermit"))
        assert (await ask(proxy, "timer", 2, by("reader"))).json["timings"]["cache_n"] >= 100
        assert server.count("restore") == 1


def asked_of_its_own(server: LlamaCpp) -> bytes:
    """All that nearhit had the server compute, or make of a prompt, beside clients' calls."""
    return b"\n".join(asked.body for asked in server.asked if asked.path != CHAT)


@pytest.mark.parametrize("sharing", ["auto", "shared", "per-credential"])
async def test_nothing_is_prepared_with_nearhits_key_for_whom_the_server_refuses(
    house: House, server: LlamaCpp, sharing: str
) -> None:
    stranger = {"Authorization": "Bearer wrong"}
    async with house.open("timer", sections={"sharing": sharing}, **KEYED) as proxy:
        await until_seeded(proxy)
        # There are two slots only.
        for service in ("door", "radio"):
            assert (await ask(proxy, service, 0, MINE)).status == 200
        for service in ("lights", "weather"):
            for number in range(3):
                assert (await ask(proxy, service, number, stranger)).status == 401
        # One that is there already is not put into a slot for a stranger either.
        assert (await ask(proxy, "timer", 0, stranger)).status == 401
        assert len(await learned(proxy)) == 1
        assert server.count("restore") == 0
    for service in ("lights", "weather"):
        assert f"{service}-7".encode() not in asked_of_its_own(server)
    assert b"lights-7" not in await asyncio.to_thread(house.texts, "data/prefixes")


@pytest.mark.parametrize("mode", ["off", "exact"])
@pytest.mark.parametrize("sharing", ["auto", "shared", "per-credential"])
async def test_whom_the_server_takes_has_system_prompts_learned(house: House, mode: str, sharing: str) -> None:
    async with house.open(sections={"sharing": sharing}, cache={"mode": mode}, **KEYED) as proxy:
        for number in range(4):
            assert (await ask(proxy, "lights", number, MINE)).status == 200
        assert len(await until_seeded(proxy)) == 1
