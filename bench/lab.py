"""What scenarios share: the fake upstream, folders that are thrown away, rounds that take turns."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import Invalid, Load, drive
from bench.measure import cpu_of
from bench.messages import numbered, question
from bench.peers import UPSTREAM, Peer, Server, running

NEAR_ENTRIES = 200_000
_TRIES = 50


@dataclass(frozen=True, slots=True)
class Taken:
    """One load on one server: what came back, and the CPU seconds that its process spent on it."""

    load: Load
    cpu_s: float

    @property
    def cpu_us(self) -> float:
        """CPU per answer, in microseconds."""
        return self.cpu_s * 1e6 / self.load.answered


@dataclass(frozen=True, slots=True)
class Lab:
    """The place where scenarios run; `say` tells a person how far it is. `near_entries` is for the near tier's."""

    folder: Path
    upstream: Server
    rounds: int
    say: Callable[[str], None]
    near_entries: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @contextmanager
    def serving(self, *peers: Peer) -> Iterator[list[Server]]:
        """These servers in front of the upstream, each with a new folder, for the life of this block."""
        with ExitStack() as stack:
            yield [stack.enter_context(running(p, self.upstream.url, self.new_folder(p.name))) for p in peers]

    def new_folder(self, name: str) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def in_turns(self, what: str, servers: list[Server]) -> Iterator[Server]:
        """Every server once a round, each round beginning with another one."""
        for number in range(self.rounds):
            turn = number % len(servers)
            for server in servers[turn:] + servers[:turn]:
                self.say(f"{what}: round {number + 1} of {self.rounds}, {server.name}")
                yield server

    def new_question(self, *, stream: bool = False, max_tokens: int = 300) -> bytes:
        """A request that was never sent before in this lab."""
        return question(numbered(next(self._numbers)), stream=stream, max_tokens=max_tokens)

    def new_questions(self, count: int, *, stream: bool = False) -> list[bytes]:
        """Requests that were never sent before, made beforehand so that making them takes no time from the load."""
        return [self.new_question(stream=stream) for _ in range(count)]


@contextmanager
def lab(rounds: int, say: Callable[[str], None], near_entries: int = NEAR_ENTRIES) -> Iterator[Lab]:
    """A lab for the life of this block; leaving it ends the upstream and removes every file."""
    with tempfile.TemporaryDirectory(prefix="nearhit-bench-") as name:
        folder = Path(name)
        with running(UPSTREAM, "", folder) as upstream:
            yield Lab(folder, upstream, rounds, say, near_entries)


def taken(server: Server, requests: Iterable[bytes], *, connections: int) -> Taken:
    """Put a load on a server and measure it."""
    with cpu_of(server.pid) as spent:
        load = drive(server.port, requests, connections=connections)
    return Taken(load, spent.seconds)


def make_hit(server: Server, request: bytes) -> None:
    """Ask until the answer comes from the cache: storing follows the first answer.

    Raises:
        Invalid: it never does.
    """
    for _ in range(_TRIES):
        if drive(server.port, [request], connections=1).outcomes["HIT"]:
            return
    raise Invalid(f"a repeated request was not answered from the cache {_TRIES} times")
