"""System prompts kept for a real llama.cpp, over restarts of the server, of nearhit, and with another model."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.demo.parts import model_file
from tests.llama_server import Flags, LlamaServer, patched
from tests.program.test_llama_cpp import program

pytestmark = pytest.mark.model

SERVICES = {
    "lights": "You switch lamps. " + " ".join(f"Lamp {n} hangs in room {n * 7}." for n in range(12)),
    "weather": "You tell the weather. " + " ".join(f"Town {n} lies {n * 30} metres high." for n in range(12)),
    "timer": "You keep timers. " + " ".join(f"Timer {n} rings after {n * 5} minutes." for n in range(12)),
}
"""System prompts of about 130 tokens; there are more of them than slots."""


@contextmanager
def nearhit(folder: Path, upstream: str, **prefixes: Any) -> Iterator[str]:
    seeds = []
    for name in prefixes.pop("seeds", SERVICES):
        (folder / f"{name}.txt").write_text(SERVICES[name])
        seeds.append({"name": name, "file": str(folder / f"{name}.txt")})
    config = {
        "data_dir": str(folder / "data"),
        "upstream": {"url": upstream, "slot_dir": str(folder / "slots"), "poll_s": 0.2},
        "prefixes": {"seeds": seeds, **prefixes},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with program("proxy", "serve", "--config", str(folder / "config.yaml"), "--port", "0") as address:
        yield address


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=120) as response:
        return json.load(response)


def until(holds: Any, seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def is_ready(address: str) -> bool:
    try:
        return bool(get(f"{address}/-/ready")["upstreams"]["default"]["standing"] == "confirmed")
    except urllib.error.HTTPError:
        return False


def ask(address: str, service: str, question: str) -> dict[str, int]:
    """The timings of an answer: `cache_n` prompt tokens were reused, `prompt_n` computed."""
    messages = [{"role": "system", "content": SERVICES[service]}, {"role": "user", "content": question}]
    body = json.dumps({"messages": messages, "max_tokens": 2, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        timings: dict[str, int] = json.load(response)["timings"]
    return timings


def rows(address: str) -> dict[str, dict[str, Any]]:
    return {row["cache_name"]: row for model in get(f"{address}/v1/cache")["data"].values() for row in model}


def states(address: str) -> dict[str, str]:
    return {name: row["state"] for name, row in rows(address).items()}


@pytest.fixture
def slots(tmp_path: Path) -> Flags:
    (tmp_path / "slots").mkdir()
    (tmp_path / "model.gguf").symlink_to(model_file())
    return Flags(model=str(tmp_path / "model.gguf"), slots=2, context=2048, slot_save_path=f"{tmp_path}/slots/")


def test_configured_prompts_are_computed_before_they_are_asked_for_and_once_only(tmp_path: Path, slots: Flags) -> None:
    with LlamaServer(slots) as server:
        with nearhit(tmp_path, server.url) as address:
            until(lambda: is_ready(address))
            assert states(address) == dict.fromkeys(SERVICES, "seeded")
            tokens = {name: row["tokens"] for name, row in rows(address).items()}
            for question in ("one?", "two?"):
                for service in SERVICES:
                    timings = ask(address, service, f"{service} {question}")
                    assert timings["cache_n"] >= 0.9 * tokens[service]
            server.restart()
            until(lambda: get(f"{server.url}/health")["status"] == "ok")
            until(lambda: is_ready(address))
            assert ask(address, "timer", "after a restart?")["cache_n"] >= 0.9 * tokens["timer"]
        written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "slots").iterdir()}
        assert len(written) == len(SERVICES)
        server.restart()
        with nearhit(tmp_path, server.url) as address:
            until(lambda: is_ready(address))
            assert ask(address, "lights", "after both?")["cache_n"] >= 0.9 * tokens["lights"]
            until(lambda: states(address) == dict.fromkeys(SERVICES, "seeded"))
        assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "slots").iterdir()} == written
        folders = [path.relative_to(tmp_path / "data") for path in (tmp_path / "data" / "prefixes").glob("*/*")]
        assert {path.parts[1] for path in folders} == {"model"}
        assert {path.name for path in folders} == {f"{name}.{kind}" for name in SERVICES for kind in ("json", "bin")}


def test_what_other_weights_computed_is_never_restored(tmp_path: Path, slots: Flags) -> None:
    with LlamaServer(slots) as server, nearhit(tmp_path, server.url, seeds=["lights"]) as address:
        until(lambda: is_ready(address))
        (before,) = (tmp_path / "slots").iterdir()
        server.stop()
        (tmp_path / "model.gguf").unlink()
        patched(model_file(), tmp_path / "model.gguf")
        server.start()
        until(lambda: is_ready(address))
        until(lambda: states(address).get("lights") == "seeded" and len(list((tmp_path / "slots").iterdir())) == 2)
        assert before in (tmp_path / "slots").iterdir()
        ask(address, "timer", "another lead?")
        ask(address, "weather", "and another?")
        assert ask(address, "lights", "whose state?")["cache_n"] >= 100


def test_a_prompt_that_is_used_again_and_again_is_learned(tmp_path: Path, slots: Flags) -> None:
    with LlamaServer(slots) as server, nearhit(tmp_path, server.url, seeds=[], learn_after=2) as address:
        until(lambda: is_ready(address))
        for question in ("one?", "two?"):
            ask(address, "weather", question)
        until(lambda: list(states(address).values()) == ["seeded"])
        for service in ("lights", "timer"):
            ask(address, service, "something else?")
        assert ask(address, "weather", "three?")["cache_n"] >= 100
        metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert 'nearhit_prefix_restores_total{result="restored"} 1.0' in metrics
