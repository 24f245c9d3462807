"""Export and import as people and programs run them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tests.conftest import Proxy, StartProxy, running_proxy, settings_for
from tests.fake_model import FakeModel
from tests.program.test_cli import PROGRAM, Ran, environment, run, run_async
from tests.web.test_transfer import Row, chat_of, export, filled, lines, no_store, row, whole


async def nearhit(home: Path, proxy: Proxy, *arguments: str, **changes: str) -> Ran:
    return await run_async(home, *arguments, "--url", proxy.url, "--data-dir", str(home), **changes)


async def written(path: Path, content: bytes) -> str:
    await asyncio.to_thread(path.write_bytes, content)
    return str(path)


async def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in (await asyncio.to_thread(path.read_bytes)).splitlines()]


async def names_in(folder: Path) -> list[str]:
    return await asyncio.to_thread(os.listdir, folder)


async def piped(home: Path, shell: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a shell's command line to its end."""
    return await asyncio.to_thread(
        lambda: subprocess.run(
            ["sh", "-c", shell],
            input=given,
            env=environment(home),
            cwd=home,
            capture_output=True,
            timeout=180,
            check=False,
        )
    )


@asynccontextmanager
async def in_between(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A server that does to requests what it likes."""
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def sizes(proxy: Proxy) -> int:
    return int((await export(proxy))[-1]["entries"])


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_has_an_example(tmp_path: Path, command: str) -> None:
    ran = run(tmp_path, command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(rf"Example: nearhit {command}\b", ran.out)


# nearhit export


async def test_export_to_a_file_that_only_its_owner_may_read(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, *(row(n) for n in range(1, 4)))
    file = tmp_path / "out.jsonl"
    ran = await nearhit(tmp_path, proxy, "export", str(file))
    assert ran == Ran(0, f"3 entries are in {file}\n", "")
    header, *entries, end = await rows_of(file)
    assert (header["nearhit_export"], end) == (1, {"end": True, "entries": 3})
    assert [entry["words"] for entry in entries] == ["question 1", "question 2", "question 3"]
    assert (await asyncio.to_thread(file.stat)).st_mode & 0o777 == 0o600
    assert file.name in await names_in(tmp_path)
    assert f"{file.name}.part" not in await names_in(tmp_path)


async def test_export_to_standard_output_is_what_the_route_gives(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, row(1))
    for arguments in ((), ("-",)):
        ran = await nearhit(tmp_path, proxy, "export", *arguments)
        assert (ran.code, ran.err) == (0, "")
        assert [json.loads(line) for line in ran.out.splitlines()][1:] == (await export(proxy))[1:]


async def test_export_what_is_meant_for_programs(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, row(1, model="a"), row(2, model="b"))
    file = tmp_path / "out.jsonl"
    ran = await nearhit(tmp_path, proxy, "export", str(file), "--model", "a", "--newer", "1h", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"file": str(file), "entries": 1})
    assert (await rows_of(file))[0]["filters"] == {"model": "a", "newer_s": "3600.000"}


async def test_an_export_that_broke_off_can_be_gone_on_with(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, *(row(n, model="a") for n in range(1, 8)))
    file, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    assert (await nearhit(tmp_path, proxy, "export", str(file), "--model", "a")).code == 0
    everything = await asyncio.to_thread(file.read_bytes)
    for cut in (0, 30, len(everything) // 2, len(everything) - 40, len(everything) - 1, len(everything)):
        await written(part, everything[:cut])
        await asyncio.to_thread(file.unlink)
        filters = ("--model", "a") if cut < 200 else ()
        ran = await nearhit(tmp_path, proxy, "export", str(file), *filters, "--resume")
        assert ran == Ran(0, f"7 entries are in {file}\n", ""), cut
        assert (await rows_of(file))[1:] == [json.loads(line) for line in everything.splitlines()][1:], cut


async def test_going_on_with_other_conditions_is_refused(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, row(1, model="a"))
    part = tmp_path / "out.jsonl.part"
    await written(part, lines({"nearhit_export": 1, "filters": {"model": "a"}}, row(1, model="a")))
    file = str(tmp_path / "out.jsonl")
    ran = await nearhit(tmp_path, proxy, "export", file, "--model", "b", "--resume")
    assert ran == Ran(2, "", f"nearhit: {part} was begun with model 'a': give these, or none\n")


@pytest.mark.parametrize("content", [None, b"my diary\n", b'{"nearhit_export": 1}\nmy diary\n', b"\xff\n"])
async def test_there_must_be_something_to_go_on_with(tmp_path: Path, proxy: Proxy, content: bytes | None) -> None:
    part = tmp_path / "out.jsonl.part"
    if content is not None:
        await written(part, content)
    ran = await nearhit(tmp_path, proxy, "export", str(tmp_path / "out.jsonl"), "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"nearhit: {part} is ")
    assert ran.err.count("\n") == 1


async def test_an_export_that_breaks_off_is_told_with_what_to_do(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, *(row(n) for n in range(1, 4)))
    file = tmp_path / "out.jsonl"
    begun = b"".join((await proxy.send("GET", "/-/export")).body.splitlines(keepends=True)[:2])

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(begun)
        if "newer_s" in request.query:
            await response.write(b'{"mark": 2, "ke')
            assert request.transport is not None
            request.transport.close()
        return response

    async with in_between(handle) as url:
        for more in ((), ("--newer", "1h")):
            ran = await run_async(tmp_path, "export", str(file), *more, "--url", url)
            hint = f"go on with: nearhit export {file} --resume"
            assert ran == Ran(1, "", f"nearhit: the export broke off after 1 entries; {hint}\n")
        told = await run_async(tmp_path, "export", "--url", url)
        assert (told.code, told.out.encode()) == (1, begun)
        assert told.err.startswith("nearhit: the export broke off: it is not whole")
    assert (await nearhit(tmp_path, proxy, "export", str(file), "--resume")).code == 0
    assert (await rows_of(file))[1:] == (await export(proxy))[1:]


async def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, proxy: Proxy) -> None:
    file = tmp_path / "missing" / "out.jsonl"
    ran = await nearhit(tmp_path, proxy, "export", str(file))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"nearhit: {file}: No such file or directory\n"


async def test_an_export_that_is_refused_leaves_what_was_there(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    file = await written(tmp_path / "out.jsonl", b"mine")
    elsewhere = tmp_path / "elsewhere"
    await asyncio.to_thread(elsewhere.mkdir)
    ran = await nearhit(elsewhere, proxy, "export", file)
    assert (ran.code, ran.out) == (1, "")
    assert "send the admin token" in ran.err
    assert await asyncio.to_thread(Path(file).read_bytes) == b"mine"


async def test_whoever_reads_an_export_may_leave(tmp_path: Path, proxy: Proxy) -> None:
    await filled(proxy, *(row(n, answer=chat_of(10_000)) for n in range(1, 100)))
    done = await piped(tmp_path, f"{PROGRAM} export --url {proxy.url} --data-dir {tmp_path} | head -n 1")
    assert json.loads(done.stdout)["nearhit_export"] == 1
    assert done.stderr == b""


# nearhit import


async def test_import_what_was_exported(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("one")
    await proxy.settled()
    file = str(tmp_path / "out.jsonl")
    assert (await nearhit(tmp_path, proxy, "export", file)).code == 0
    async with running_proxy(settings_for(tmp_path / "other", model.url)) as other:
        ran = await nearhit(tmp_path, other, "import", file)
        assert ran == Ran(0, "        1 new entries\n", "")
        assert (await other.chat("one")).outcome == "HIT"
        again = await nearhit(tmp_path, other, "import", file)
        assert again.out == "        0 new entries\n        1 were there already, the same or newer\n"


async def test_import_from_standard_input_for_programs(tmp_path: Path, proxy: Proxy) -> None:
    content = whole(row(1), row(2))
    for more, what in (("", "imported"), ("--bad skip", "known")):
        command = f"{PROGRAM} import - --json --url {proxy.url} --data-dir {tmp_path} {more}"
        done = await piped(tmp_path, f"cat | {command}", content)
        assert done.returncode == 0
        told = json.loads(done.stdout)
        assert (told[what], told["complete"], told["bad"]) == (2, True, [])


async def test_a_file_with_a_bad_line_is_not_imported_at_all(tmp_path: Path, proxy: Proxy) -> None:
    file = await written(tmp_path / "in.jsonl", lines(*(row(n) for n in range(1, 1500)), row(1500, cost_ms=-1)))
    ran = await nearhit(tmp_path, proxy, "import", file)
    expected = (
        f"nearhit: {file}: line 1500: cost_ms: expected `int` >= 0\n"
        f"nearhit: {file} has bad lines, so nothing was imported; --bad skip imports the others\n"
    )
    assert ran == Ran(1, "", expected)
    assert await sizes(proxy) == 0


async def test_bad_lines_are_skipped_where_that_is_asked_and_exit_code_is_1(tmp_path: Path, proxy: Proxy) -> None:
    rows: list[Row | str] = [
        *(row(n) for n in range(1, 1500)),
        "{",
        *(row(n) for n in range(1500, 1600)),
        {"end": True, "entries": 1},
    ]
    file = await written(tmp_path / "in.jsonl", lines(*rows))
    ran = await nearhit(tmp_path, proxy, "import", file, "--bad", "skip")
    assert (ran.code, ran.out) == (1, "     1599 new entries\n        1 bad lines\n")
    assert ran.err.startswith("line 1500: expected a line of JSON")
    told = json.loads((await nearhit(tmp_path, proxy, "import", file, "--bad", "skip", "--json")).out)
    assert (told["known"], told["bad_count"], told["bad"][0]["line"], told["lines"]) == (1599, 1, 1500, 1601)


async def test_very_many_bad_lines_are_not_all_told(tmp_path: Path, proxy: Proxy) -> None:
    file = await written(tmp_path / "in.jsonl", b"x\n" * 3000)
    refused = await nearhit(tmp_path, proxy, "import", file)
    assert (refused.code, refused.err.count("\n")) == (1, 11)
    assert "(3000 in all)" in refused.err
    skipped = await nearhit(tmp_path, proxy, "import", file, "--bad", "skip", "--json")
    assert (json.loads(skipped.out)["bad_count"], len(json.loads(skipped.out)["bad"])) == (3000, 100)


async def test_a_file_without_its_end_is_told(tmp_path: Path, proxy: Proxy) -> None:
    file = await written(tmp_path / "in.jsonl", lines(row(1)))
    ran = await nearhit(tmp_path, proxy, "import", file)
    assert (ran.code, ran.out) == (1, "        1 new entries\n")
    assert "the file has no end line" in ran.err


async def test_an_import_that_is_interrupted_says_how_to_go_on(tmp_path: Path, proxy: Proxy, model: FakeModel) -> None:
    file = await written(tmp_path / "in.jsonl", whole(*(row(n) for n in range(1, 2500))))
    served = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal served
        served += 1
        if served > 2:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        async with proxy.session.post(f"{proxy.url}{request.path_qs}", data=await request.read()) as response:
            return web.Response(body=await response.read(), content_type="application/json")

    async with in_between(handle) as url:
        ran = await run_async(tmp_path, "import", file, "--url", url, "--data-dir", str(tmp_path))
    assert (ran.code, ran.out) == (1, "")
    # The header is a line, too.
    assert ran.err.endswith(
        f"1999 entries were imported; go on with: nearhit import {file} --from-line 2001 --url {url}\n"
    )
    rest = await nearhit(tmp_path, proxy, "import", file, "--from-line", "2001")
    assert (rest.code, rest.out) == (0, "      500 new entries\n")
    assert await sizes(proxy) == 2499


async def test_a_store_that_is_away_is_told_with_where_to_go_on(tmp_path: Path, proxy: Proxy) -> None:
    file = await written(tmp_path / "in.jsonl", whole(row(1)))
    with no_store(proxy):
        ran = await nearhit(tmp_path, proxy, "import", file)
    assert (ran.code, ran.out) == (1, "")
    assert "the store cannot be written now; go on with line 1" in ran.err


async def test_what_comes_from_another_model_and_what_had_no_room_is_told(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(cache__max_entries=10)
    file = await written(tmp_path / "in.jsonl", whole(*(row(n) for n in range(1, 31))))
    ran = await nearhit(tmp_path, proxy, "import", file)
    assert (ran.code, ran.out) == (0, "       30 new entries\n")
    assert "30 of them came from another upstream or model" in ran.err
    assert "20 entries went: cache.max_entries or cache.max_bytes is reached" in ran.err


@pytest.mark.parametrize(
    "arguments", [(), ("missing.jsonl",), ("in.jsonl", "--bad", "x"), ("in.jsonl", "--from-line", "0")]
)
def test_wrong_usage_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "in.jsonl").write_text("")
    ran = run(tmp_path, "import", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


def test_wrong_usage_of_export_is_exit_code_2(tmp_path: Path) -> None:
    for arguments in (("-", "--resume"), ("--resume",), ("--older", "x"), (str(tmp_path),)):
        ran = run(tmp_path, "export", *arguments)
        assert (ran.code, ran.out) == (2, ""), arguments


def test_without_a_running_one_both_say_so(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(whole(row(1)))
    for arguments in (("export",), ("export", "out.jsonl"), ("import", "in.jsonl")):
        ran = run(tmp_path, *arguments, "--url", "http://127.0.0.1:9")
        assert (ran.code, ran.out) == (1, ""), arguments
        assert ran.err.startswith("nearhit: no nearhit answers at http://127.0.0.1:9 (Connection refused)")
        assert ran.err.count("\n") == 1


def test_an_import_does_not_take_the_world_for_its_memory(tmp_path: Path) -> None:
    """A file without any line break is refused by its length, not read into memory."""
    file = tmp_path / "zeros"
    with file.open("wb") as out:
        out.truncate(2**30)
    done = subprocess.run(
        ["sh", "-c", f"ulimit -v 900000; exec {PROGRAM} import {file} --url http://127.0.0.1:9"],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "line 1: expected at most" in done.stderr
