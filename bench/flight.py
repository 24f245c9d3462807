"""One hundred equal requests at once to a server that works on one at a time: what the last of them waits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.lab import Lab
from bench.load import Invalid, drive
from bench.peers import ONE_AT_A_TIME, Server, get, nearhit, running
from bench.table import Judged, Row

_CALLERS = 100
_LIMIT = 1.2


def flight(lab: Lab) -> list[Row]:
    """Compare the last of many equal requests with a single one, in one process and in two on one file."""
    with running(ONE_AT_A_TIME, "", lab.new_folder("one-at-a-time")) as upstream:
        folder = lab.new_folder("shared")
        peers = nearhit("--cache-mode", "exact")
        with running(peers, upstream.url, folder) as one, running(peers, upstream.url, folder) as other:
            alone = _rounds(lab, upstream, [one], streamed=False)
            streamed = _rounds(lab, upstream, [one], streamed=True)
            both = _rounds(lab, upstream, [one, other], streamed=False)
    return [
        *_rows(f"flight: {_CALLERS} equal requests at once", alone),
        *_rows(f"flight: {_CALLERS} equal streams at once", streamed),
        *_rows(f"flight: {_CALLERS} over two processes", both),
    ]


_Round = tuple[float, float, int]
"""What a single request took and what the last of many took, in ms; how many requests of these the upstream saw."""


def _rounds(lab: Lab, upstream: Server, servers: Sequence[Server], *, streamed: bool) -> list[_Round]:
    rounds = []
    for number in range(lab.rounds):
        lab.say(f"flight: round {number + 1} of {lab.rounds}, {len(servers)} processes")
        single = _last_ms(servers[:1], lab.new_question(stream=streamed, max_tokens=20), 1)
        before = _asked(upstream)
        last = _last_ms(servers, lab.new_question(stream=streamed, max_tokens=20), _CALLERS // len(servers))
        rounds.append((single, last, _asked(upstream) - before))
    return rounds


def _last_ms(servers: Sequence[Server], request: bytes, callers: int) -> float:
    def load(server: Server) -> float:
        taken = drive(server.port, [request] * callers, connections=callers)
        if taken.errors:
            raise Invalid(f"errors: {dict(taken.errors)}")
        return max(taken.latencies_ms)

    with ThreadPoolExecutor(len(servers)) as pool:
        return max(pool.map(load, servers))


def _asked(upstream: Server) -> int:
    _, told = get(upstream, "/asked")
    return int(told["asked"])


def _rows(what: str, rounds: Sequence[_Round]) -> list[Row]:
    singles, lasts, asked = zip(*rounds, strict=True)
    return [
        Row(f"{what}: the last", "ms", lasts, singles, "single", Judged.RATIO, _LIMIT),
        Row(f"{what}: asked upstream", "requests", tuple(map(float, asked)), (), "", Judged.VALUE, 1.0),
    ]
