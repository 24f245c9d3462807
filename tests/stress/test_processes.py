"""Several processes on one file, each with many tasks: nobody sees a wrong answer, nobody hears of a lock."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from storage.sqlite import open_sqlite
from tests.storage.files import start_python
from tests.stress.oracle import Event, final_values, value_of, wrong_reads
from tests.stress.worker import Orders, now_ms

_WORK = "from tests.stress.worker import main; main()"
_LIMIT_S = 120.0

ROOMY = Orders(
    path="",
    process=0,
    seed=1,
    tasks=8,
    seconds=4.0,
    keys=300,
    max_entries=100_000,
    max_bytes=1 << 30,
    top_k=100_000,
    short=False,
)
TIGHT = replace(ROOMY, keys=900, max_entries=150, max_bytes=8 << 20, top_k=20, short=True)


class Running:
    """A worker; its lines are read by a thread, so that its pipe never fills."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.led = threading.Event()
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def report(self) -> dict[str, Any]:
        assert self.process.wait(_LIMIT_S) == 0
        self._thread.join()
        found: dict[str, Any] = json.loads(self.lines[-1])
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._thread.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "leads\n":
                self.led.set()
            else:
                self.lines.append(line)


@contextmanager
def workers(orders: Orders, path: Path, count: int) -> Iterator[list[Running]]:
    running: list[Running] = []
    try:
        for number in range(count):
            told = json.dumps(asdict(replace(orders, path=str(path), process=number)))
            running.append(Running(start_python(_WORK, told)))
        yield running
    finally:
        for one in running:
            one.end()


def events_of(reports: list[dict[str, Any]]) -> list[Event]:
    return [Event.decoded(line) for report in reports for line in report["events"]]


def check(reports: list[dict[str, Any]]) -> None:
    """Nobody saw anything wrong or was told of trouble, and everything was tried."""
    assert [report["wrong"] for report in reports] == [[]] * len(reports)
    assert [report["errors"] for report in reports] == [{}] * len(reports)
    assert all(count for report in reports for count in report["done"].values())
    assert list(wrong_reads(events_of(reports)))[:10] == []


async def problems(path: Path) -> list[str]:
    async with open_sqlite(path) as store:
        return await store.problems()


async def entries(path: Path) -> int:
    async with open_sqlite(path) as store:
        return (await store.totals()).entries


async def stored_values(path: Path, keys: list[str]) -> dict[str, str]:
    async with open_sqlite(path) as store:
        found = {key: await store.get(bytes.fromhex(key), now_ms()) for key in keys}
    return {key: "" if entry is None else value_of(entry.key, entry.answer) for key, entry in found.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nearhit.db"


def test_processes_agree_on_one_file(path: Path) -> None:
    with workers(ROOMY, path, 3) as running:
        reports = [one.report() for one in running]
    check(reports)
    assert asyncio.run(problems(path)) == []
    # There was room for all: what was written last is there, and what was deleted last is not.
    possible = final_values(events_of(reports))
    stored = asyncio.run(stored_values(path, list(possible)))
    assert {key: value for key, value in stored.items() if value not in possible[key]} == {}
    assert sum(report["removed"].get("bound", 0) for report in reports) == 0


def test_processes_keep_one_small_room(path: Path) -> None:
    with workers(TIGHT, path, 3) as running:
        reports = [one.report() for one in running]
    check(reports)
    assert asyncio.run(problems(path)) == []
    assert asyncio.run(entries(path)) <= TIGHT.max_entries
    removed = [report["removed"] for report in reports]
    assert sum(one.get("bound", 0) for one in removed) > 0
    assert sum(one.get("expired", 0) for one in removed) > 0


def test_another_takes_over_from_a_leader_that_is_killed(path: Path) -> None:
    with workers(replace(TIGHT, seconds=7.0), path, 3) as running:
        first = next(one for one in iter_led(running) if one is not None)
        first.process.kill()
        left = [one for one in running if one is not first]
        assert any(one is not None for one in iter_led(left))
        reports = [one.report() for one in left]
    check(reports)
    assert [report["led"] for report in reports].count(True) >= 1
    assert asyncio.run(problems(path)) == []
    assert asyncio.run(entries(path)) <= TIGHT.max_entries


def iter_led(running: list[Running]) -> Iterator[Running | None]:
    """Who leads, asked again and again until somebody does; the limit only ends a test that has failed."""
    for _ in range(int(_LIMIT_S / 0.02)):
        for one in running:
            if one.led.wait(0.02 / len(running)):
                yield one
                return
        yield None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("orders", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_processes_agree_for_a_long_time(path: Path, orders: Orders, seed: int) -> None:
    with workers(replace(orders, seed=seed, tasks=24, seconds=30.0, keys=3000), path, 5) as running:
        reports = [one.report() for one in running]
    check(reports)
    assert asyncio.run(problems(path)) == []
    assert asyncio.run(entries(path)) <= orders.max_entries
