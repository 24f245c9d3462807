"""Resident memory under a mixed load: after many requests, and over time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from statistics import median

from bench.lab import Lab
from bench.load import Invalid, Load, drive
from bench.measure import resident_mb
from bench.messages import question
from bench.peers import Server, nearhit
from bench.speed import CONNECTIONS
from bench.table import Judged, Row

_REQUESTS = 100_000
_PROMPTS = 5_000
_REPEATED = 0.7
_STREAMED = 0.1
_TOKENS = 20
_LIMIT_MB = 150.0
_LEAST_HITS = 0.5
"""Share of answers from the cache; beneath it the load is not the mixed one."""
_GROWTH = 1.03
_FIFTHS = 5
_LONGEST_SAMPLE_S = 30.0


def memory(lab: Lab) -> list[Row]:
    """Resident memory after a mixed load."""
    with lab.serving(nearhit()) as (server,):
        idle_mb = resident_mb(server.pid)
        mix = _prepared(lab, server)
        lab.say(f"memory: {_REQUESTS:,} requests, {_REPEATED:.0%} of them repeated")
        load = drive(server.port, itertools.islice(mix, _REQUESTS), connections=CONNECTIONS)
        _check(load)
        used_mb = resident_mb(server.pid)
    what = f"memory after {_REQUESTS:,} requests"
    return [Row(what, "MB", (used_mb,), (idle_mb,), "just started", Judged.VALUE, _LIMIT_MB)]


def soak(lab: Lab, duration_s: float, show: Callable[[str], None]) -> list[Row]:
    """A mixed load for `duration_s` seconds; `show` gets a line for each sample."""
    every_s = min(_LONGEST_SAMPLE_S, duration_s / (4 * _FIFTHS))
    samples_mb: list[float] = []
    errors = 0
    with lab.serving(nearhit()) as (server,):
        mix = _prepared(lab, server)
        started = time.monotonic()
        show(f"{'time s':>7}{'RSS MB':>9}{'requests':>10}{'hits':>6}{'p50 ms':>8}{'p99 ms':>8}{'errors':>8}")
        while time.monotonic() - started < duration_s:
            load = drive(server.port, _until(mix, time.monotonic() + every_s), connections=CONNECTIONS)
            samples_mb.append(resident_mb(server.pid))
            errors += load.errors.total()
            show(_line(time.monotonic() - started, samples_mb[-1], load))
            # The access log of a long run would fill the disk.
            server.log.write_bytes(b"")
    fifth = max(1, len(samples_mb) // _FIFTHS)
    early, late = median(samples_mb[fifth : 2 * fifth]), median(samples_mb[-fifth:])
    verdict = "flat" if late <= early * _GROWTH else "NOT flat"
    show(f"RSS {verdict}: {early:.1f} MB in the second fifth of the time, {late:.1f} MB in the last")
    return [
        Row("soak: resident memory, last fifth", "MB", (late,), (early,), "second fifth", limit=_GROWTH),
        Row("soak: resident memory, most", "MB", (max(samples_mb),), judged=Judged.VALUE, limit=_LIMIT_MB),
        Row("soak: errors", "", (float(errors),), judged=Judged.VALUE, limit=0),
    ]


def _prepared(lab: Lab, server: Server) -> Iterator[bytes]:
    """An endless mix of repeated and new questions, a part of both streamed; the repeated ones are stored."""
    lab.say(f"storing {_PROMPTS:,} answers")
    texts = [f"Please sum up chapter {number} of the manual in two sentences." for number in range(_PROMPTS)]
    whole = [question(text, max_tokens=_TOKENS) for text in texts]
    streamed = [question(text, max_tokens=_TOKENS, stream=True) for text in texts]
    drive(server.port, whole, connections=CONNECTIONS).only("MISS")
    return _mix(lab, whole, streamed)


def _mix(lab: Lab, whole: list[bytes], streamed: list[bytes]) -> Iterator[bytes]:
    chance = random.Random(1)
    while True:
        stream = chance.random() < _STREAMED
        if chance.random() < _REPEATED:
            yield chance.choice(streamed if stream else whole)
        else:
            yield lab.new_question(stream=stream, max_tokens=_TOKENS)


def _until(requests: Iterator[bytes], deadline: float) -> Iterator[bytes]:
    for request in requests:
        if time.monotonic() >= deadline:
            return
        yield request


def _check(load: Load) -> None:
    if load.errors:
        raise Invalid(f"errors: {dict(load.errors)}")
    if load.outcomes["HIT"] < _LEAST_HITS * load.answered or not set(load.outcomes) <= {"HIT", "MISS", "JOINED"}:
        raise Invalid(f"not the mix that was meant: {dict(load.outcomes)}")


def _line(seconds: float, rss_mb: float, load: Load) -> str:
    hits = load.outcomes["HIT"] / max(1, load.answered)
    latency = f"{load.p50_ms:>8.2f}{load.p99_ms:>8.2f}"
    return f"{seconds:>7.0f}{rss_mb:>9.1f}{load.answered:>10,}{hits:>6.0%}{latency}{load.errors.total():>8}"
