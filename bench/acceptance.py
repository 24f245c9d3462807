"""The acceptance run: the same requests at a real llama.cpp, directly and through nearhit, and what they cost.

Both are processes of their own with default settings; each arm of each round has them anew.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.load import Invalid
from bench.requests import Request
from proxy.demo.errors import DemoError
from proxy.demo.interrupts import Interrupts
from proxy.demo.parts import model_file
from proxy.demo.processes import Children

LEAST_CUT = 0.30
MOST_FALSE = 0.01
MAX_TOKENS = 96
_TIMEOUT_S = 300.0
_NEAR_LIMIT_S = 60.0
_LANDING_S = 1.0
_POLL_S = 0.05
_SAY_EVERY_S = 15.0
_SHOWN_FALSE = 20
_CHAT = "/v1/chat/completions"
_HITS = frozenset({"HIT", "NEAR", "JOINED"})

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FalseHit:
    """An answer from the cache that was stored for another class."""

    outcome: str
    rule: str
    asked: Request
    stored: Request


@dataclass(slots=True)
class Arm:
    """All requests of one arm in one round; milliseconds."""

    took_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    bypassed: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    miss_ms: list[float] = field(default_factory=list)
    hit_ms: list[float] = field(default_factory=list)
    not_stored: int = 0
    unknown: int = 0
    false: list[FalseHit] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        """What all requests took."""
        return sum(self.took_ms) / 1000

    @property
    def hits(self) -> int:
        """Answers from the cache."""
        return sum(self.outcomes[name] for name in _HITS)


@dataclass(frozen=True, slots=True)
class Round:
    """Both arms."""

    first: str
    direct: Arm
    nearhit: Arm

    @property
    def cut(self) -> float:
        """Share of the total latency that nearhit saved."""
        return 1 - self.nearhit.total_s / self.direct.total_s


def accept(requests: Sequence[Request], rounds: int, say: Say) -> list[Round]:
    """Send the requests in order, one at a time, through both arms, each round beginning with the other one.

    Raises:
        DemoError: a part is missing, or a server did not start.
        Invalid: an answer is not one.
        KeyboardInterrupt: Ctrl-C; all is cleaned up by then.
        SystemExit: SIGTERM or SIGHUP, likewise.
    """
    model = model_file()
    done: list[Round] = []
    with Interrupts() as interrupts, interrupts.allowed():
        for number in range(1, rounds + 1):
            order = ("direct", "nearhit") if number % 2 else ("nearhit", "direct")
            arms = {name: _arm(name, model, requests, interrupts, _before(say, number, rounds, name)) for name in order}
            done.append(Round(order[0], arms["direct"], arms["nearhit"]))
    return done


def _before(say: Say, number: int, rounds: int, name: str) -> Say:
    return lambda text: say(f"round {number} of {rounds}, {name}: {text}")


def _arm(name: str, model: Path, requests: Sequence[Request], interrupts: Interrupts, say: Say) -> Arm:
    # From the outside in: a signal waits until the servers are stopped and the folder is gone.
    with (
        interrupts.held(),
        TemporaryDirectory(prefix="nearhit-acceptance-") as folder,
        Children(Path(folder), interrupts) as children,
        interrupts.allowed(),
    ):
        say("starting llama.cpp")
        llama = children.start("llama.cpp", "proxy.demo.llama_server", str(model))
        upstream = llama.address()
        llama.ready(upstream, "/health")
        with _Client(upstream) as client:
            client.post(_CHAT, _chat("Say hello."))
        if name == "direct":
            return _send(upstream, requests, say, through=False)
        say("starting nearhit")
        data = str(Path(folder) / "data")
        nearhit = children.start("nearhit", "proxy", "serve", "--upstream", upstream, "--port", "0", "--data-dir", data)
        url = nearhit.address()
        nearhit.ready(url, "/-/ready")
        _wait_until_near(url)
        return _send(url, requests, say, through=True)


def _wait_until_near(url: str) -> None:
    end = time.monotonic() + _NEAR_LIMIT_S
    with _Client(url) as client:
        while True:
            told = client.get("/-/stats")
            state, standing = told["near"]["state"], told["upstream"]["standing"]
            if state == "on" and standing == "confirmed":
                return
            if state not in ("on", "loading") or time.monotonic() > end:
                raise Invalid(f"nearhit's near tier is {state}, its upstream {standing}")
            time.sleep(_POLL_S)


def _send(url: str, requests: Sequence[Request], say: Say, *, through: bool) -> Arm:
    arm = Arm()
    stored: dict[str, Request] = {}
    begun = said = time.monotonic()
    with _Client(url) as client:
        for number, request in enumerate(requests, 1):
            reply = client.post(_CHAT, _chat(request.prompt))
            arm.took_ms.append(reply.ms)
            arm.endings[_ending(reply.body)] += 1
            if through:
                _note(arm, client, request, reply, stored)
            if time.monotonic() - said > _SAY_EVERY_S or number == len(requests):
                said = time.monotonic()
                hits = f", {arm.hits} hits, {len(arm.false)} false" if through else ""
                say(f"{number} of {len(requests)} requests in {said - begun:.0f} s{hits}")
    return arm


def _note(arm: Arm, client: _Client, request: Request, reply: _Reply, stored: dict[str, Request]) -> None:
    """Count what came through nearhit; `stored` has the request that each entry's answer was given to."""
    outcome = reply.headers.get("x-cache", "none")
    arm.outcomes[outcome] += 1
    (arm.hit_ms if outcome in _HITS else arm.miss_ms).append(reply.ms)
    if outcome == "MISS":
        entry = _entry_of(client, request)
        if entry:
            stored[entry] = request
        else:
            arm.not_stored += 1
    elif outcome not in _HITS:
        arm.bypassed[reply.headers.get("cache-status", outcome)] += 1
    elif outcome in ("HIT", "NEAR"):
        owner = stored.get(reply.headers.get("x-nearhit-entry", ""))
        if owner is None:
            arm.unknown += 1
        elif owner.cls != request.cls:
            arm.false.append(FalseHit(outcome, reply.headers.get("x-nearhit-rule", "equal"), request, owner))


def _entry_of(client: _Client, request: Request) -> str:
    """The id under which the answer to a request was stored, "" where it was not; takes no measured time."""
    end = time.monotonic() + _LANDING_S
    while True:
        told = json.loads(client.post("/-/explain", _chat(request.prompt)).body)
        if told["outcome"] == "HIT":
            return str(told["entry"]["id"])
        if time.monotonic() > end:
            return ""
        time.sleep(_POLL_S)


def _chat(prompt: str) -> bytes:
    asked = [{"role": "user", "content": prompt}]
    return json.dumps({"model": "smollm2", "messages": asked, "temperature": 0, "max_tokens": MAX_TOKENS}).encode()


def _ending(body: bytes) -> str:
    try:
        return str(json.loads(body)["choices"][0]["finish_reason"])
    except (ValueError, LookupError, TypeError) as error:
        raise Invalid(f"not an answer: {body[:200]!r}") from error


@dataclass(frozen=True, slots=True)
class _Reply:
    headers: dict[str, str]
    body: bytes
    ms: float


class _Client:
    """One connection that is kept; times are from the first byte sent to the last one read."""

    def __init__(self, url: str) -> None:
        at = urlsplit(url)
        self._connection = HTTPConnection(at.hostname or "", at.port, timeout=_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def post(self, path: str, body: bytes) -> _Reply:
        return self._ask("POST", path, body, {"Content-Type": "application/json"})

    def get(self, path: str) -> Any:
        return json.loads(self._ask("GET", path, None, {}).body)

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> _Reply:
        begun = time.perf_counter()
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            raise Invalid(f"{path} was not answered: {type(error).__name__}: {error}") from error
        ms = (time.perf_counter() - begun) * 1000
        if response.status != 200:
            raise Invalid(f"{path} was answered with {response.status}: {content[:300]!r}")
        return _Reply({name.lower(): value for name, value in response.getheaders()}, content, ms)


def report(console: Console, rounds: Sequence[Round], log: str) -> bool:
    """Print what was measured; whether both targets hold."""
    direct = Round("", _together([r.direct for r in rounds]), _together([r.nearhit for r in rounds]))
    requests = len(rounds[0].direct.took_ms)
    console.print(
        f"{requests} requests ({log}), one at a time, to {model_file().stem} in llama.cpp, temperature 0, "
        f"max_tokens {MAX_TOKENS}\nwall-clock times on {os.cpu_count()} cores, shared with whatever else runs here\n",
        soft_wrap=True,
    )
    console.print(_table(rounds, direct))
    arm = direct.nearhit
    console.print()
    if arm.miss_ms:
        console.print(f"median miss {_ms(median(arm.miss_ms))}, {arm.not_stored} answers not stored")
    if arm.hit_ms:
        console.print(f"median hit {_ms(median(arm.hit_ms))}, {arm.unknown} of entries not known here")
    if arm.bypassed:
        console.print(f"answered past the cache: {dict(arm.bypassed)}", style="red", markup=False)
    for false in arm.false[:_SHOWN_FALSE]:
        console.print(
            f"false {false.outcome} ({false.rule}): {false.asked.prompt!r} got the answer to {false.stored.prompt!r}",
            markup=False,
            soft_wrap=True,
        )
    return _judge(console, direct)


def _judge(console: Console, all_rounds: Round) -> bool:
    arm = all_rounds.nearhit
    share = len(arm.false) / arm.hits if arm.hits else 0.0
    enough, right = all_rounds.cut >= LEAST_CUT, share <= MOST_FALSE and not arm.unknown
    console.print(f"latency cut {all_rounds.cut:.1%}, target at least {LEAST_CUT:.0%}: {_verdict(enough)}")
    console.print(
        f"false hits {len(arm.false)} of {arm.hits} = {share:.2%}, target at most {MOST_FALSE:.0%}: {_verdict(right)}"
    )
    return enough and right


def _table(rounds: Sequence[Round], together: Round) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("round", no_wrap=True)
    for title in ("direct", "median", "nearhit", "median", "cut", "exact", "near", "joined", "miss", "false", "length"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, one in enumerate(rounds, 1):
        table.add_row(f"{number}, {one.first} first", *_cells(one))
    if len(rounds) > 1:
        table.add_row("all", *_cells(together), style="bold")
    return table


def _cells(one: Round) -> list[str]:
    direct, arm = one.direct, one.nearhit
    found = [str(arm.outcomes[name]) for name in ("HIT", "NEAR", "JOINED")]
    times = [f"{direct.total_s:.1f} s", _ms(median(direct.took_ms)), f"{arm.total_s:.1f} s", _ms(median(arm.took_ms))]
    missed = str(len(arm.took_ms) - arm.hits)
    cut_off = direct.endings["length"] / len(direct.took_ms)
    return [*times, f"{one.cut:.1%}", *found, missed, str(len(arm.false)), f"{cut_off:.0%}"]


def _together(arms: Sequence[Arm]) -> Arm:
    whole = Arm()
    for arm in arms:
        whole.took_ms += arm.took_ms
        whole.outcomes += arm.outcomes
        whole.bypassed += arm.bypassed
        whole.endings += arm.endings
        whole.miss_ms += arm.miss_ms
        whole.hit_ms += arm.hit_ms
        whole.not_stored += arm.not_stored
        whole.unknown += arm.unknown
        whole.false += arm.false
    return whole


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _verdict(holds: bool) -> str:
    return "[green]yes[/green]" if holds else "[red]NO[/red]"


__all__ = ["DemoError", "accept", "report"]
