"""One llama.cpp and one nearhit for all programs, and each program in its own process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.asking import LIBRARIES, PROGRAMS, Asking, Curl, Library, Llm, library
from tests.clients.serving import Served, serving
from tests.llama_server import Flags, LlamaServer


@pytest.fixture(scope="package")
def llama() -> Iterator[LlamaServer]:
    with LlamaServer(Flags()) as server:
        yield server


@pytest.fixture(scope="module")
def nearhit(llama: LlamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(llama.url, tmp_path_factory.mktemp("nearhit")) as served:
        served.confirmed()
        yield served


@pytest.fixture
def system(request: pytest.FixtureRequest) -> str:
    """A system prompt of this test's own: what other tests asked is no answer to it."""
    return f"You are {request.node.name}."


@pytest.fixture(scope="package")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A nearhit whose upstream does not run."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with serving(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("alone")) as served:
        yield served


@pytest.fixture(scope="package", params=LIBRARIES)
def sdk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """Each library."""
    with library(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture(scope="package", params=PROGRAMS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asking]:
    """Each program."""
    home = tmp_path_factory.mktemp(request.param)
    commands: dict[str, Any] = {"llm": Llm, "curl": Curl}
    if request.param in commands:
        yield commands[request.param](home)
        return
    with library(request.param, home) as running:
        yield running
