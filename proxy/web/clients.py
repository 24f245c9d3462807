"""Named clients: who they are, told by their keys, what is theirs, and how nearhit asks upstream for them."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, unquote_plus

from aiohttp import web
from multidict import CIMultiDict, MultiMapping

from proxy.settings import ClientSettings
from proxy.upstream.sharing import Caller, Sharing, shown_credential
from proxy.web.backend import Backend, own_credential
from proxy.web.client_metrics import ClientMetrics
from proxy.web.headers import without_credentials
from proxy.web.limits import Allowance, Limited


@dataclass(frozen=True, slots=True)
class Client:
    """One client of the settings.

    `namespace` is the digest that it shares answers under. `may_store`: its answers are kept; `uses_cache`: it is
    answered from the cache at all; `is_admin`: it may use the routes under `/-/`.
    """

    name: str
    namespace: bytes
    may_store: bool = True
    uses_cache: bool = True
    is_admin: bool = False

    @property
    def caller(self) -> Caller:
        """What sharing makes of it: its key was checked here, and the upstream hears nearhit's own from all alike."""
        return Caller(self.namespace, may_read=True, may_lead=True)


CLIENT = web.RequestKey("client", Client)
"""Whose request it is, where clients are named; set before a handler sees it."""


class Clients:
    """The clients of the settings. Their keys are kept as digests only."""

    def __init__(self, named: Sequence[ClientSettings], secret: bytes, counts: ClientMetrics) -> None:
        """`secret` (32 bytes) is the installation's; it keys the digests of keys and namespaces."""
        counts.begin(one.name for one in named)
        self._counts = counts
        self._secret = secret
        self._by_digest = {self._digest(one.key): _client(one, secret) for one in named}
        self._allowances = {one.name: Allowance(one.requests_per_minute, one.max_concurrency) for one in named}

    def __iter__(self) -> Iterator[Client]:
        return iter(self._by_digest.values())

    def of(self, key: str) -> Client | None:
        """The client with this key.

        How long a digest is looked for tells nothing of a key: without the secret, nobody can choose a digest.
        """
        return self._by_digest.get(self._digest(key))

    def stranger(self) -> None:
        """A request came without the key of a client."""
        self._counts.unknown_keys.inc()

    def enter(self, client: Client) -> Limited | None:
        """Begin a request of a client, which `leave` ends, or say why it may not be served now."""
        limited = self._allowances[client.name].enter(time.monotonic())
        if limited is not None:
            self._counts.limited(client.name, limited.limit)
        return limited

    def leave(self, client: Client, outcome: str) -> None:
        """End a request that was let in, and ended so."""
        self._allowances[client.name].leave()
        self._counts.served(client.name, outcome)

    def in_flight(self, client: Client) -> int:
        """How many requests of a client are served at this moment."""
        return self._allowances[client.name].in_flight

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._secret, b"client-key\0" + key.encode("utf-8", "surrogateescape"), hashlib.sha256)


def namespace_digest(secret: bytes, name: str) -> bytes:
    """The namespace that clients share answers under.

    Never that of a credential, whose text has no NUL: see `proxy.upstream.sharing.Gate.credential_of`.
    """
    return hmac.digest(secret, b"client-namespace\0" + name.encode("utf-8", "surrogatepass"), hashlib.sha256)


def _client(one: ClientSettings, secret: bytes) -> Client:
    return Client(
        one.name,
        namespace_digest(secret, one.namespace or one.name),
        may_store="read-only" not in one.rights and "no-store" not in one.rights,
        uses_cache="no-store" not in one.rights,
        is_admin="admin" in one.rights,
    )


def shown_key(headers: MultiMapping[str]) -> str:
    """The key in `Authorization: Bearer` or `X-Api-Key`; "" where there is none, or not one alone.

    The scheme's name may be in any case (RFC 9110 section 11.1).
    """
    bearers, plain = headers.getall("Authorization", ()), headers.getall("X-Api-Key", ())
    if len(bearers) > 1 or len(plain) > 1:
        return ""
    shown = {*map(_bearer, bearers), *(value.strip() for value in plain)}
    return shown.pop() if len(shown) == 1 else ""


def _bearer(value: str) -> str:
    scheme, _, credentials = value.partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def stands_in(key: str, target: str) -> bool:
    """Whether a key can be read in a request's path or query."""
    return key in target or key in unquote(target) or key in unquote_plus(target)


def is_preflight(request: web.Request) -> bool:
    """Whether a browser asks what a page may send (Fetch section 4.8): such a question carries no key."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    return asks and not request.body_exists


def is_nobodys(request: web.Request, backend: Backend) -> bool:
    """Whether clients are named, and none is behind this request."""
    return backend.gate.sharing is Sharing.CLIENTS and CLIENT not in request


def credential_for(request: web.Request, backend: Backend) -> Mapping[str, str]:
    """The header fields by which the upstream knows on whose behalf it is asked: never a named client's own."""
    if backend.gate.sharing is not Sharing.CLIENTS:
        return shown_credential(request.headers)
    return own_credential(backend.settings) if CLIENT in request else {}


def as_nearhit(request: web.Request, backend: Backend, passed: CIMultiDict[str]) -> CIMultiDict[str]:
    """The fields of a request that go upstream, for a named client with nearhit's credential in place of its own.

    `passed` is what `to_upstream` leaves: before it, a `Connection` of the client's could name the field that is added.
    """
    if backend.gate.sharing is not Sharing.CLIENTS:
        return passed
    kept = without_credentials(passed, shown_key(request.headers))
    kept.update(credential_for(request, backend))
    return kept
