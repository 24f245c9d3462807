"""What nearhit must know about a kind of server, behind one Protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from proxy.upstream.client import Outgoing, Upstream, UpstreamError, UpstreamTimeout

_MAX_ANSWER = 4 * 1024 * 1024

Json = Any


class Kind(StrEnum):
    """Kinds of server."""

    OPENAI = "openai"
    LLAMACPP = "llamacpp"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How this kind of server behaves.

    `drains`: a request whose client left must be read to its end. `usage_from_timings`: token usage can be derived from
    `timings`. `key_before_body`: credentials are checked before the body is looked at. `tells_instances`: two runs of
    the server can be told apart.
    """

    drains: bool
    usage_from_timings: bool
    key_before_body: bool
    tells_instances: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """The server answers; `fingerprint` is its identity, `instance` its run where it shows one, `models` its list."""

    fingerprint: bytes
    instance: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No answer."""


@dataclass(frozen=True, slots=True)
class Silent:
    """Connected, and no answer in time: a server that does one thing at a time is busy."""


@dataclass(frozen=True, slots=True)
class Loading:
    """The server is up and not ready yet (503)."""


@dataclass(frozen=True, slots=True)
class Locked:
    """The server wants a credential that we did not show (401 or 403)."""


@dataclass(frozen=True, slots=True)
class Unidentified:
    """The server answers, and shows nothing that identifies what it runs."""


Sighting = Seen | Unreachable | Silent | Loading | Locked | Unidentified


class Adapter(Protocol):
    """One kind of server."""

    @property
    def kind(self) -> Kind:
        """Its name in the configuration."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """How it behaves."""
        ...

    async def look(self, probe: Probe) -> Sighting:
        """Everything that identifies what answers."""
        ...

    async def same_instance(self, probe: Probe, instance: str) -> bool | None:
        """Whether the run seen before still answers, None where it does not say in time; one light request."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back from a probe; `json` is None where the body is not JSON, `status` 0 where nothing came in time."""

    status: int
    json: Json


class Probe:
    """Small requests of nearhit's own, with one credential, each within `timeout_s`."""

    def __init__(self, upstream: Upstream, credential: Mapping[str, str], timeout_s: float) -> None:
        """`credential` are the header fields to show."""
        self._upstream = upstream
        self._credential = credential
        self._timeout_s = timeout_s

    async def get(self, path: str) -> Reply | None:
        """GET a path; None where there was no connection."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Json]) -> Reply | None:
        """POST JSON to a path; None where there was no connection."""
        return await self._ask("POST", path, json.dumps(body).encode())

    async def headers(self, path: str) -> Mapping[str, str] | None:
        """The header fields of the answer to a GET; None where there was none in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._upstream.send(Outgoing("GET", path, self._credential)) as response:
                    return response.headers
        except (UpstreamError, TimeoutError):
            return None

    async def _ask(self, method: str, path: str, body: bytes | None) -> Reply | None:
        headers = {**self._credential, "Accept": "application/json", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._upstream.send(Outgoing(method, path, headers, body)) as response:
                    content = b""
                    async for chunk in response.chunks():
                        content += chunk
                        if len(content) > _MAX_ANSWER:
                            return Reply(response.status, None)
        except (TimeoutError, UpstreamTimeout):
            return Reply(0, None)
        except UpstreamError:
            return None
        try:
            return Reply(response.status, json.loads(content))
        except (ValueError, RecursionError):
            return Reply(response.status, None)


def trouble(reply: Reply | None) -> Sighting | None:
    """What an answer that is no success says of the server; None for a success."""
    if reply is None:
        return Unreachable()
    if reply.status == 0:
        return Silent()
    if reply.status == 503:
        return Loading()
    if reply.status in (401, 403):
        return Locked()
    return None if 200 <= reply.status < 300 else Unidentified()


def model_ids(listing: Json) -> tuple[str, ...]:
    """The ids of an OpenAI model list; empty where it is none."""
    data = listing.get("data") if isinstance(listing, dict) else None
    ids = [item.get("id") for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    return tuple(sorted({identifier for identifier in ids if isinstance(identifier, str)}))
