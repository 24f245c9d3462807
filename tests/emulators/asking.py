"""Asking emulators: nearhit's own probe, and clients of the servers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from proxy.upstream.adapter import Probe
from proxy.upstream.client import Upstream, client_session

SYSTEM = "You are the helpful voice of a small shop for bicycles. " * 8
CLIENT_TIMEOUT = aiohttp.ClientTimeout(total=30)
"""Ends a test that hangs."""


@asynccontextmanager
async def probing(url: str, timeout_s: float = 20.0) -> AsyncIterator[Probe]:
    """nearhit's probe of a server."""
    async with client_session(connect_timeout_s=5, read_timeout_s=30) as session:
        yield Probe(Upstream(url, session, lambda: None), {}, timeout_s)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server."""
    async with aiohttp.ClientSession(url, timeout=CLIENT_TIMEOUT) as session:
        yield session


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """A chat whose turns are by user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"model": "qwen3-0.6b", "messages": messages, **fields}


async def post(session: aiohttp.ClientSession, path: str, body: Any) -> tuple[int, Any]:
    """Status and JSON of the answer to a POST; its text where it is none."""
    async with session.post(path, json=body) as response:
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text


async def ask(session: aiohttp.ClientSession, *texts: str, **fields: Any) -> str:
    """What the model says to a chat."""
    status, answer = await post(session, "/v1/chat/completions", chat(*texts, **fields))
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


def events(stream: str) -> list[Any]:
    """The events of a stream, `[DONE]` as text."""
    data = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in data]


def said(stream: str) -> str:
    """What the model says in a stream of a chat."""
    chunks = [event["choices"][0]["delta"] for event in events(stream)[:-1] if event["choices"]]
    return "".join(delta.get("content") or "" for delta in chunks)
