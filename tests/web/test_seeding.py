"""Prefixes through the running proxy: seeded before they are asked for, kept, restored, and never another model's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Answer, Proxy, eventually, running_proxy
from tests.emulators.llamacpp import LlamaCpp, llamacpp
from tests.web.test_prefix_routes import settings_from

SERVICES = ("lights", "weather", "timer")
CHAT = "/v1/chat/completions"
SECONDS = 30.0
"""Ends a test that has failed."""


def system(service: str) -> str:
    """A system prompt of 100 words that shares none with another service's."""
    return " ".join(f"{service}-{number}" for number in range(100))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LlamaCpp]:
    folder = tmp_path / "slots"
    await asyncio.to_thread(folder.mkdir)
    async with llamacpp(folder) as running:
        yield running


class House:
    """nearhit in front of the server, again and again on the same data."""

    def __init__(self, folder: Path, server: LlamaCpp) -> None:
        self.folder = folder
        self.server = server

    @asynccontextmanager
    async def open(
        self,
        *services: str,
        upstream: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
        sections: dict[str, Any] | None = None,
        **prefixes: Any,
    ) -> AsyncIterator[Proxy]:
        """With these services' system prompts configured. `sections` are others of the settings."""
        chosen = {"url": self.server.url, "poll_s": 0.1, "slot_dir": str(self.folder / "slots"), **(upstream or {})}
        written = {
            **(sections or {}),
            "data_dir": str(self.folder / "data"),
            "upstream": chosen,
            "cache": {"mode": "exact", **(cache or {})},
            "log": {"level": "debug"},
        }

        def write() -> Any:
            seeds = [{"name": name, "file": str(self.folder / f"{name}.txt")} for name in services]
            for name in SERVICES:
                (self.folder / f"{name}.txt").write_text(system(name) + "\n")
            return settings_from(
                self.folder / "config.yaml", {**written, "prefixes": {"seeds": seeds, "learn_after": 0, **prefixes}}
            )

        async with running_proxy(await asyncio.to_thread(write)) as proxy:
            yield proxy

    def saved(self) -> list[str]:
        """The files that the server saved. Blocking."""
        return sorted(path.name for path in (self.folder / "slots").iterdir())

    def texts(self, where: str) -> bytes:
        """All that is in the files of a folder. Blocking."""
        return b"\n".join(path.read_bytes() for path in sorted((self.folder / where).rglob("*")) if path.is_file())


@pytest.fixture
def house(tmp_path: Path, server: LlamaCpp) -> House:
    return House(tmp_path, server)


Open = Callable[..., AbstractAsyncContextManager[Proxy]]


async def ready(proxy: Proxy) -> dict[str, Any]:
    """What readiness tells, once it is there."""
    async with asyncio.timeout(SECONDS):
        while (answer := await proxy.send("GET", "/-/ready")).status != 200:
            await asyncio.sleep(0.02)
    told: dict[str, Any] = answer.json
    return told


async def rows(proxy: Proxy) -> dict[str, dict[str, Any]]:
    # Of a server that is not there, nothing can be listed.
    data = (await proxy.send("GET", "/v1/cache")).json.get("data", {})
    return {row["cache_name"]: row for model in data.values() for row in model}


async def states(proxy: Proxy) -> list[str]:
    return sorted(row["state"] for row in (await rows(proxy)).values())


async def until_states(proxy: Proxy, *wanted: str) -> None:
    async with asyncio.timeout(SECONDS):
        while await states(proxy) != sorted(wanted):
            await asyncio.sleep(0.02)


async def ask(proxy: Proxy, service: str, question: str) -> Answer:
    messages = [{"role": "system", "content": system(service)}, {"role": "user", "content": question}]
    answer = await proxy.chat(messages=messages)
    await proxy.settled()
    return answer


async def restarted(proxy: Proxy, server: LlamaCpp, weights: str = "") -> None:
    """Restart the server, and let nearhit notice it."""
    await server.restart(weights)
    await proxy.services.backends.first.tracker.look()


async def reused(proxy: Proxy, service: str, question: str) -> int:
    """The tokens of the prompt that the server did not compute."""
    answer = await ask(proxy, service, question)
    assert answer.status == 200, answer.body
    return int(answer.json["timings"]["cache_n"])


# What is configured


async def test_what_is_configured_is_there_before_readiness(house: House, server: LlamaCpp) -> None:
    server.go.clear()
    async with house.open(*SERVICES) as proxy:
        told = await proxy.send("GET", "/-/ready")
        assert (told.status, told.json["status"]) == (503, "starting")
        assert all(name in told.json["reason"] for name in SERVICES)
        # Whoever calls is served all the same.
        assert (await proxy.chat("hi")).status == 200
        server.go.set()
        assert (await ready(proxy))["upstreams"]["default"]["prefixes"] == "3 of 3 prefixes are seeded"
        assert [await reused(proxy, name, "what?") >= 100 for name in SERVICES] == [True] * 3
        assert server.count("save") == 3
        # From now on it stays ready, whatever comes.
        await server.stop()
        await eventually(lambda: not proxy.services.backends.first.tracker.current.confirmed)
        assert (await proxy.send("GET", "/-/ready")).status == 200
        await server.start(int(server.url.rpartition(":")[2]))


async def test_readiness_does_not_wait_for_ever(house: House, server: LlamaCpp) -> None:
    server.go.clear()
    async with house.open("lights", ready_timeout_s=0.3) as proxy:
        told = (await ready(proxy))["upstreams"]["default"]["prefixes"]
        assert told.startswith("0 of 1 prefixes are seeded; not lights")
        server.go.set()
        # It comes all the same.
        await until_states(proxy, "seeded")
        assert (await proxy.send("GET", "/-/ready")).status == 200


async def test_readiness_waits_for_no_server_that_is_not_there(house: House, server: LlamaCpp) -> None:
    await server.stop()
    async with house.open("lights", ready_timeout_s=0.3) as proxy:
        told = await ready(proxy)
        assert "does not show what it runs" in told["upstreams"]["default"]["prefixes"]
        await server.start(int(server.url.rpartition(":")[2]))
        await until_states(proxy, "seeded")


BAD = {"empty": b"", "blank": b" \n\t\n", "too-large": b"word " * 1024 * 1024, "no-text": b"caf\xe9 au lait"}


async def test_files_that_cannot_be_used_are_told_and_stop_nothing(
    house: House, server: LlamaCpp, caplog: pytest.LogCaptureFixture
) -> None:
    def write() -> None:
        (house.folder / "a-folder.txt").mkdir()
        for name, content in BAD.items():
            (house.folder / f"{name}.txt").write_bytes(content)

    await asyncio.to_thread(write)
    bad = [*BAD, "a-folder", "missing"]
    async with house.open(*bad, "lights") as proxy:
        told = (await ready(proxy))["upstreams"]["default"]["prefixes"]
        assert told == "1 of 1 prefixes are seeded; 6 of prefixes.seeds cannot be read"
        assert [*(await rows(proxy))] == ["lights"]
    for name in bad:
        path = str(house.folder / f"{name}.txt")
        (complaint,) = [record.getMessage() for record in caplog.records if path in record.getMessage()]
        assert complaint.startswith(f"prefixes.seeds: {name}: ")
        assert complaint.endswith("; it is not seeded")


async def test_a_server_that_keeps_no_files_is_warmed(house: House, server: LlamaCpp) -> None:
    server.files = None
    async with house.open("lights") as proxy:
        await ready(proxy)
        assert await states(proxy) == ["warm"]
        assert await reused(proxy, "lights", "what?") >= 100


async def test_one_that_is_too_short_is_said_to_be(house: House) -> None:
    await asyncio.to_thread((house.folder / "short.txt").write_text, "Be brief.")
    async with house.open("short") as proxy:
        assert "not short (it is too short" in (await ready(proxy))["upstreams"]["default"]["prefixes"]


# What clients use


async def test_what_clients_use_is_learned(house: House, server: LlamaCpp) -> None:
    async with house.open(learn_after=3) as proxy:
        for number in range(2):
            await reused(proxy, "timer", f"{number}?")
        assert await rows(proxy) == {}
        await reused(proxy, "timer", "and now?")
        await until_states(proxy, "seeded")
        (row,) = (await rows(proxy)).values()
        assert (row["source"], row["prompt_length"]) == ("learned", len(system("timer")))
        # Others come in between: there are two slots only.
        for service in ("lights", "weather"):
            await reused(proxy, service, "what?")
        assert await reused(proxy, "timer", "still there?") >= 100
        assert server.count("restore") == 1


async def test_hits_teach_nothing_and_cost_the_server_nothing(house: House, server: LlamaCpp) -> None:
    async with house.open(learn_after=3) as proxy:
        outcomes = [(await ask(proxy, "timer", "the same?")).outcome for _ in range(5)]
        assert outcomes == ["MISS", *["HIT"] * 4]
        assert await rows(proxy) == {}


async def test_a_client_stops_a_seeding(house: House, server: LlamaCpp) -> None:
    server.go.clear()
    async with house.open("lights") as proxy:
        await eventually(lambda: server.computing == 1, SECONDS)
        assert (await proxy.chat("hi")).status == 200
        assert (server.cancelled, server.computing) == (1, 0)
        metrics = (await proxy.send("GET", "/metrics")).body.decode()
        assert 'nearhit_prefix_seeds_total{result="preempted"} 1.0' in metrics
        assert "nearhit_prefix_met_seeding_total 1.0" in metrics
        server.go.set()
        await until_states(proxy, "seeded")


async def test_stopping_in_the_middle_of_a_seeding_leaves_nothing_behind(house: House, server: LlamaCpp) -> None:
    server.go.clear()
    async with house.open("lights"):
        await eventually(lambda: server.computing == 1, SECONDS)
    await eventually(lambda: server.computing == 0)
    server.go.set()
    async with house.open("lights") as proxy:
        await ready(proxy)
        assert await states(proxy) == ["seeded"]


# Restoring


async def test_each_lead_is_restored_before_its_call(house: House, server: LlamaCpp) -> None:
    async with house.open(*SERVICES) as proxy:
        await ready(proxy)
        done = len(server.asked)
        services = ["lights", "weather", "timer", "lights", "weather", "timer"]
        found = [await reused(proxy, service, f"{number}?") for number, service in enumerate(services)]
        assert min(found) >= 100, found
        sent = [asked.path.partition("?action=")[2] or asked.path for asked in server.asked[done:]]
        steps = [step for step in sent if step in ("restore", CHAT)]
        # Two of the three are in slots at the start.
        assert steps.count("restore") >= 4
        assert all(after == CHAT for step, after in pairwise(steps) if step == "restore")
        assert server.count("save") == 3
        assert {row["effective"] for row in (await rows(proxy)).values()} == {True}


async def test_a_file_that_cannot_be_used_is_made_once_more(house: House, server: LlamaCpp) -> None:
    async with house.open("timer") as proxy:
        await ready(proxy)
        for broken in (1, 2):
            await restarted(proxy, server)
            for file in await asyncio.to_thread(house.saved):
                await asyncio.to_thread((house.folder / "slots" / file).unlink)
            assert await reused(proxy, "timer", f"{broken}?") == 0
            await until_states(proxy, *(["seeded"] if broken == 1 else ["failed"]))
            assert server.count("save") == 2
        assert "twice" in (await rows(proxy))["timer"]["reason"]
        assert (await ask(proxy, "timer", "and now?")).status == 200


@pytest.mark.parametrize("sees_files", [True, False])
async def test_files_outlast_the_server_and_nearhit(house: House, server: LlamaCpp, sees_files: bool) -> None:
    upstream = {} if sees_files else {"slot_dir": ""}
    async with house.open("lights", "timer", upstream=upstream) as proxy:
        await ready(proxy)
        await restarted(proxy, server)
        assert await reused(proxy, "timer", "after a restart?") >= 100
    async with house.open("lights", "timer", upstream=upstream) as proxy:
        await ready(proxy)
        assert await reused(proxy, "lights", "after both?") >= 100
    assert server.count("save") == 2


# What is not done


async def test_switched_off_nothing_more_is_asked(house: House, server: LlamaCpp) -> None:
    async with house.open("lights", mode="off", learn_after=1) as proxy:
        assert (await ready(proxy))["upstreams"]["default"]["prefixes"] == ""
        for number in range(3):
            await reused(proxy, "lights", f"{number}?")
        # An empty body only finds out who is taken, on each path whose answers are kept.
        told = {asked.path for asked in server.asked if asked.body != b"{}"}
        assert told <= {"/props", "/v1/models", "/lora-adapters", "/health", "/completion", CHAT}
        assert all(body["n_predict"] == 1 for body in server.bodies("/completion"))
        metrics = (await proxy.send("GET", "/metrics")).body.decode()
        assert 'nearhit_prefix_seeds_total{result="seeded"} 0.0' in metrics
    assert not await asyncio.to_thread((house.folder / "data" / "prefixes").exists)


async def test_where_digests_are_kept_nothing_learned_is_readable(house: House, server: LlamaCpp) -> None:
    async with house.open("lights", learn_after=1, cache={"store_words": "digest"}) as proxy:
        await ready(proxy)
        await reused(proxy, "timer", "one?")
        # The configured one lies in a file of the operator's anyway.
        await until_states(proxy, "seeded", "warm")
    assert b"timer-" not in await asyncio.to_thread(house.texts, "data")
    # On the server neither.
    assert server.count("save") == 1


async def test_what_was_learned_before_is_forgotten_where_digests_are_kept_now(house: House) -> None:
    async with house.open(learn_after=1) as proxy:
        await reused(proxy, "timer", "one?")
        await until_states(proxy, "seeded")
    assert b"timer-" in await asyncio.to_thread(house.texts, "data/prefixes")
    async with house.open(cache={"store_words": "digest"}):
        pass
    assert b"timer-" not in await asyncio.to_thread(house.texts, "data/prefixes")
    assert await asyncio.to_thread(house.saved) == []


async def test_no_log_and_no_figure_tells_of_a_prompt(
    house: House, server: LlamaCpp, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "nearhit")
    async with house.open("lights", learn_after=1) as proxy:
        await ready(proxy)
        await reused(proxy, "timer", "weather-77?")
        await until_states(proxy, "seeded", "seeded")
        server.refuses_files = server.fails = True
        for service in ("weather", "lights", "timer"):
            await ask(proxy, service, "weather-77 again?")
        paths = ("/metrics", "/-/stats", "/-/ready", "/-/doctor", "/v1/cache", "/v1/cache/small")
        told = [(await proxy.send("GET", path)).body.decode() for path in paths]
    output = await asyncio.to_thread(capfd.readouterr)
    told += [record.getMessage() for record in caplog.records] + [output.out, output.err]
    assert not [text for text in told for service in SERVICES if f"{service}-" in text]


# Other weights under the same name


async def test_what_other_weights_computed_is_not_restored(house: House, server: LlamaCpp) -> None:
    async with house.open("timer") as proxy:
        await ready(proxy)
    await server.restart("second")
    async with house.open("timer") as proxy:
        # Before it is known what runs.
        await reused(proxy, "timer", "at once?")
        await ready(proxy)
        assert await reused(proxy, "timer", "and then?") >= 100
    await server.restart("first")
    async with house.open("timer") as proxy:
        await ready(proxy)
        assert await reused(proxy, "timer", "and again?") >= 100
    assert (server.poisoned, server.count("save")) == (0, 2)


async def test_weights_changed_while_nobody_looked_get_nothing_of_the_old_ones(house: House, server: LlamaCpp) -> None:
    # Between two looks, as long as they are.
    async with house.open("timer", upstream={"poll_s": 3600}) as proxy:
        await ready(proxy)
        await server.restart("second")
        for number in range(3):
            assert (await ask(proxy, "timer", f"{number}?")).status == 200
        assert server.poisoned == 0
        await until_states(proxy, "seeded", "seeded")
        assert await reused(proxy, "timer", "and then?") >= 100
    assert server.poisoned == 0


async def test_what_was_computed_while_nobody_looked_is_not_the_old_ones(house: House, server: LlamaCpp) -> None:
    async with house.open(learn_after=1, upstream={"poll_s": 3600}) as proxy:
        await reused(proxy, "timer", "one?")
        # Between the call and the seeding, which waits for a second without calls.
        await server.restart("second")
        lane = proxy.services.backends.first.lane
        await eventually(lambda: server.count("save") > 0 and not lane.seeding_now, SECONDS)
        await restarted(proxy, server, "first")
        await until_states(proxy, "seeded")
        await restarted(proxy, server)
        assert (await ask(proxy, "timer", "two?")).status == 200
    assert server.poisoned == 0


async def test_a_call_that_is_not_kept_gets_nothing_of_other_weights_either(house: House, server: LlamaCpp) -> None:
    async with house.open("timer", upstream={"poll_s": 3600}, cache={"mode": "off"}) as proxy:
        await ready(proxy)
        await server.restart("second")
        for number in range(3):
            assert (await ask(proxy, "timer", f"{number}?")).status == 200
    assert server.poisoned == 0
