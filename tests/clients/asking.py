"""The programs as the tests use them: started as a person starts them, each in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

ENVIRONMENTS = Path(sys.prefix) / "clients"
"""Where `make clients` installs the programs, each in a folder with its name."""
ROOT = Path(__file__).parents[2]
LIBRARIES = ("openai_python", "anthropic_python", "langchain", "llama_index", "litellm")
COMMANDS = ("llm", "curl")
PROGRAMS = (*LIBRARIES, *COMMANDS)
LIMIT_S = 120.0
"""Ends a test that has failed."""


@dataclass(frozen=True)
class Reply:
    """What a program said, or the last words of its error."""

    said: Any = None
    error: str = ""


class Asking(Protocol):
    """A program that can ask a model at an address."""

    def ask(self, base: str, question: str, system: str, *, stream: bool) -> Reply:
        """One question with a system prompt; `said` is the text of the answer."""
        ...


class Library:
    """A library, used by a module of `tests.clients.programs` that runs in the library's environment."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Over the process's standard input and output."""
        self._process = process

    def run(self, step: str, **order: Any) -> Reply:
        """One step of the module."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"step": step, **order}) + "\n")
        self._process.stdin.flush()
        hurry = threading.Timer(LIMIT_S, self._process.kill)
        hurry.start()
        line = self._process.stdout.readline()
        hurry.cancel()
        assert line, "it ended"
        return Reply(**json.loads(line))

    def ask(self, base: str, question: str, system: str, *, stream: bool) -> Reply:
        return self.run("ask", base=base, question=question, system=system, stream=stream)


@contextmanager
def library(name: str, home: Path, **changes: str) -> Iterator[Library]:
    """A library's process, for the life of this block; what it prints for people is in `home`/printed.

    `changes` are environment variables.
    """
    python = ENVIRONMENTS / name / "bin" / "python"
    assert python.exists(), "make clients installs the programs"
    command = [str(python), "-m", f"tests.clients.programs.{name}"]
    with (
        (home / "printed").open("w") as printed,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env={**environment(home), **changes},
            cwd=ROOT,
            text=True,
        ) as process,
    ):
        try:
            yield Library(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(LIMIT_S)


class Llm:
    """Simon Willison's `llm`, with the servers that it is asked about in its list of further models."""

    def __init__(self, home: Path) -> None:
        """Settings and logs are in `home`."""
        self._home = home

    def ask(self, base: str, question: str, system: str, *, stream: bool) -> Reply:
        models = [{"model_id": "home", "model_name": "tiny", "api_base": f"{base}/v1"}]
        (self._home / "extra-openai-models.yaml").write_text(yaml.safe_dump(models), encoding="utf-8")
        how = () if stream else ("--no-stream",)
        program = str(ENVIRONMENTS / "llm" / "bin" / "llm")
        command = (program, "-m", "home", "-s", system, "-o", "max_tokens", "12", *how, question)
        return finished(command, self._home, LLM_USER_PATH=str(self._home))


class Curl:
    """curl, which says what the server says."""

    def __init__(self, home: Path) -> None:
        """`home` has no settings."""
        self._home = home

    def ask(self, base: str, question: str, system: str, *, stream: bool) -> Reply:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = json.dumps({"messages": messages, "max_tokens": 12, "stream": stream})
        command = ("curl", "-sS", "--fail-with-body", "-N", f"{base}/v1/chat/completions", "-d", body)
        told = finished(command, self._home)
        if told.error:
            return told
        return Reply("".join(_streamed(told.said)) if stream else _whole(told.said))


def _whole(body: str) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


def _streamed(body: str) -> Iterator[str]:
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    for event in events:
        yield from (choice["delta"].get("content") or "" for choice in json.loads(event)["choices"])


def finished(command: tuple[str, ...], home: Path, **changes: str) -> Reply:
    """Run a command to its end."""
    done = subprocess.run(
        command, env={**environment(home), **changes}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    shown = (done.stdout + done.stderr).strip()
    return Reply(error=shown) if done.returncode else Reply(done.stdout.strip())


def environment(home: Path) -> dict[str, str]:
    """Nothing of the machine's own settings: no keys, no addresses, no proxies."""
    # Without this, LiteLLM fetches its list of prices at the start, and says so where it cannot.
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
