"""CPU and memory of another process, read from /proc."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Spent:
    """CPU time of a process and all its threads over a block, in seconds; set when the block is left."""

    seconds: float = math.nan


@contextmanager
def cpu_of(pid: int) -> Iterator[Spent]:
    """Measure what a process spends while the block runs; its resolution is one tick, mostly 10 ms."""
    spent = Spent()
    before = cpu_seconds(pid)
    yield spent
    spent.seconds = cpu_seconds(pid) - before


def cpu_seconds(pid: int) -> float:
    """User and system time that the process has spent since its start."""
    # The second field, the program's name, may hold spaces; what follows its bracket does not.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def resident_mb(pid: int) -> float:
    """Resident memory, in MB of 1,000,000 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(f"process {pid} has ended")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie; nan where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
