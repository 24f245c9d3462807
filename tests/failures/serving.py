"""nearhit in a process of its own, on a disk of its own."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from storage.sqlite import open_sqlite
from tests.failures.disks import Disk
from tests.fake_model import FakeModel, Respond, chat_body
from tests.program.test_cli import ROOT, environment
from tests.program.test_serve import LIMIT_S, Running

HASTY = (sys.executable, "-m", "tests.failures.hasty")
BIG = 100_000
"""Characters of an answer that no log on a full disk has room for."""


def long_answers(size: int = BIG) -> Respond:
    """Each request gets another answer, of this length or a little more."""

    async def respond(model: FakeModel, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        return web.json_response(chat_body(f"answer {model.started} " + "x" * size))

    return respond


class Nearhit(Running):
    """One that is asked in more ways."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def outcome(self, content: str) -> str:
        status, outcome, _ = await self.chat(content)
        assert status == 200
        return outcome

    async def knows(self, content: str) -> bool:
        """Whether it has the answer."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        headers = {"Cache-Control": "only-if-cached"}
        async with self._session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status in (200, 504), await response.text()
            return response.status == 200

    async def errors(self, op: str) -> int:
        """How many operations of this kind failed."""
        async with self._session.get(f"{self.url}/metrics") as response:
            text = await response.text()
        found = re.search(rf'nearhit_storage_errors_total{{op="{op}"}} (\S+)', text)
        return int(float(found[1])) if found else 0

    async def size(self) -> int | None:
        """Entries in the store; None where it cannot tell."""
        _, stats = await self.get("/-/stats")
        size: int | None = stats["cache.size"]
        return size

    async def storage(self) -> str:
        """Whether the store is open or closed."""
        status, told = await self.get("/-/ready")
        assert status == 200
        return str(told["storage"]["standing"])

    async def problems(self) -> str:
        """What its doctor calls a problem."""
        _, told = await self.get("/-/doctor")
        return "; ".join(one["what"] for one in told["findings"] if one["severity"] == "problem")

    def told(self, text: str) -> list[str]:
        """Lines of its log that have this in them."""
        return [line for line in self.lines if text in line]

    async def until(self, condition: Callable[[], Awaitable[object]]) -> None:
        """Wait until it holds; the limit only ends a test that has failed."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not await condition():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(
                "\n".join(line for line in self.lines if " HTTP/" not in line and " ms " not in line)
            ) from None

    async def stores(self, *contents: str) -> None:
        """Ask, and wait until the answers are in the file."""
        before = await self.size() or 0
        for content in contents:
            assert await self.outcome(content) == "MISS"

        async def all_there() -> bool:
            return await self.size() == before + len(contents)

        await self.until(all_there)

    async def stores_again(self, content: str) -> None:
        """Wait until new answers come to the store; what is asked begins with this."""
        size, number = await self.size(), 0

        async def more() -> bool:
            nonlocal number
            number += 1
            assert (await self.chat(f"{content} {number}"))[0] == 200
            now = await self.size()
            return now is not None and now > (size or 0)

        await self.until(more)


@asynccontextmanager
async def serving_on(disk: Disk, model: FakeModel, **variables: str) -> AsyncIterator[Nearhit]:
    """Run it with its data directory on this disk; it is killed at the end if it still runs."""
    arguments = ("serve", "--port", "0", "--upstream", model.url, "--data-dir", str(disk.folder / "data"))
    # A process that may write no further, or is killed, would leave half a measurement of coverage.
    kept = {name: value for name, value in environment(disk.folder).items() if not name.startswith("COVERAGE_")}
    exact = {"NEARHIT_CACHE_MODE": "exact", "NEARHIT_CACHE_FLUSH_S": "0.02", "NEARHIT_UPSTREAM_POLL_S": "0.1"}
    process = await asyncio.create_subprocess_exec(
        *(*disk.prefix, *HASTY, *arguments),
        env={**kept, "PYTHONPATH": str(ROOT), **exact, **variables},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(LIMIT_S)) as session:
        running = Nearhit(process, session)
        try:
            await running.announced()
            await running.until(lambda: _is_ready(running))
            yield running
        finally:
            await running.force()


async def _is_ready(running: Nearhit) -> bool:
    status, _ = await running.get("/-/ready")
    return status == 200


def database(disk: Disk) -> Path:
    """The file, as this process finds it."""
    return disk.seen / "data" / "nearhit.db"


async def sound(disk: Disk) -> int:
    """How many entries are in the file, which nobody uses, once it was seen to be sound."""
    # SQLite finds no way into another mount namespace.
    copy = disk.folder.with_name("copy")
    await asyncio.to_thread(_copy_database, database(disk), copy)
    async with open_sqlite(copy / "nearhit.db") as store:
        assert await store.problems() == []
        return (await store.totals()).entries


def _copy_database(path: Path, copy: Path) -> None:
    names = {part.name for part in path.parent.iterdir()}
    assert not [name for name in names if ".corrupt" in name]
    copy.mkdir()
    for name in names & {"nearhit.db", "nearhit.db-wal"}:
        shutil.copy(path.with_name(name), copy)
