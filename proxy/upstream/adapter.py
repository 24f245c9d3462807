"""What nearhit must know about a kind of server, behind one Protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from proxy.upstream.client import Outgoing, Upstream, UpstreamError, UpstreamTimeout
from proxy.upstream.prefix import Hitch, Prefixing

if TYPE_CHECKING:
    from proxy.upstream.canary import Ask

_MAX_ANSWER = 4 * 1024 * 1024

Json = Any


class Kind(StrEnum):
    """Kinds of server."""

    OPENAI = "openai"
    LLAMACPP = "llamacpp"
    ROCKCHIPLLAMA = "rockchipllama"
    RKLLAMA = "rkllama"
    RKLLM_FLASK = "rkllm_flask"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How this kind of server behaves.

    `drains`: a request whose client left must be read to its end. `usage_from_timings`: token usage can be derived from
    `timings`. `key_before_body`: credentials are checked before the body is looked at. `tells_instances`: two runs of
    the server can be told apart. `max_concurrency`: requests that it works on at a time, 0: it queues by itself.
    `honours_sampling`: temperature and seed of a call have an effect. `cached`: answers may be kept unless the operator
    says otherwise; `multi_turn`: also those to the later turns of a conversation. `tells_length`: an answer that was
    cut says so. `usage_unit`: what its token counts count. `default_limit`: tokens at which it cuts where a call states
    no limit, None: unknown or none. `leaks_tail`: the end of an answer that was cut may come out at the start of the
    next. `sends_loaded`: calls must name the model that is really loaded.
    """

    drains: bool
    usage_from_timings: bool
    key_before_body: bool
    tells_instances: bool
    max_concurrency: int = 0
    honours_sampling: bool = True
    cached: bool = True
    multi_turn: bool = True
    tells_length: bool = True
    usage_unit: Literal["tokens", "words"] = "tokens"
    default_limit: int | None = None
    leaks_tail: bool = False
    sends_loaded: bool = False
    open_to_all: bool = False
    """The server has no authentication at all."""
    keeps_responses: bool = False
    """It keeps what it answers on `/v1/responses`, unless told not to, for calls that go on from it."""
    may_be_paid: bool = False
    """It may be somebody's paid service: what costs tokens is done for what the operator named, and not learned."""


@dataclass(frozen=True, slots=True)
class Room:
    """How long an answer can be, whatever the call says, 0: unknown, or no bound.

    `context` is how many tokens prompt and answer have together, `answer` where the server cuts a call that states no
    limit.
    """

    context: int = 0
    answer: int = 0


NO_ROOM = Room()
"""What servers say that do not speak of it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The server answers.

    `fingerprint` is its identity, `instance` its run where it shows one, `models` its list, `loaded` the one of them
    that is loaded, empty where it does not say. `files` are the names of the models' files, by model. `canary` asks for
    what tells models apart that show the same, None where nothing does. `asleep`: it has put its model away until the
    next call, and any model call wakes it. `room` is
    how long answers can be.
    """

    fingerprint: bytes
    instance: str
    models: tuple[str, ...]
    loaded: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    canary: Ask | None = None
    asleep: bool = False
    room: Room = NO_ROOM


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
    """The server answers, and shows nothing that identifies what it runs; `why`, where more is known than that."""

    why: str = ""


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

    @property
    def prefixing(self) -> Prefixing | None:
        """What it can do about prefixes; None where nothing helps."""
        ...

    async def make_way(self, probe: Probe, path: str, body: bytes) -> None:
        """Do what must come before a request that is no call for an answer is passed on to this path."""
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

    def within(self, timeout_s: float) -> Probe:
        """The same with another limit, in seconds."""
        return Probe(self._upstream, self._credential, timeout_s)

    async def get(self, path: str) -> Reply | None:
        """GET a path; None where there was no connection."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Json]) -> Reply | None:
        """POST JSON to a path; None where there was no connection."""
        return await self._ask("POST", path, json.dumps(body).encode())

    async def delete(self, path: str) -> Reply | None:
        """DELETE a path; None where there was no connection."""
        return await self._ask("DELETE", path, None)

    async def streamed(self, path: str, body: Mapping[str, Json], heard: Callable[[bytes], None]) -> int | None:
        """POST JSON; `heard` gets the answer's body as it arrives.

        The status once all of it is there; 0 where that took too long or was too much, None without a connection.
        """
        try:
            return await self._exchange("POST", path, json.dumps(body).encode(), heard)
        except (TimeoutError, UpstreamTimeout, _TooMuch):
            return 0
        except UpstreamError:
            return None

    async def headers(self, path: str) -> Mapping[str, str] | None:
        """The header fields of the answer to a GET; None where there was none in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._upstream.send(Outgoing("GET", path, self._credential)) as response:
                    return response.headers
        except (UpstreamError, TimeoutError):
            return None

    async def _ask(self, method: str, path: str, body: bytes | None) -> Reply | None:
        content = bytearray()
        try:
            status = await self._exchange(method, path, body, content.extend)
        except _TooMuch as refused:
            return Reply(refused.status, None)
        except (TimeoutError, UpstreamTimeout):
            return Reply(0, None)
        except UpstreamError:
            return None
        try:
            return Reply(status, json.loads(content))
        except (ValueError, RecursionError):
            return Reply(status, None)

    async def _exchange(self, method: str, path: str, body: bytes | None, heard: Callable[[bytes], None]) -> int:
        headers = {**self._credential, "Accept": "application/json", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        size = 0
        async with (
            asyncio.timeout(self._timeout_s),
            self._upstream.send(Outgoing(method, path, headers, body)) as response,
        ):
            async for chunk in response.chunks():
                size += len(chunk)
                if size > _MAX_ANSWER:
                    raise _TooMuch(response.status)
                heard(chunk)
        return response.status


class _TooMuch(Exception):
    """The answer is larger than anything that is asked for here."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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


def hitch(sighting: Sighting) -> Hitch:
    """Why nothing was seeded on a server that is in this trouble."""
    match sighting:
        case Silent():
            return Hitch.BUSY
        case Unreachable() | Loading():
            return Hitch.UNREACHABLE
        case _:
            return Hitch.REFUSED


def model_ids(listing: Json) -> tuple[str, ...]:
    """The ids of an OpenAI model list; empty where it is none."""
    data = listing.get("data") if isinstance(listing, dict) else None
    ids = [item.get("id") for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    return tuple(sorted({identifier for identifier in ids if isinstance(identifier, str)}))
