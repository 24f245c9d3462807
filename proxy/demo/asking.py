"""Asking as applications do: through the official `openai` client, with times taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from proxy.demo.workload import MAX_TOKENS

if TYPE_CHECKING:
    from openai import OpenAI

_MODEL = "smollm2"
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reply:
    """An answer; `outcome` is the header X-Cache, `-` where there is none. Times in milliseconds."""

    text: str
    outcome: str
    first_token_ms: float
    total_ms: float


@contextmanager
def client_for(url: str) -> Iterator[OpenAI]:
    """A client of the server at `http://HOST:PORT`."""
    import openai

    # Both servers are on this machine: a proxy from the environment is not for them.
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="demo", max_retries=0, timeout=_TIMEOUT_S, http_client=http
    ) as client:
        yield client


def ask(client: OpenAI, messages: list[dict[str, str]], *, streamed: bool) -> Reply:
    """Send one request and read its answer to the end.

    Raises:
        openai.OpenAIError: the server cannot be reached, refused, or stopped in the middle.
    """
    # The client wants its own message types, which are these very dictionaries.
    request = {"model": _MODEL, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    return (_streamed if streamed else _whole)(client, cast("Any", request))


def _whole(client: OpenAI, request: Any) -> Reply:
    start = time.perf_counter()
    response = client.chat.completions.with_raw_response.create(**request)
    text = response.parse().choices[0].message.content or ""
    total = _ms_since(start)
    return Reply(text, response.headers.get("X-Cache", "-"), total, total)


def _streamed(client: OpenAI, request: Any) -> Reply:
    start = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    with client.chat.completions.with_streaming_response.create(**request, stream=True) as response:
        outcome = response.headers.get("X-Cache", "-")
        for chunk in response.parse():
            piece = chunk.choices[0].delta.content if chunk.choices else None
            if piece:
                # llama.cpp sends headers and a role before it has read the prompt: the first text is what counts.
                first = first or _ms_since(start)
                pieces.append(piece)
    total = _ms_since(start)
    return Reply("".join(pieces), outcome, total if first is None else first, total)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
