"""The HTTP client towards the upstream: nothing added, nothing folded, nothing remembered between requests.

UpstreamError
├── UpstreamUnreachable     no connection, or it broke before an answer began
├── UpstreamTimeout         reading took longer than configured
├── UpstreamBusy            its turn did not come
├── UpstreamInterrupted     it broke in the middle of the answer
└── UpstreamGarbled         what came back is not HTTP that we can read
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.upstream.switched import Switched

POOL_KEEPALIVE_S = 3.0
"""llama.cpp closes idle connections after 5 s."""

_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
"""Seconds, seconds, probes, and milliseconds for what was sent and not acknowledged; see tcp(7)."""

_UNTOUCHED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class UpstreamError(Exception):
    """The upstream gave no usable answer."""


class UpstreamUnreachable(UpstreamError):
    """No answer began: refused, reset, unresolvable."""


class UpstreamTimeout(UpstreamError):
    """It took longer than configured."""


class UpstreamBusy(UpstreamError):
    """The request was not sent: the upstream works on others. `retry_after_s` is when to come again, whole seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        """`message` is for the client to read."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamInterrupted(UpstreamError):
    """The answer broke off."""


class UpstreamGarbled(UpstreamError):
    """The answer is not HTTP that we can read."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request to send; `target` is path and query as they go on the wire."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes | AsyncIterable[bytes] | None = None


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A response whose head has arrived."""

    status: int
    reason: str
    headers: CIMultiDictProxy[str]
    _response: aiohttp.ClientResponse

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            UpstreamTimeout: nothing came for as long as configured.
            UpstreamInterrupted: it broke off.
        """
        with _our_errors(UpstreamInterrupted):
            async for chunk in self._response.content.iter_any():
                yield chunk

    def switched(self) -> Switched:
        """The connection, once the upstream has agreed to speak another protocol on it.

        Raises:
            UpstreamGarbled: it has not.
        """
        connection = self._response.connection
        protocol = connection.protocol if connection is not None else None
        if protocol is None or not protocol.upgraded:
            raise UpstreamGarbled("it says that it switches to another protocol, and does not say to which")
        return Switched(protocol)


class Upstream:
    """One server. `origin` is scheme, host, port and perhaps a path in front of every target, without `/v1`."""

    def __init__(self, origin: str, session: aiohttp.ClientSession, on_unreachable: Callable[[], None]) -> None:
        """`on_unreachable` is called whenever no answer began or one broke off."""
        self.origin = origin
        self._session = session
        self._on_unreachable = on_unreachable

    @asynccontextmanager
    async def send(self, outgoing: Outgoing) -> AsyncIterator[UpstreamResponse]:
        """Exchange one request; leaving the block early closes the connection.

        A request is sent once more if a reused connection dropped before any byte of an answer: the server had closed
        it before it saw the request (RFC 9112 section 9.3.1).

        Raises:
            UpstreamUnreachable: no answer began.
            UpstreamTimeout: the wait for the head took longer than configured.
        """
        try:
            with _our_errors(UpstreamUnreachable):
                response = await self._open(outgoing)
            async with response:
                yield UpstreamResponse(response.status, response.reason or "", response.headers, response)
        except (UpstreamUnreachable, UpstreamInterrupted):
            self._on_unreachable()
            raise

    async def _open(self, outgoing: Outgoing) -> aiohttp.ClientResponse:
        attempt = _Attempt()
        _attempt.set(attempt)
        try:
            return await self._request(outgoing)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            repeatable = outgoing.body is None or isinstance(outgoing.body, bytes)
            if attempt.connected or not repeatable:
                raise
            return await self._request(outgoing)

    async def _request(self, outgoing: Outgoing) -> aiohttp.ClientResponse:
        return await self._session.request(
            outgoing.method,
            URL(self.origin + outgoing.target, encoded=True),
            headers=outgoing.headers,
            data=outgoing.body,
            allow_redirects=False,
            skip_auto_headers=_UNTOUCHED,
        )


class _Attempt:
    """One request's connection: `connected` says that a new one was tried, so that none was reused."""

    __slots__ = ("connected",)

    def __init__(self) -> None:
        self.connected = False


_attempt: ContextVar[_Attempt] = ContextVar("attempt")


def _new_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    # Called for new connections alone: aiohttp's tracing would tell the same at a price for every request.
    _attempt.get().connected = True
    family, kind, protocol, *_ = address
    connection = socket.socket(family, kind, protocol)
    if family != socket.AF_UNIX:
        _watch(connection)
    return connection


def _watch(connection: socket.socket) -> None:
    """Notice a server that lost its power in about a minute: it says nothing, as one does that thinks for long."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        # Not every system has all of them.
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@asynccontextmanager
async def client_session(*, connect_timeout_s: float, read_timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that keeps no cookies, follows no environment and decodes nothing; 0 means no read timeout."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s or None)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=POOL_KEEPALIVE_S, socket_factory=_new_socket)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        max_line_size=65_536,
        max_field_size=65_536,
    ) as session:
        yield session


@contextmanager
def _our_errors(broken: type[UpstreamError]) -> Iterator[None]:
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise UpstreamUnreachable("connecting took too long") from error
    except (TimeoutError, aiohttp.ServerTimeoutError) as error:
        raise UpstreamTimeout("the upstream did not answer in time") from error
    except aiohttp.ClientResponseError as error:
        raise UpstreamGarbled(f"{type(error).__name__}: {error.message}") from error
    except aiohttp.ClientError as error:
        raise broken(f"{type(error).__name__}: {error}") from error
    except OSError as error:
        raise broken(f"{type(error).__name__}: {error}") from error
