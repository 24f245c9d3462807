"""Time from the start of the process to the first 200 of /-/ready, with a large database and with none."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lab import Lab
from bench.messages import MODEL, answer, numbered
from bench.peers import nearhit, running
from bench.table import Judged, Row
from storage.base import Entry, Put
from storage.sqlite import open_sqlite

_ENTRIES = 100_000
_BATCH = 5_000
_DAY_MS = 86_400_000


def start(lab: Lab) -> list[Row]:
    """Start again and again, by turns with and without stored answers."""
    lab.say(f"start: storing {_ENTRIES:,} answers")
    built = lab.new_folder("large")
    asyncio.run(_fill(built / "nearhit.db", lab.upstream.url))
    took: dict[str, list[float]] = {"empty": [], "large": []}
    for number in range(lab.rounds):
        for kind in ("empty", "large") if number % 2 else ("large", "empty"):
            lab.say(f"start: round {number + 1} of {lab.rounds}, {kind} database")
            took[kind].append(_start(lab, built if kind == "large" else lab.new_folder("empty")))
    shutil.rmtree(built)
    what = f"start: ready with {_ENTRIES:,} entries"
    return [Row(what, "s", tuple(took["large"]), tuple(took["empty"]), "none stored", Judged.VALUE, 2.0)]


def _start(lab: Lab, folder: Path) -> float:
    # With the default bound upkeep would remove what the next round is to find.
    with running(nearhit("--cache-max", str(2 * _ENTRIES)), lab.upstream.url, folder) as server:
        return time.monotonic() - server.spawned


async def _fill(path: Path, upstream: str) -> None:
    async with open_sqlite(path) as store:
        batch: list[Put] = []
        for entry in _entries(upstream):
            batch.append(Put(entry))
            if len(batch) == _BATCH:
                await store.write(batch)
                batch.clear()


def _entries(upstream: str) -> Iterator[Entry]:
    now_ms = time.time_ns() // 1_000_000
    stored = answer()
    for number in range(_ENTRIES):
        yield Entry(
            key=hashlib.sha256(b"key %d" % number).digest(),
            key_version=1,
            namespace=b"",
            space=hashlib.sha256(b"space %d" % number).digest(),
            upstream=upstream,
            fingerprint=hashlib.sha256(MODEL.encode()).digest(),
            endpoint="chat",
            model=MODEL,
            words=numbered(number),
            stored_ms=now_ms,
            expires_ms=now_ms + _DAY_MS,
            cost_ms=1_200,
            prompt_tokens=52,
            completion_tokens=71,
            usage_known=True,
            answer=stored,
        )
