"""CPU and latency of a hit, a miss and a stream, each against the least that the same libraries can do."""

from __future__ import annotations

from bench.lab import Lab, Taken, make_hit, taken
from bench.load import Invalid
from bench.messages import STREAM_CHUNKS
from bench.peers import BARE, PASS_THROUGH, Server, nearhit, until_loaded
from bench.table import Judged, Row

CONNECTIONS = 16
_WARM_UP = 1_000
_HITS = 20_000
_MISSES = 5_000
_LATENCIES = 1_000
_STREAMS = 48
_TRIES = 4
_SEPARATE = 0.9
"""Share of a stream's chunks that must have been relayed one by one for the CPU per chunk to mean anything."""


def hit(lab: Lab) -> list[Row]:
    """One request again and again, with metrics and access log on."""
    request = lab.new_question()
    runs: dict[str, list[Taken]] = {"bare": [], "nearhit": []}
    with lab.serving(BARE, nearhit()) as servers:
        until_loaded(servers[1])
        make_hit(servers[1], request)
        for server in servers:
            taken(server, [request] * _WARM_UP, connections=CONNECTIONS)
        for server in lab.in_turns("hit", servers):
            run = taken(server, [request] * _HITS, connections=CONNECTIONS)
            run.load.only("HIT" if server.name == "nearhit" else "")
            runs[server.name].append(run)
    ours, bare = runs["nearhit"], runs["bare"]
    return [
        _cpu("hit: CPU per request", "bare", bare, ours, limit=1.6),
        *_rates("hit", "bare", bare, ours),
    ]


def miss(lab: Lab) -> list[Row]:
    """Requests that were never asked, through to an upstream that needs no time."""
    runs: dict[str, list[Taken]] = {"passthrough": [], "nearhit": []}
    alone: dict[str, list[float]] = {"passthrough": [], "nearhit": []}
    with lab.serving(PASS_THROUGH, nearhit()) as servers:
        until_loaded(servers[1])
        for server in servers:
            taken(server, lab.new_questions(_WARM_UP), connections=CONNECTIONS)
        for server in lab.in_turns("miss", servers):
            outcome = "MISS" if server.name == "nearhit" else ""
            run = taken(server, lab.new_questions(_MISSES), connections=CONNECTIONS)
            run.load.only(outcome)
            runs[server.name].append(run)
        for server in lab.in_turns("miss, one at a time", servers):
            outcome = "MISS" if server.name == "nearhit" else ""
            run = taken(server, lab.new_questions(_LATENCIES), connections=1)
            alone[server.name].append(run.load.only(outcome).p50_ms)
    ours, reference = runs["nearhit"], runs["passthrough"]
    latency = Row(
        "miss: p50 with 1 connection",
        "ms",
        tuple(alone["nearhit"]),
        tuple(alone["passthrough"]),
        "pass-through",
        Judged.ADDED,
        0.4,
    )
    return [
        _cpu("miss: CPU per request", "pass-through", reference, ours, limit=1.5),
        latency,
        *_rates("miss", "pass-through", reference, ours),
    ]


def stream(lab: Lab) -> list[Row]:
    """Streams that are relayed and recorded at the pace of a fast server."""
    per_chunk: dict[str, list[float]] = {"passthrough": [], "nearhit": []}
    with lab.serving(PASS_THROUGH, nearhit()) as servers:
        until_loaded(servers[1])
        for server in lab.in_turns("stream", servers):
            run = _streamed(lab, server)
            per_chunk[server.name].append(run.cpu_s * 1e6 / (_STREAMS * STREAM_CHUNKS))
    ours, reference = tuple(per_chunk["nearhit"]), tuple(per_chunk["passthrough"])
    return [Row("stream: CPU per chunk", "us", ours, reference, "pass-through", Judged.VALUE, 60)]


def _streamed(lab: Lab, server: Server) -> Taken:
    """Streams whose chunks were relayed one by one; a busy machine gets another chance."""
    chunks, frames = _STREAMS * STREAM_CHUNKS, 0
    for _ in range(_TRIES):
        run = taken(server, lab.new_questions(_STREAMS, stream=True), connections=CONNECTIONS)
        run.load.only("MISS" if server.name == "nearhit" else "")
        frames = run.load.frames
        if frames >= _SEPARATE * chunks:
            return run
        lab.say(f"stream: {server.name} relayed {chunks:,} chunks as {frames:,}; once more")
    raise Invalid(f"{server.name} relayed {chunks:,} chunks as {frames:,}: the machine is too busy")


def _cpu(what: str, name: str, reference: list[Taken], ours: list[Taken], *, limit: float) -> Row:
    return Row(what, "us", tuple(r.cpu_us for r in ours), tuple(r.cpu_us for r in reference), name, limit=limit)


def _rates(what: str, name: str, reference: list[Taken], ours: list[Taken]) -> list[Row]:
    """Throughput and latency for information: they swing with whatever else the machine does."""
    mine, theirs = [t.load for t in ours], [t.load for t in reference]
    return [
        Row(f"{what}: answers", "/s", tuple(x.per_second for x in mine), tuple(x.per_second for x in theirs), name),
        Row(f"{what}: p50", "ms", tuple(x.p50_ms for x in mine), tuple(x.p50_ms for x in theirs), name),
        Row(f"{what}: p99", "ms", tuple(x.p99_ms for x in mine), tuple(x.p99_ms for x in theirs), name),
    ]
