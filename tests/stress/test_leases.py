"""Several processes that take, keep, release and lose leases, some of them killed: never two holders at a time."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from tests.storage.files import start_python

WORK = """
import asyncio, json, random, sys, time
from pathlib import Path
from storage import lease_file, sqlite_leases
from storage.leases import Taken
from storage.sqlite_leases import open_leases

# A machine that is slow for a moment is no error.
sqlite_leases.PATIENCE_S = lease_file._BUSY_S = 60.0
path, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
errors = []

def clock_ms():
    return time.monotonic_ns() // 1_000_000

async def task(leases, chance, ends):
    while time.monotonic() < ends:
        keys = [number.to_bytes(32, "big") for number in chance.sample(range(12), chance.choice([1, 1, 1, 2, 4]))]
        standings = await leases.take(keys, together=chance.random() < 0.5)
        taken = [standing for standing in standings if isinstance(standing, Taken)]
        if taken:
            began = time.monotonic()
            await asyncio.sleep(chance.random() * 0.01)
            kept, ended = await leases.holds(taken), time.monotonic()
            for lease in taken:
                # One line in one write: a process that is killed leaves no half.
                print(json.dumps([lease.key.hex(), lease.token, began, ended, lease in kept]), flush=True)
            await leases.release(taken, shareable=chance.random() < 0.995)
        else:
            await asyncio.sleep(chance.random() * 0.01)

async def main():
    chance = random.Random(seed)
    async with open_leases(path, clock_ms, lambda op, error: errors.append(str(error)), always=True) as leases:
        ends = time.monotonic() + seconds
        await asyncio.gather(*(task(leases, chance, ends) for _ in range(8)))
    print(json.dumps(errors), flush=True)

asyncio.run(main())
"""


def holdings(output: str) -> list[tuple[str, int, float, float, bool]]:
    """Keys with the tokens with which they were held, from when to when, and whether they still were then."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    return [(key, token, began, ended, kept) for key, token, began, ended, kept in rows]


def errors(output: str) -> list[str]:
    found: list[str] = json.loads(output.splitlines()[-1])
    return found


def killed(process: subprocess.Popen[str]) -> str:
    """Let it do something, and kill it while it does more; what it said till then."""
    assert process.stdout is not None
    first = "".join(process.stdout.readline() for _ in range(50))
    process.send_signal(signal.SIGKILL)
    return first + process.communicate()[0]


def test_no_two_hold_a_lease_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "nearhit.db"
    path.touch()
    with (
        start_python(WORK, path, 1, 3.0) as one,
        start_python(WORK, path, 2, 3.0) as other,
        start_python(WORK, path, 3, 60.0) as third,
    ):
        cut_short = killed(third)
        outputs = [one.communicate()[0], other.communicate()[0]]
    assert [errors(output) for output in outputs] == [[], []]
    by_key: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for output in (*outputs, cut_short):
        for key, token, began, ended, kept in holdings(output):
            assert kept
            by_key[key].append((token, began, ended))
    assert len(by_key) == 12
    for held in by_key.values():
        # In the order of their tokens, each began after the one before had ended.
        held.sort()
        assert len({token for token, _, _ in held}) == len(held)
        assert all(before[2] <= after[1] for before, after in pairwise(held))
    assert min(len(holdings(output)) for output in outputs) > 100, [len(holdings(output)) for output in outputs]
