"""Prefix caches from the command line: nearhit prefixes, add and remove."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from tests.conftest import Proxy, StartProxy, running_proxy
from tests.emulators.rockchipllama import QWEN, RockchipLlama, rockchipllama
from tests.fake_model import FakeModel
from tests.program.terminal import terminal
from tests.program.test_cli import PROGRAM, Ran, environment, run, run_async
from tests.web.test_prefix_routes import CHATML, MODEL, PROMPT, create, names, settings_from

HEAD = "name model source tokens size state restores tokens saved last used reason"


@pytest.fixture
async def rock() -> AsyncIterator[RockchipLlama]:
    async with rockchipllama() as server:
        yield server


@pytest.fixture
async def house(tmp_path: Path, rock: RockchipLlama) -> AsyncIterator[Proxy]:
    """A nearhit in front of a RockchipLlama whose model has a second name."""
    upstream = {"url": rock.url, "kind": "rockchipllama", "poll_s": 0.1}
    sections: dict[str, Any] = {"data_dir": str(tmp_path / "data"), "upstream": upstream, "cache": {"mode": "exact"}}
    async with running_proxy(await asyncio.to_thread(settings_from, tmp_path / "config.yaml", sections)) as proxy:
        yield proxy


async def command(home: Path, proxy: Proxy, *arguments: str) -> Ran:
    return await run_async(home, "prefixes", *arguments, "--url", proxy.url)


async def file_with(home: Path, content: str | bytes) -> str:
    file = home / "system.txt"
    await asyncio.to_thread(file.write_bytes, content if isinstance(content, bytes) else content.encode())
    return str(file)


# The list


async def test_no_prefixes_are_told_as_such(tmp_path: Path, house: Proxy) -> None:
    assert await command(tmp_path, house) == Ran(0, "no prefix is known\n", "")
    assert await command(tmp_path, house, "--model", "nobody") == Ran(0, "no prefix is known\n", "")


async def test_prefixes_as_a_table(tmp_path: Path, house: Proxy) -> None:
    await create(house)
    ran = await command(tmp_path, house)
    assert (ran.code, ran.err) == (0, "")
    head, line = ran.out.splitlines()
    assert " ".join(head.split()) == HEAD
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[:4] == ["house", MODEL, "api", "-"]
    assert cells[5:8] == ["seeded", "0", "0"]
    assert cells[9] == "whether it helps is measured first"
    assert len((await command(tmp_path, house, "--model", MODEL)).out.splitlines()) == 2


async def test_prefixes_for_programs(tmp_path: Path, house: Proxy) -> None:
    await create(house)
    told = json.loads((await command(tmp_path, house, "--json")).out)
    assert [row["cache_name"] for row in told["data"][MODEL]] == ["house"]
    of_model = json.loads((await command(tmp_path, house, "--json", "--model", MODEL)).out)
    assert of_model["data"] == told["data"][MODEL]


async def test_a_line_fits_a_terminal_and_is_whole_in_a_pipe(tmp_path: Path, house: Proxy) -> None:
    await create(house)

    def shown() -> list[str]:
        with terminal(tmp_path, "prefixes", "--url", house.url) as screen:
            assert screen.end() == 0
            return screen.lines

    lines = await asyncio.to_thread(shown)
    assert len(lines) == 2
    assert max(map(cell_len, lines)) <= 120
    assert "…" in lines[1]


# Adding


@pytest.mark.parametrize("content", [PROMPT, f"\n{PROMPT} \n\n"])
async def test_a_file_is_added(tmp_path: Path, house: Proxy, rock: RockchipLlama, content: str) -> None:
    ran = await command(tmp_path, house, "add", "house", await file_with(tmp_path, content))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"house for {MODEL}: Prefix of {len(PROMPT.strip())} characters computed; kept")
    assert await names(house) == [(MODEL, "house")]
    (cache,) = rock.caches[MODEL].values()
    assert cache.prompt == CHATML.replace(PROMPT, PROMPT.strip())


async def test_what_comes_from_a_pipe_is_added_for_the_model_that_is_named(tmp_path: Path, house: Proxy) -> None:
    def piped() -> subprocess.CompletedProcess[str]:
        line = [str(PROGRAM), "prefixes", "add", "house", "-", "--model", MODEL, "--json", "--url", house.url]
        return subprocess.run(
            line, input=PROMPT, env=environment(tmp_path), capture_output=True, text=True, timeout=180, check=False
        )

    ran = await asyncio.to_thread(piped)
    assert (ran.returncode, ran.stderr) == (0, "")
    told = json.loads(ran.stdout)
    assert (told["object"], told["cache_name"], told["model"]) == ("cache.created", "house", MODEL)


async def test_of_a_request_its_system_messages_count(tmp_path: Path, house: Proxy, rock: RockchipLlama) -> None:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Hello?"}]
    body = {"cache_name": "other", "model": "any", "prompt": "x", "messages": messages, "temperature": 0}
    ran = await command(tmp_path, house, "add", "house", await file_with(tmp_path, json.dumps(body)))
    assert (ran.code, ran.err) == (0, "")
    assert await names(house) == [(MODEL, "house")]
    assert [cache.prompt for cache in rock.caches[MODEL].values()] == [CHATML]


async def test_flags_may_stand_before_the_command(tmp_path: Path, house: Proxy) -> None:
    file = await file_with(tmp_path, PROMPT)
    ran = await run_async(tmp_path, "prefixes", "--url", house.url, "--json", "add", "house", file)
    assert json.loads(ran.out)["cache_name"] == "house"
    ran = await run_async(tmp_path, "prefixes", "--url", house.url, "--model", MODEL, "remove", "house")
    assert ran == Ran(0, f"removed house of {MODEL}\n", "")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("Be brief.", ("house",), "'house' was not seeded: it is too short to be worth the trouble"),
        (PROMPT, ("a/b",), "cache_name must be alphanumeric (hyphens and underscores allowed)"),
        (PROMPT, ("house", "--model", "nobody"), f"model 'nobody' is not loaded; '{MODEL}' is"),
    ],
)
async def test_what_is_refused_is_one_line(
    tmp_path: Path, house: Proxy, content: str, arguments: tuple[str, ...], message: str
) -> None:
    name, *more = arguments
    ran = await command(tmp_path, house, "add", name, await file_with(tmp_path, content), *more)
    assert ran == Ran(1, "", f"nearhit: {house.url} refused: {message}\n")


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8")]
)
def test_a_file_that_holds_no_text_is_wrong_usage(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "system.txt").write_bytes(content)
    ran = run(tmp_path, "prefixes", "add", "house", "system.txt")
    assert ran == Ran(2, "", f"nearhit: system.txt: {message}\n")


def test_a_file_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    for arguments in (("add", "house", "none.txt"), ("add", "house"), ("add",), ("remove",), ("burn", "house")):
        ran = run(tmp_path, "prefixes", *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert "Traceback" not in ran.err


def test_an_argument_that_is_no_unicode_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text(PROMPT)
    for arguments in (
        ("--model", "\udcff"),
        ("add", "a", "system.txt", "--model", "\udcff"),
        ("remove", "\udcff", "--model", "a"),
    ):
        assert run(tmp_path, "prefixes", *arguments) == Ran(2, "", "nearhit: an argument is not valid UTF-8\n")


def test_a_nearhit_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text(PROMPT)
    for arguments in ((), ("add", "a", "system.txt"), ("remove", "a")):
        ran = run(tmp_path, "prefixes", *arguments, "--url", "http://127.0.0.1:1")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith("nearhit: no nearhit answers at http://127.0.0.1:1 (")


async def test_a_server_that_is_no_nearhit_is_not_believed(tmp_path: Path, rock: RockchipLlama) -> None:
    ran = await run_async(tmp_path, "prefixes", "--url", rock.url)
    assert ran == Ran(1, "", f"nearhit: what answers at {rock.url} is no nearhit\n")


async def test_switched_off_it_says_so(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    proxy = await start(prefixes__mode="off", cache__mode="exact")
    ran = await command(tmp_path, proxy, "add", "house", await file_with(tmp_path, PROMPT))
    assert (ran.code, ran.out) == (1, "")
    assert "prefixes.mode is off" in ran.err


async def test_ctrl_c_leaves_the_rest_to_nearhit(tmp_path: Path, house: Proxy, rock: RockchipLlama) -> None:
    rock.deadlocked = True
    file = await file_with(tmp_path, PROMPT)
    line = [str(PROGRAM), "prefixes", "add", "house", file, "--url", house.url]
    process = await asyncio.create_subprocess_exec(
        *line, env=environment(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    await wait_for_row(house)
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert err == b"nearhit: stopped; what was to be computed is computed when the server is idle\n"
    assert await names(house) == [(MODEL, "house")]


async def wait_for_row(proxy: Proxy) -> None:
    """Until what a command asks for has reached nearhit."""
    async with asyncio.timeout(60):
        while not await names(proxy):
            await asyncio.sleep(0.02)


# Removing


async def test_a_prefix_is_removed_by_its_name(tmp_path: Path, house: Proxy) -> None:
    await create(house)
    assert await command(tmp_path, house, "remove", "house") == Ran(0, f"removed house of {MODEL}\n", "")
    assert await names(house) == []
    assert await command(tmp_path, house, "remove", "house") == Ran(1, "", "nearhit: no prefix is called 'house'\n")
    ran = await command(tmp_path, house, "remove", "house", "--model", MODEL, "--json")
    assert ran == Ran(1, "", f"nearhit: {house.url} refused: Cache 'house' not found for model '{MODEL}'\n")


async def test_of_several_with_one_name_the_model_must_be_told(tmp_path: Path, rock: RockchipLlama) -> None:
    async with rockchipllama() as second:
        upstream = {"url": rock.url, "kind": "rockchipllama", "poll_s": 0.1}
        sections = {
            "data_dir": str(tmp_path / "data"),
            "upstream": upstream,
            "upstreams": [{**upstream, "name": "second", "url": second.url}],
            "models": {"org/other": {"model": QWEN.name, "upstream": "second"}},
            "cache": {"mode": "exact"},
        }
        settings = await asyncio.to_thread(settings_from, tmp_path / "config.yaml", sections)
        async with running_proxy(settings) as proxy:
            for one in proxy.services.backends:
                await one.tracker.looked.wait()
            await create(proxy)
            await create(proxy, "/v1/cache/org/other")
            ran = await command(tmp_path, proxy, "remove", "house")
            which = f"give --model, one of org/other, {MODEL}"
            assert ran == Ran(2, "", f"nearhit: several models have a prefix of this name: {which}\n")
            ran = await command(tmp_path, proxy, "remove", "house", "--model", "org/other", "--json")
            assert json.loads(ran.out)["deleted"] is True
            assert await names(proxy) == [(MODEL, "house")]


async def test_that_a_configured_one_comes_back_is_told(tmp_path: Path, rock: RockchipLlama) -> None:
    sections = {
        "data_dir": str(tmp_path / "data"),
        "upstream": {"url": rock.url, "kind": "rockchipllama", "poll_s": 0.1},
        "prefixes": {"seeds": [{"name": "house", "file": await file_with(tmp_path, PROMPT)}]},
        "cache": {"mode": "exact"},
    }
    settings = await asyncio.to_thread(settings_from, tmp_path / "config.yaml", sections)
    async with running_proxy(settings) as proxy:
        await wait_for_row(proxy)
        ran = await command(tmp_path, proxy, "remove", "house")
        assert (ran.code, ran.out) == (0, f"removed house of {MODEL}\n")
        assert "take it out of prefixes.seeds" in ran.err


# Help


@pytest.mark.parametrize("arguments", [(), ("add",), ("remove",)])
def test_each_has_help_with_an_example(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, "prefixes", *arguments, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: nearhit prefixes {' '.join(arguments)}".rstrip() in ran.out
