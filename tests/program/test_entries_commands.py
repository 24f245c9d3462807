"""Looking inside from the command line: entries, purge, stats --watch."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.cells import cell_len

from proxy.cache.dialects import DIALECTS
from proxy.settings import Settings
from proxy.web.app import make_app
from proxy.web.listen import listening
from tests.conftest import Proxy, StartProxy, settings_for
from tests.fake_model import FakeModel, reply
from tests.program.terminal import Terminal, terminal
from tests.program.test_cli import PROGRAM, Ran, environment, run, run_async
from tests.web.test_entries import ask, many, now_ms, numbers, put, stored
from tests.web.test_near import ASKED, OTHER

NASTY = "\x1b[31m[/x] [bold]:smile: \x07\u202e\n\r\tend"
HOUR_MS = 3_600_000


async def command(home: Path, proxy: Proxy, *arguments: str) -> Ran:
    return await run_async(home, *arguments, "--url", proxy.url)


def rows(ran: Ran) -> list[list[str]]:
    """The cells of a table, by their gaps of two spaces; the head left out."""
    assert (ran.code, ran.err) == (0, "")
    return [[cell for cell in line.split("  ") if cell] for line in ran.out.splitlines()[1:]]


# nearhit entries


async def test_entries_as_a_table(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await ask(proxy, ASKED, model="tiny")
    hit = await ask(proxy, ASKED, model="tiny")
    await numbers(proxy)
    await put(proxy, stored(2, stored_ms=now_ms() - 3 * HOUR_MS, expires_ms=now_ms() - 1, cost_ms=65_400))
    ran = await command(tmp_path, proxy, "entries")
    assert ran.out.splitlines()[0].split() == ["id", "age", "ttl", "hits", "saved", "model", "words"]
    expired, fresh = ([cell.strip() for cell in row] for row in rows(ran))
    assert expired == ["0000000200000000", "3h", "expired", "0", "65.4 s", "small", "-"]
    assert (fresh[0], fresh[-2], fresh[-1]) == (hit.headers["X-Nearhit-Entry"][:16], "tiny", ASKED)
    assert fresh[2:4] == ["2d 23h", "1"]


async def test_entries_for_programs(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await put(proxy, *(stored(number) for number in (1, 2)))
    ran = await command(tmp_path, proxy, "entries", "--json", "--oldest")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert [one["id"][:8] for one in told["entries"]] == ["00000001", "00000002"]
    assert (told["complete"], told["next"]) == (True, None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "large"), ["00000002"]),
        (("--model", ""), []),
        (("--endpoint", "completions"), ["00000003"]),
        (("--namespace", ""), ["00000002", "00000001"]),
        (("--text", "DIM the"), ["00000001"]),
        (("--text", "100% & more=?#"), ["00000002"]),
        (("--id", "00000003"), ["00000003"]),
        (("--fingerprint", (b"f" * 32).hex(), "--limit", "1"), ["00000003"]),
        (("--older", "90m"), ["00000003"]),
        (("--older", "1.5h", "--newer", "1d"), ["00000003"]),
        (("--newer", "5400s"), ["00000002", "00000001"]),
        (("--older", "2d"), []),
    ],
)
async def test_entries_that_meet_conditions(
    tmp_path: Path, start: StartProxy, arguments: tuple[str, ...], expected: list[str]
) -> None:
    proxy = await start()
    await put(
        proxy,
        stored(1, words="Dim the lamp.", near=True),
        stored(2, model="large", words="100% & more=?#", near=True),
        stored(3, endpoint="completions", namespace=b"n" * 32, stored_ms=now_ms() - 2 * HOUR_MS),
    )
    ran = await command(tmp_path, proxy, "entries", "--json", *arguments)
    assert [one["id"][:8] for one in json.loads(ran.out)["entries"]] == expected


async def test_entries_are_as_many_as_asked_for(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await many(proxy, 1500)
    for arguments, count in (((), 20), (("--limit", "3"), 3), (("--limit", "1200"), 1200), (("--limit", "5000"), 1500)):
        ran = await command(tmp_path, proxy, "entries", "--json", *arguments)
        assert len({one["id"] for one in json.loads(ran.out)["entries"]}) == count
    table = await command(tmp_path, proxy, "entries")
    assert table.err == "there may be more; --limit 200 lists further\n"


async def test_no_entries_are_told_as_such(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    expected = Ran(0, "no entry is stored that meets this\n", "")
    assert await command(tmp_path, proxy, "entries", "--text", "nowhere") == expected


async def test_what_is_stored_cannot_give_commands_to_the_terminal(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    answer = json.dumps({"choices": [{"index": 0, "message": {"content": NASTY}}]}).encode()
    await put(proxy, stored(1, words=NASTY, near=True, model=NASTY, answer=answer))
    for arguments in (("entries",), ("entries", "00000001"), ("purge", "--all", "--dry-run")):
        ran = await command(tmp_path, proxy, *arguments)
        assert (ran.code, ran.err) == (0, "")
        assert not {"\x1b", "\x07", "\u202e", "\r", "\t"} & set(ran.out)
        assert "[/x] [bold]:smile:" in ran.out
    assert len(rows(await command(tmp_path, proxy, "entries"))) == 1


async def test_words_are_cut_to_the_width_of_a_terminal_and_whole_in_a_pipe(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    words = "Wie geht es dir heute? 今日は元気ですか? " * 8
    await put(proxy, stored(1, words=words, near=True, model="m" * 100))

    def shown() -> list[str]:
        with terminal(tmp_path, "entries", "--url", proxy.url) as screen:
            assert screen.end() == 0
            return screen.lines

    lines = await asyncio.to_thread(shown)
    assert len(lines) == 2
    assert max(map(cell_len, lines)) <= 100
    assert "Wie geht es dir heute? 今" in lines[1]
    assert "…" in lines[1]
    assert words.strip() in (await command(tmp_path, proxy, "entries")).out


# nearhit entries ID


async def test_one_entry_with_its_answer(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    model.respond = reply("First line.\n", "Second line.")
    proxy = await start()
    await ask(proxy, ASKED)
    shown = (await ask(proxy, ASKED)).headers["X-Nearhit-Entry"]
    ran = await command(tmp_path, proxy, "entries", shown[:12])
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"entry {shown}")
    assert f"\nWords\n  {ASKED}\n" in ran.out
    assert ran.out.endswith("\nAnswer\n  First line.\n  Second line.\n")
    told = dict(line.split(maxsplit=1) for line in ran.out.partition("\nWords")[0].splitlines())
    assert (told["namespace"], told["hits"], told["endpoint"], told["model"]) == ("shared", "1", "chat", "-")
    as_json = await command(tmp_path, proxy, "entries", shown, "--json")
    assert json.loads(as_json.out)["answer"]["choices"][0]["message"]["content"] == "First line.\nSecond line."


async def test_an_answer_that_is_more_than_text_is_shown_whole(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    call = {"function": {"name": "lamp", "arguments": "{}"}, "id": "call_1", "type": "function"}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    await put(proxy, stored(1, answer=json.dumps({"choices": [{"message": message}]}).encode()))
    await put(proxy, stored(2, sealed=True, answer=b"\0", expires_ms=now_ms() - 1, stored_ms=now_ms() - 2))
    assert '"call_1"' in (await command(tmp_path, proxy, "entries", "00000001")).out
    sealed = (await command(tmp_path, proxy, "entries", "00000002")).out
    assert "it has expired" in sealed
    assert sealed.endswith("the answer is sealed: only the request that it belongs to can open it\n")


CHAT = {"choices": [{"message": {"content": "It is off."}}]}
THOUGHT = {"type": "thinking", "thinking": "Which lamp?", "signature": ""}
MESSAGE = {
    "type": "message",
    "content": [THOUGHT, {"type": "text", "text": "It is "}, {"type": "text", "text": "off."}],
}
USE = {"type": "tool_use", "id": "toolu_1", "name": "lamp", "input": {}}
SAID = {"type": "message", "content": [{"type": "output_text", "text": "It is off.", "annotations": []}]}
CALL = {"type": "function_call", "call_id": "call_1", "name": "lamp", "arguments": "{}"}


def embedding(vector: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": vector}]}


@pytest.mark.parametrize(
    ("endpoint", "answer", "shown"),
    [
        ("chat", CHAT, "\n  It is off.\n"),
        ("completions", {"choices": [{"text": "It is off."}]}, "\n  It is off.\n"),
        ("messages", MESSAGE, "\n  It is off.\n"),
        ("messages", {**MESSAGE, "content": [*MESSAGE["content"], USE]}, '"toolu_1"'),
        ("responses", {"output": [{"type": "reasoning", "summary": []}, SAID]}, "\n  It is off.\n"),
        ("responses", {"output": [SAID, CALL]}, '"call_1"'),
        ("embeddings", embedding([0.25] * 384), "\n  a vector of 384 numbers\n"),
        ("embeddings", embedding(base64.b64encode(bytes(4 * 383)).decode()), "\n  a vector of 383 numbers\n"),
        ("chat", {"choices": []}, '"choices"'),
        ("messages", {"content": [{"type": "text", "text": 7}]}, '"content"'),
        ("embeddings", embedding(None), '"embedding"'),
    ],
)
async def test_an_answer_of_any_endpoint_is_shown_by_what_it_says(
    tmp_path: Path, start: StartProxy, endpoint: str, answer: dict[str, Any], shown: str
) -> None:
    proxy = await start()
    await put(proxy, stored(1, endpoint=endpoint, answer=json.dumps(answer).encode()))
    ran = await command(tmp_path, proxy, "entries", "00000001")
    assert (ran.code, ran.err) == (0, "")
    assert shown in ran.out.partition("\nAnswer")[2]


async def test_an_explanation_tells_what_was_assumed_and_which_inputs_are_known(
    tmp_path: Path, start: StartProxy, model: FakeModel
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse | None:
        data = [{"object": "embedding", "index": 0, "embedding": [0.5]}]
        return web.json_response({"object": "list", "data": data}) if request.path == "/v1/embeddings" else None

    model.extra = answer
    proxy = await start()
    await proxy.post("/v1/embeddings", json={"input": ["one"]})
    await proxy.settled()
    file = tmp_path / "request.json"
    await asyncio.to_thread(file.write_text, json.dumps({"input": ["one", "two"]}))
    ran = await command(tmp_path, proxy, "explain", str(file))
    assert (ran.code, ran.err) == (0, "")
    told = [line.strip() for line in ran.out.splitlines()]
    assert told[:3] == ["MISS  partial  (embeddings)", "assumed: it is for /v1/embeddings", "1 of 2 inputs are known"]
    assert told[3].startswith("0: known, ")
    assert told[4] == "1: absent"


@pytest.mark.parametrize(
    ("grace_ms", "told"),
    [(0, "it has expired: it is not served"), (2 * HOUR_MS, "it has expired: for 1h 59m it may stand in for one")],
)
async def test_an_expired_entry_tells_whether_it_may_stand_in(
    tmp_path: Path, start: StartProxy, grace_ms: int, told: str
) -> None:
    proxy = await start()
    now = now_ms()
    await put(proxy, stored(1, stored_ms=now - HOUR_MS, expires_ms=now - 10_000, grace_ms=grace_ms))
    assert told in (await command(tmp_path, proxy, "entries", "00000001")).out


@pytest.mark.parametrize("more", [(), ("--json",)])
async def test_one_entry_is_removed(tmp_path: Path, start: StartProxy, more: tuple[str, ...]) -> None:
    proxy = await start()
    await put(proxy, stored(1), stored(2))
    ran = await command(tmp_path, proxy, "entries", "00000001", "--delete", *more)
    assert (ran.code, ran.err) == (0, "")
    assert stored(1).key.hex() in ran.out
    assert (json.loads(ran.out)["removed"] is True) if more else ran.out.startswith("removed ")
    assert await numbers(proxy) == [2]
    again = await command(tmp_path, proxy, "entries", "00000001", "--delete", *more)
    assert again == Ran(1, "", f"nearhit: {proxy.url} refused: no entry has this id\n")


async def test_an_id_of_several_is_one_line_and_exit_code_1(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await put(proxy, stored(1), stored(1, key=b"\0\0\0\1" + b"\1" * 28))
    ran = await command(tmp_path, proxy, "entries", "00000001")
    message = "several entries have an id that begins so: give more of it"
    assert ran == Ran(1, "", f"nearhit: {proxy.url} refused: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("entries", "list"),
        ("entries", ""),
        ("entries", "../stats"),
        ("entries", "0000000"),
        ("entries", "00000001", "00000002"),
        ("entries", "00000001", "--model", "tiny"),
        ("entries", "00000001", "--limit", "3"),
        ("entries", "--delete"),
        ("entries", "--delete", "--model", "tiny"),
        ("entries", "--limit", "0"),
        ("entries", "--older", "2"),
        ("entries", "--older", "-2h"),
        ("entries", "--older", "2 weeks"),
        ("entries", "--newer", "\x1b[31m"),
        ("purge",),
        ("purge", "--yes"),
        ("purge", "--dry-run"),
        ("purge", "--older", "soon", "--yes"),
        ("purge", "--all"),
        ("stats", "--watch"),
        ("stats", "--every", "2"),
        ("stats", "--watch", "--json", "--every", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_asks_nobody(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments, "--url", "http://127.0.0.1:9")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err
    assert "Traceback" not in ran.err
    assert "\x1b" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("entries", "--endpoint", "rerank"), f"endpoint: expected {' or '.join(one.endpoint for one in DIALECTS)}"),
        (("entries", "--id", "abc"), "id: expected the first 8 to 64 hexadecimal digits of an entry's id"),
        (("purge", "--all", "--model", "x", "--yes"), 'all: expected without model: "all" means every entry'),
        (
            ("purge", "--older", "1h", "--newer", "1h", "--yes"),
            "older_s: expected less than newer_s, or no entry can be meant",
        ),
    ],
)
async def test_what_is_refused_is_one_line_and_exit_code_1(
    tmp_path: Path, start: StartProxy, arguments: tuple[str, ...], message: str
) -> None:
    proxy = await start()
    assert await command(tmp_path, proxy, *arguments) == Ran(1, "", f"nearhit: {proxy.url} refused: {message}\n")


async def test_bytes_that_are_no_text_are_one_line(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    for arguments in (("entries", "--text", "\udcff"), ("purge", "--text", "\udcff", "--yes")):
        ran = await command(tmp_path, proxy, *arguments)
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("arguments", [("entries",), ("entries", "00000001"), ("purge", "--all", "--yes")])
def test_without_a_running_one_every_command_says_so(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments, "--url", "http://127.0.0.1:9")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: no nearhit answers at http://127.0.0.1:9 (")
    assert ran.err.count("\n") == 1


async def test_the_token_is_shown(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    asked = ("entries", "--url", proxy.url, "--data-dir", str(tmp_path / "elsewhere"))
    assert (await run_async(tmp_path, *asked, NEARHIT_ADMIN_TOKEN="opensesame")).code == 0
    refused = await run_async(tmp_path, *asked)
    assert refused == Ran(1, "", f"nearhit: {proxy.url} refused: send the admin token as X-Nearhit-Admin\n")


# nearhit purge


async def test_a_dry_run_tells_what_would_go(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await put(proxy, *(stored(number, words=f"question {number}", near=True) for number in range(1, 8)))
    ran = await command(tmp_path, proxy, "purge", "--model", "small", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"7 entries would go, with {7 * len(stored(1).answer)} bytes of answers"
    assert lines[1] == "  0000000700000000  question 7"
    assert lines[-1] == "  and 2 more"
    as_json = await command(tmp_path, proxy, "purge", "--model", "small", "--dry-run", "--json")
    assert json.loads(as_json.out)["would_remove"] == 7
    assert len(await numbers(proxy)) == 7


async def test_a_purge_without_a_terminal_wants_to_be_told(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await put(proxy, stored(1), stored(2, model="large"))
    assert (await command(tmp_path, proxy, "purge", "--all")).code == 2
    assert await numbers(proxy) == [2, 1]
    assert await command(tmp_path, proxy, "purge", "--model", "large", "--yes") == Ran(0, "removed 1 entry\n", "")
    told = await command(tmp_path, proxy, "purge", "--all", "--yes", "--json")
    assert (told.code, json.loads(told.out)["removed"]) == (0, 1)
    assert await numbers(proxy) == []


@pytest.mark.parametrize(("typed", "code", "left"), [("y\n", 0, [1]), ("n\n", 1, [2, 1]), ("\n", 1, [2, 1])])
async def test_a_purge_on_a_terminal_asks_first(
    tmp_path: Path, start: StartProxy, typed: str, code: int, left: list[int]
) -> None:
    proxy = await start()
    await put(proxy, stored(1), stored(2, model="large", words="Dim the lamp. " * 20, near=True))

    def purged() -> tuple[int, list[str]]:
        with terminal(tmp_path, "purge", "--model", "large", "--url", proxy.url) as screen:
            screen.until("Remove them? [y/N]")
            screen.type(typed)
            return screen.end(), screen.lines

    ended, lines = await asyncio.to_thread(purged)
    shown = "\n".join(lines)
    assert ended == code
    assert "1 entry would go" in shown
    assert ("removed 1 entry" in shown, "nothing was removed" in shown) == (code == 0, code == 1)
    assert max(map(cell_len, lines)) <= 100
    assert await numbers(proxy) == left


async def test_a_purge_of_nothing_asks_nothing(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()

    def purged() -> tuple[int, str]:
        with terminal(tmp_path, "purge", "--all", "--url", proxy.url) as screen:
            return screen.end(), screen.shown

    code, shown = await asyncio.to_thread(purged)
    assert code == 0
    assert "removed 0 entries" in shown


# nearhit stats --watch


class Watch:
    """A running `nearhit stats --watch --json`."""

    def __init__(self, home: Path, url: str) -> None:
        arguments = ["stats", "--watch", "--json", "--every", "0.1", "--url", url]
        self.process = subprocess.Popen(
            [str(PROGRAM), *arguments], env=environment(home), cwd=home, stdout=subprocess.PIPE, text=True
        )

    def look(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told

    async def until(self, name: str, value: Any) -> dict[str, Any]:
        """The first look of which this is true."""
        async with asyncio.timeout(60):
            while (told := await asyncio.to_thread(self.look)).get(name) != value:
                pass
        return told

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        self.process.stdout.read()
        return self.process.wait(60)


@asynccontextmanager
async def watching(home: Path, url: str) -> AsyncIterator[Watch]:
    watch = await asyncio.to_thread(Watch, home, url)
    try:
        yield watch
    finally:
        watch.process.kill()
        await asyncio.to_thread(watch.process.wait)
        if watch.process.stdout is not None:
            watch.process.stdout.close()


async def test_watching_tells_what_happened_between_two_looks(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await ask(proxy, OTHER)
    async with watching(tmp_path, proxy.url) as watch:
        first = await asyncio.to_thread(watch.look)
        assert (first["answering"], first["interval_s"], first["hit_rate"]) == (True, None, None)
        assert first["stats"]["requests"]["MISS"] == 1
        quiet = await asyncio.to_thread(watch.look)
        assert (quiet["requests_per_s"], quiet["hit_rate"], quiet["saved_ms"]) == (0, None, 0)
        await ask(proxy, OTHER)
        told = await watch.until("hit_rate", 1.0)
        assert told["requests_per_s"] > 0
        assert told["outcomes"] == {"HIT": 1, "NEAR": 0, "STALE": 0, "JOINED": 0, "MISS": 0, "BYPASS": 0}
        assert await asyncio.to_thread(watch.end) == 0


@asynccontextmanager
async def serving(settings: Settings, port: int) -> AsyncIterator[None]:
    async with listening(make_app(settings), "127.0.0.1", port, 0.2):
        yield


async def test_watching_survives_a_restart(tmp_path: Path, model: FakeModel) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = settings_for(tmp_path, model.url)
    async with watching(tmp_path, f"http://127.0.0.1:{port}") as watch:
        told = await watch.until("answering", False)
        assert "Connection refused" in told["trouble"]
        for _ in range(2):
            async with serving(settings, port):
                told = await watch.until("answering", True)
                assert told["interval_s"] is None
                await watch.until("requests_per_s", 0)
            await watch.until("answering", False)
        assert await asyncio.to_thread(watch.end) == 0


async def test_watching_on_a_terminal_until_ctrl_c(tmp_path: Path, model: FakeModel) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = settings_for(tmp_path, model.url)
    arguments = ("stats", "--watch", "--every", "0.1", "--url", f"http://127.0.0.1:{port}")

    def opened() -> Terminal:
        return screens.enter_context(terminal(tmp_path, *arguments))

    from contextlib import ExitStack

    with ExitStack() as screens:
        async with serving(settings, port):
            screen = await asyncio.to_thread(opened)
            shown = await asyncio.to_thread(screen.until, "upstream")
            for told in ("requests/s", "from the cache", "time saved", "MISS", "entries"):
                assert told in shown
        await asyncio.to_thread(screen.until, "not answering, trying again")
        async with serving(settings, port):
            await asyncio.to_thread(screen.until, "Ctrl-C ends")
            screen.interrupt()
            assert await asyncio.to_thread(screen.end) == 0
    assert "Traceback" not in screen.shown
    # The cursor is back.
    assert screen.shown.rstrip().endswith("\x1b[?25h")


async def test_watching_without_the_right_to_it_ends_at_once(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    ran = await run_async(tmp_path, "stats", "--watch", "--json", "--url", proxy.url, "--data-dir", "elsewhere")
    assert ran == Ran(1, "", f"nearhit: {proxy.url} refused: send the admin token as X-Nearhit-Admin\n")
