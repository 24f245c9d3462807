"""How long a real llama.cpp, directly or behind nearhit, takes until the first token of its answer.

An *arm* is a server of its own with a nearhit of its own in front, so that arms know nothing of each other's prompts.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from bench.lab import Lab
from bench.load import Invalid
from bench.peers import NotStarted, Peer, Server, get, running
from bench.talks import Message
from proxy.demo.errors import DemoError
from tests.llama_server import Flags, LlamaServer

MAX_TOKENS = 4
_COUNTED = "nearhit_prefix_"
_CHAT = "/v1/chat/completions"
_TIMEOUT_S = 300.0
_READY_S = 600.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class First:
    """One streamed answer: milliseconds until its first word, and how many prompt tokens were cached and computed."""

    ms: float
    cached: int
    computed: int
    text: str


@dataclass(slots=True)
class Arm:
    """One way to ask; `nearhit` None: the server directly. `firsts` are the answers since the last `taken`."""

    name: str
    llama: LlamaServer
    nearhit: Server | None
    data: Path
    firsts: list[First] = field(default_factory=list)

    def ask(self, messages: Sequence[Message]) -> First:
        """Ask by a call of its own, and keep what came.

        Raises:
            Invalid: it was not answered by the model.
        """
        port = self.nearhit.port if self.nearhit else int(self.llama.url.rpartition(":")[2])
        first = _asked(port, messages, through=self.nearhit is not None)
        self.firsts.append(first)
        return first

    def taken(self) -> list[First]:
        """The answers since the last time."""
        done, self.firsts = self.firsts, []
        return done

    def seeded(self) -> int:
        """How many prefixes are kept."""
        return len(list((self.data / "prefixes").rglob("*.json")))

    def wait_until_seeded(self, count: int) -> None:
        """Wait until so many prefixes are kept.

        Raises:
            Invalid: it takes for ever.
        """
        _wait(lambda: self.seeded() >= count, f"{count} kept prefixes")

    def restart(self) -> None:
        """End the server, have nearhit notice, and start it again."""
        self.llama.kill()
        self.wait_until("away")
        self.llama.start()

    def wait_until(self, standing: str) -> None:
        """Wait until nearhit thinks so of its server.

        Raises:
            Invalid: it takes for ever.
        """
        if self.nearhit is not None:
            _until(self.nearhit, standing)

    def counts(self) -> dict[str, float]:
        """What nearhit counted about prefixes, as far as it is not zero."""
        if self.nearhit is None:
            return {}
        with urlopen(f"{self.nearhit.url}/metrics", timeout=10) as reply:
            families = list(text_string_to_metric_families(reply.read().decode()))
        return {
            "/".join([sample.name.removeprefix(_COUNTED), *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith(_COUNTED) and not sample.name.endswith(("_bucket", "_created")) and sample.value
        }

    def told(self) -> str:
        """What happened in this arm, for people."""
        return ", ".join(f"{name} {value:g}" for name, value in self.counts().items()) or "nothing counted"


@contextmanager
def arm(lab: Lab, name: str, flags: Flags, prefixes: Mapping[str, Any] | None) -> Iterator[Arm]:
    """A server, with a nearhit in front that treats prefixes so; None: without.

    Raises:
        NotStarted: a server did not come up.
    """
    folder = lab.new_folder(name)
    slots = folder / "slots"
    slots.mkdir()
    with _llama(replace(flags, slot_save_path=f"{slots}/")) as llama:
        if prefixes is None:
            yield Arm(name, llama, None, folder)
            return
        with running(_nearhit(slots, prefixes), llama.url, folder / "nearhit") as nearhit:
            yield Arm(name, llama, nearhit, folder / "nearhit" / "data")


@contextmanager
def _llama(flags: Flags) -> Iterator[LlamaServer]:
    server = LlamaServer(flags)
    try:
        try:
            server.start()
        except (DemoError, AssertionError) as error:
            raise NotStarted(str(error)) from error
        yield server
    finally:
        server.stop()


def seeds_of(folder: Path, prompts: Sequence[str]) -> list[dict[str, str]]:
    """These system prompts as configured ones, in files of this folder."""
    seeds = []
    for number, text in enumerate(prompts):
        file = folder / f"service-{number}.txt"
        file.write_text(text, encoding="utf-8")
        seeds.append({"name": f"service-{number}", "file": str(file)})
    return seeds


def median_ms(firsts: Sequence[First]) -> float:
    """The median time to the first token.

    Raises:
        Invalid: nothing was measured.
    """
    if not firsts:
        raise Invalid("nothing was measured")
    return median(first.ms for first in firsts)


def _nearhit(slots: Path, prefixes: Mapping[str, Any]) -> Peer:
    def command(upstream: str, folder: Path) -> Sequence[str]:
        config = folder / "nearhit.json"
        chosen = {
            "listen": {"port": 0},
            "upstream": {"url": upstream, "kind": "llamacpp", "slot_dir": str(slots)},
            "prefixes": dict(prefixes),
            # Every question is new, and none may be answered from the cache because it is much like another.
            "cache": {"mode": "exact"},
            "data_dir": str(folder / "data"),
        }
        config.write_text(json.dumps(chosen), encoding="utf-8")
        return [sys.executable, "-m", "proxy", "serve", "--config", str(config)]

    return Peer("nearhit", command, _until_ready)


def _until_ready(server: Server) -> None:
    _wait(lambda: get(server, "/-/ready")[0] == 200, "nearhit to be ready")
    _until(server, "confirmed")


def _until(server: Server, standing: str) -> None:
    def stands() -> bool:
        status, told = get(server, "/-/stats")
        return status == 200 and bool(told["upstream"]["standing"] == standing)

    _wait(stands, f"nearhit to find its server {standing}")


def _wait(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _READY_S
    while not done():
        if time.monotonic() > end:
            raise Invalid(f"waited {_READY_S:g} s for {what}")
        time.sleep(_POLL_S)


def _asked(port: int, messages: Sequence[Message], *, through: bool) -> First:
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.connect()
        begun = time.perf_counter()
        connection.request("POST", _CHAT, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200 or (through and response.getheader("X-Cache") != "MISS"):
            what = f"{response.status}, X-Cache {response.getheader('X-Cache')}"
            raise Invalid(f"a call was answered with {what}: {response.read(300)!r}")
        return _read(response, begun)
    except (OSError, http.client.HTTPException) as error:
        raise Invalid(f"a call was not answered: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, begun: float) -> First:
    """Read a stream of llama.cpp's; the first chunk comes before the prompt is computed, and has no content."""
    ms, text, timings = 0.0, "", None
    for line in response:
        event = event_in(line)
        if event is None:
            continue
        content = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        if content and not text:
            ms = (time.perf_counter() - begun) * 1000
        text += content
        timings = event.get("timings") or timings
    if not text or timings is None:
        raise Invalid("an answer without a word, or without timings")
    return First(ms, int(timings["cache_n"]), int(timings["prompt_n"]), text)


def event_in(line: bytes) -> Any:
    """The event of one line of a stream; None where it has none."""
    data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
    return json.loads(data) if data and data != b"[DONE]" else None
