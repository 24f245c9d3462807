"""kill -9 at any moment: the file stays sound and has every answer that was acknowledged."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import pytest

from storage.sqlite import open_sqlite
from tests.storage.engines import NOW, key, near
from tests.storage.files import query, start_python

BURST = """
import asyncio, sys
from pathlib import Path
from storage.sqlite import open_sqlite
from storage.write_behind import write_behind
from tests.storage.engines import NOW, key, near, sketch

def failed(operation, error):
    sys.exit(f"{operation}: {error}")

async def main():
    first = int(sys.argv[2])
    async with open_sqlite(Path(sys.argv[1])) as store:
        async with write_behind(store, failed, flush_s=0.001, max_pending_bytes=10**9) as buffer:
            for number in range(first, first + 1_000_000, 20):
                for one in range(number, number + 20):
                    buffer.put(near(one, answer=b"%d " % one * 500), sketch(one, one // 7, -one))
                    buffer.used(key(max(first, one - 30)), NOW)
                # Those of the burst before are replaced, so that band keys are removed as well.
                for one in range(max(first, number - 5), number):
                    buffer.put(near(one, answer=b"%d " % one * 500), sketch(one, one // 7, one // 3))
                await buffer.flush()
                print(number + 20, flush=True)
                if number % 400 == 0:
                    await store.expire(NOW, 10)

asyncio.run(main())
"""


def killed_in_a_burst(path: Path, first: int, acknowledgements: int) -> int:
    """Write until so many flushes are acknowledged and one more is under way; the first number not acknowledged."""
    with start_python(BURST, path, first) as process:
        assert process.stdout is not None
        for _ in range(acknowledgements):
            assert process.stdout.readline(), "the writer ended by itself"
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().rpartition("\n")[0].split()
    assert process.returncode == -signal.SIGKILL
    return int(rest[-1]) if rest else first + 20 * acknowledgements


async def check(path: Path, numbers: range) -> None:
    async with open_sqlite(path) as store:
        assert await store.problems() == []
        for number in numbers:
            assert await store.get(key(number), NOW) == near(number, answer=b"%d " % number * 500)
            found = await store.candidates(b"s" * 32, [number], NOW, per_key=100, limit=100)
            assert key(number) in {candidate.key for candidate in found}


@pytest.mark.parametrize("seed", range(3))
def test_every_acknowledged_entry_outlives_a_kill(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "nearhit.db"
    chance = random.Random(seed)
    for start in range(0, 3_000_000, 1_000_000):
        end = killed_in_a_burst(path, start, chance.randint(1, 12))
        assert end > start
        asyncio.run(check(path, range(start, end)))
        assert query(path, "PRAGMA integrity_check") == [("ok",)]


OPEN = """
import sys
from pathlib import Path
from storage import sqlite_file

# Stops before the statement of this number, as a kill there would.
left = int(sys.argv[2])

def stop(statement):
    global left
    left -= 1
    if left < 0:
        print("here", flush=True)
        sys.stdin.readline()

real = sqlite_file.connect

def connect(*arguments, **options):
    connection = real(*arguments, **options)
    connection.set_trace_callback(stop)
    return connection

sqlite_file.connect = connect
sqlite_file.prepare(Path(sys.argv[1]))
print("opened", flush=True)
"""


def test_a_first_start_may_be_killed_before_any_statement(tmp_path: Path) -> None:
    for statement in range(60):
        path = tmp_path / f"{statement}.db"
        with start_python(OPEN, path, statement) as process:
            assert process.stdout is not None
            reached = process.stdout.readline()
            process.kill()
        asyncio.run(check(path, range(0)))
        if reached == "opened\n":
            break
    else:
        pytest.fail("the file was never opened")
    assert statement > 10
