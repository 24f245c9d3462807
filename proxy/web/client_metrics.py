"""What Prometheus learns of named clients; their names come from the settings, so that there are only so many."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter

from proxy.cache.policy import Outcome
from proxy.web.limits import Limit

PASSED = "PASS"
"""The outcome of a request that nearhit does not cache."""


class ClientMetrics:
    """Counts what named clients ask."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Begin at zero, with no client."""
        self._requests = Counter(
            "nearhit_client_requests",
            "Requests of named clients that were let in",
            ["client", "outcome"],
            registry=registry,
        )
        self._limited = Counter(
            "nearhit_client_limited", "Requests of named clients over a limit", ["client", "limit"], registry=registry
        )
        self.unknown_keys = Counter(
            "nearhit_unknown_keys", "Requests without the key of a named client", registry=registry
        )

    def begin(self, names: Iterable[str]) -> None:
        """Show these clients' counters, at 0 until they ask."""
        for name in names:
            for outcome in (*Outcome, PASSED):
                self._requests.labels(name, outcome)
            for limit in Limit:
                self._limited.labels(name, limit)

    def served(self, name: str, outcome: str) -> None:
        """A client's request ended so."""
        self._requests.labels(name, outcome).inc()

    def limited(self, name: str, limit: Limit) -> None:
        """A client's request was over a limit."""
        self._limited.labels(name, limit).inc()
