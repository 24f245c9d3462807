"""The installed program as a process: starting, stopping, being killed, and two at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy import __version__
from tests.fake_model import FakeModel, chat_events, fake_model, sse, streamed
from tests.program.test_cli import PROGRAM, environment

LIMIT_S = 60.0
"""Ends a test that has failed; nothing is decided by it."""


class Running:
    """A nearhit in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self._process = process
        self._session = session
        self._reading: asyncio.Task[None] | None = None
        self.lines: list[str] = []
        self.url = ""

    async def announced(self) -> None:
        """Read up to the line that tells the address, and go on reading in the background."""
        async with asyncio.timeout(LIMIT_S):
            while not self.url:
                line = await self._line()
                assert line, f"it ended: {self.lines}"
                told = re.match(r"nearhit \S+ listens on (http://\S+), upstream ", line)
                self.url = told[1] if told else ""
        self._reading = asyncio.create_task(self._read_on())

    async def _line(self) -> str:
        assert self._process.stderr is not None
        line = (await self._process.stderr.readline()).decode()
        if line:
            self.lines.append(line.removesuffix("\n"))
        return line

    async def _read_on(self) -> None:
        while await self._line():
            pass

    def pause_reading(self) -> None:
        """Leave its log unread from now on."""
        assert self._reading is not None
        self._reading.cancel()
        self._reading = None

    def resume_reading(self) -> None:
        """Read what is left: asyncio takes a process for ended only when its output has."""
        self._reading = asyncio.create_task(self._read_on())

    async def exit_code(self) -> int:
        """How it ended, once it has, whether or not its output was read."""
        async with asyncio.timeout(LIMIT_S):
            while self._process.returncode is None:
                await asyncio.sleep(0.01)
        return self._process.returncode

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for the end; the exit code."""
        async with asyncio.timeout(LIMIT_S):
            code = await self._process.wait()
            if self._reading is not None:
                await self._reading
            return code

    async def stop(self, number: int = signal.SIGTERM) -> int:
        self.send(number)
        return await self.ended()

    async def force(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self.ended()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._session.get(self.url + path) as response:
            return response.status, await response.json()

    async def chat(self, content: str = "hi", **fields: Any) -> tuple[int, str, bytes]:
        """Status, outcome and body of a chat request."""
        async with self.asking(content, **fields) as response:
            return response.status, response.headers.get("X-Cache", ""), await response.read()

    @asynccontextmanager
    async def asking(self, content: str, **fields: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **fields}
        async with self._session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            yield response


@asynccontextmanager
async def serving(home: Path, upstream: str, *flags: str, **variables: str) -> AsyncIterator[Running]:
    """Run `nearhit serve` on a free port; it is killed at the end if it still runs."""
    arguments = ("serve", "--port", "0", "--upstream", upstream, *flags)
    process = await asyncio.create_subprocess_exec(
        *(str(PROGRAM), *arguments),
        # What the near tier loads would take most of the time of most tests here.
        env=environment(home, **{"NEARHIT_UPSTREAM_POLL_S": "0.1", "NEARHIT_CACHE_MODE": "exact", **variables}),
        cwd=home,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LIMIT_S)) as session:
        running = Running(process, session)
        try:
            await running.announced()
            await _confirmed(running)
            yield running
        finally:
            await running.force()


async def _confirmed(running: Running) -> None:
    """Wait until the first look at the upstream is over."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            status, _ = await running.get("/-/ready")
            if status == 200:
                return
            await asyncio.sleep(0.01)


def database(home: Path) -> Path:
    return home / ".local" / "share" / "nearhit" / "nearhit.db"


# Starting


async def test_it_starts_without_a_configuration_file(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url) as nearhit:
        assert nearhit.lines[0].startswith(f"nearhit {__version__} listens on http://127.0.0.1:")
        assert nearhit.lines[0].endswith(f", upstream {model.url}")
        assert not nearhit.url.endswith(":0")
        assert (await nearhit.chat())[:2] == (200, "MISS")
        assert (await nearhit.chat())[:2] == (200, "HIT")
        assert await nearhit.stop() == 0
    assert await asyncio.to_thread(database(tmp_path).is_file)


async def test_its_private_files_are_private(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url) as nearhit:
        data = database(tmp_path).parent
        modes = await asyncio.to_thread(lambda: {p.name: p.stat().st_mode & 0o777 for p in (data, *data.iterdir())})
        assert modes["nearhit"] == 0o700
        assert modes["admin.token"] == modes["secret"] == modes["nearhit.db"] == 0o600
        assert await nearhit.stop() == 0


async def test_an_address_for_all_warns_about_the_missing_token(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url, "--host", "0.0.0.0") as nearhit:
        assert await nearhit.stop() == 0
    assert "nearhit: admin.token is not set: /-/stats answers this machine only" in nearhit.lines


async def test_a_data_directory_that_cannot_be_made_is_told_and_does_not_stop(tmp_path: Path, model: FakeModel) -> None:
    await asyncio.to_thread((tmp_path / "file").touch)
    async with serving(tmp_path, model.url, "--data-dir", str(tmp_path / "file" / "data")) as nearhit:
        assert (await nearhit.chat())[:2] == (200, "MISS")
        assert (await nearhit.chat())[:2] == (200, "HIT")
        assert await nearhit.stop() == 0
    told = "\n".join(nearhit.lines)
    assert "no local admin token" in told
    assert "answers are kept in memory only" in told
    assert "Traceback" not in told


async def test_without_persistence_no_database_is_made(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url, "--cache-persist=off") as nearhit:
        await nearhit.chat()
        assert (await nearhit.chat())[1] == "HIT"
        assert await nearhit.stop() == 0
    assert not await asyncio.to_thread(database(tmp_path).exists)


async def test_without_an_upstream_it_serves_502_and_is_ready(tmp_path: Path) -> None:
    async with serving(tmp_path, "http://127.0.0.1:9") as nearhit:
        status, _, body = await nearhit.chat()
        assert status == 502
        assert json.loads(body)["error"]["code"] == "upstream_unreachable"
        ready, told = await nearhit.get("/-/ready")
        assert (ready, told["status"]) == (200, "ready")
        assert told["upstream"]["trouble"] == "the upstream cannot be reached"
        assert await nearhit.stop() == 0


async def test_an_upstream_that_comes_later_is_found(tmp_path: Path) -> None:
    async with fake_model() as first:
        url = first.url
    async with serving(tmp_path, url) as nearhit:
        assert (await nearhit.chat())[0] == 502
        async with fake_model(int(url.rpartition(":")[2])), asyncio.timeout(LIMIT_S):
            while True:
                _, told = await nearhit.get("/-/stats")
                if told["upstream"]["standing"] == "confirmed" and told["sharing"]["namespaces"] == "shared":
                    break
                await asyncio.sleep(0.01)
            assert (await nearhit.chat())[:2] == (200, "MISS")
            assert (await nearhit.chat())[:2] == (200, "HIT")
        assert await nearhit.stop() == 0


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_stream_end_and_keeps_its_answer(tmp_path: Path, model: FakeModel, number: int) -> None:
    whole = [sse(event, done=False) for event in chat_events("Hel", "lo.")] + [sse()]
    model.respond = streamed(*whole, hold_after=2)
    async with serving(tmp_path, model.url) as nearhit:
        async with nearhit.asking("long", stream=True) as response:
            first = await response.content.readuntil(b"\n\n")
            nearhit.send(number)
            await _refuses_connections(nearhit)
            model.release.set()
            rest = await response.content.read()
        assert first + rest == b"".join(whole)
        assert await nearhit.ended() == 0
    async with serving(tmp_path, model.url) as again:
        assert (await again.chat("long", stream=True))[:2] == (200, "HIT")
        assert await again.stop() == 0
    assert model.started == 1


async def _refuses_connections(nearhit: Running) -> None:
    port = int(nearhit.url.rpartition(":")[2])
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                return
            writer.close()
            await asyncio.sleep(0.01)


async def test_a_stream_that_does_not_end_is_cut_at_the_limit(tmp_path: Path, model: FakeModel) -> None:
    whole = [sse(event, done=False) for event in chat_events("Hel", "lo.")] + [sse()]
    model.respond = streamed(*whole, hold_after=2)
    async with serving(tmp_path, model.url, NEARHIT_LIMITS_SHUTDOWN_S="0.1") as nearhit:
        async with nearhit.asking("long", stream=True) as response:
            await response.content.readuntil(b"\n\n")
            nearhit.send(signal.SIGTERM)
            with pytest.raises(aiohttp.ClientError):
                await response.content.read()
        assert await nearhit.ended() == 0
    assert "Traceback" not in "\n".join(nearhit.lines)


async def test_answers_younger_than_a_flush_survive_a_signal(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url, NEARHIT_CACHE_FLUSH_S="60") as nearhit:
        for number in range(20):
            assert (await nearhit.chat(f"q{number}"))[1] == "MISS"
        assert await nearhit.stop() == 0
    async with serving(tmp_path, model.url) as again:
        assert {(await again.chat(f"q{number}"))[1] for number in range(20)} == {"HIT"}
        assert await again.stop() == 0


async def test_a_reader_of_the_log_that_goes_away_does_not_hurt(tmp_path: Path, model: FakeModel) -> None:
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(str(PROGRAM), "serve", "--port", "0", "--upstream", model.url),
        env=environment(tmp_path),
        cwd=tmp_path,
        stderr=writer,
    )
    try:
        os.close(writer)
        with await asyncio.to_thread(open, reader) as stderr:
            first = await asyncio.to_thread(stderr.readline)
            while " listens on " not in first:
                first = await asyncio.to_thread(stderr.readline)
        url = first.split()[4].rstrip(",")
        async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
            for _ in range(2500):
                async with session.get(f"{url}/-/healthy") as response:
                    assert response.status == 200
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(LIMIT_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# Being killed


async def test_a_reader_of_the_log_that_falls_asleep_holds_nobody_up(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url) as nearhit:
        nearhit.pause_reading()
        # Several times what a pipe holds.
        for _ in range(20):
            statuses = await asyncio.gather(*(nearhit.get(f"/-/healthy?{'x' * 50}") for _ in range(200)))
            assert {status for status, _ in statuses} == {200}
        nearhit.send(signal.SIGTERM)
        assert await nearhit.exit_code() == 0
        nearhit.resume_reading()


async def _keep_asking(nearhit: Running, answered: dict[str, float], worker: int) -> None:
    loop = asyncio.get_running_loop()
    for number in range(10_000):
        question = f"{worker}-{number}"
        try:
            status, _, _ = await nearhit.chat(question)
        except (aiohttp.ClientError, ConnectionError):
            return
        assert status == 200
        answered[question] = loop.time()


async def test_what_was_acknowledged_a_flush_ago_survives_a_kill(tmp_path: Path, model: FakeModel) -> None:
    # Two waits and a write lie between an answer and the file; the rest allows for a busy machine.
    flush_s, allowed_s = 0.05, 4.0
    answered: dict[str, float] = {}
    async with serving(tmp_path, model.url, NEARHIT_CACHE_FLUSH_S=str(flush_s)) as nearhit:
        burst = [asyncio.create_task(_keep_asking(nearhit, answered, worker)) for worker in range(4)]
        await asyncio.sleep(allowed_s + 0.5)
        killed = asyncio.get_running_loop().time()
        assert await nearhit.stop(signal.SIGKILL) == -signal.SIGKILL
        await asyncio.gather(*burst)
    due = [question for question, when in answered.items() if when < killed - allowed_s]
    assert due
    async with serving(tmp_path, model.url) as again:
        assert {(await again.chat(question))[1] for question in due} == {"HIT"}
        assert await asyncio.to_thread(_integrity, database(tmp_path)) == "ok"
        assert await again.stop() == 0
    assert "corrupt" not in "\n".join(again.lines)


def _integrity(file: Path) -> str:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


async def test_a_kill_during_the_start_does_not_spoil_the_next(tmp_path: Path, model: FakeModel) -> None:
    for delay in (0.1, 0.2, 0.3, 0.4, 0.5):
        process = await asyncio.create_subprocess_exec(
            *(str(PROGRAM), "serve", "--port", "0", "--upstream", model.url),
            env=environment(tmp_path),
            stderr=asyncio.subprocess.DEVNULL,
        )
        await asyncio.sleep(delay)
        process.kill()
        await process.wait()
    async with serving(tmp_path, model.url) as nearhit:
        assert (await nearhit.chat())[1] == "MISS"
        assert (await nearhit.chat())[1] == "HIT"
        assert await nearhit.stop() == 0


# Two at once


async def test_two_on_one_database_know_each_others_answers(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url) as one, serving(tmp_path, model.url) as other:
        await one.chat("from one")
        await other.chat("from the other")
        for asked, question in ((other, "from one"), (one, "from the other")):
            await _becomes_hit(asked, question)
        assert await one.stop() == 0
        assert (await other.chat("from one"))[1] == "HIT"
        assert await other.stop() == 0
    assert await asyncio.to_thread(_integrity, database(tmp_path)) == "ok"


async def _becomes_hit(nearhit: Running, question: str) -> None:
    # A question that the model is asked in between is in this one's own cache, so only the first answer counts.
    async with asyncio.timeout(LIMIT_S):
        while True:
            async with nearhit._session.post(
                f"{nearhit.url}/v1/chat/completions",
                json={"messages": [{"role": "user", "content": question}], "temperature": 0},
                headers={"Cache-Control": "only-if-cached"},
            ) as response:
                if response.status == 200:
                    assert response.headers["X-Cache"] == "HIT"
                    return
            await asyncio.sleep(0.02)


# What it logs


async def test_with_json_every_line_after_the_announcement_is_json(tmp_path: Path, model: FakeModel) -> None:
    async with serving(tmp_path, model.url, "--log-format", "json", "--log-level", "debug") as nearhit:
        await nearhit.chat()
        await nearhit.get("/v1/models")
        model.loading = True
        status, _ = await nearhit.get("/v1/models")
        assert status == 503
        assert await nearhit.stop() == 0
    plain = [line for line in nearhit.lines if not line.startswith("{")]
    assert plain == [f"nearhit {__version__} listens on {nearhit.url}, upstream {model.url}"]
    told = [json.loads(line) for line in nearhit.lines if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(next(t for t in told if t.get("logger") == "nearhit"))
    assert [t["outcome"] for t in told if t.get("path") == "/v1/chat/completions"] == ["MISS"]


async def test_secrets_and_prompts_stay_out_of_the_log_of_a_whole_run(tmp_path: Path, model: FakeModel) -> None:
    async def breaks(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        raise ConnectionResetError

    variables = {"NEARHIT_UPSTREAM_API_KEY": "sk-upstream-key", "NEARHIT_ADMIN_TOKEN": "opensesame"}
    async with serving(tmp_path, model.url, "--log-level", "debug", **variables) as nearhit:
        await nearhit.chat("planted-prompt")
        model.respond = breaks
        await nearhit.chat("planted-prompt and more")
        assert await nearhit.stop() == 0
    told = "\n".join(nearhit.lines)
    assert "/v1/chat/completions" in told
    assert not [text for text in ("sk-upstream-key", "opensesame", "planted-prompt", "Hello there") if text in told]
