"""What Prometheus learns of queues and prefix caches."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from proxy.upstream.lane import Place
from proxy.upstream.prefix import Hitch, Readied

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_SEEDED = "seeded"
_PREEMPTED = "preempted"


class PrefixMetrics:
    """Told by the prefix caches and the queues of all upstreams; see `proxy.upstream.prefix_cache.Observer`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Begin at zero."""
        restores = Counter(
            "nearhit_prefix_restores", "Calls with a kept prefix, by what was done", ["result"], registry=registry
        )
        self._restores = {how.value: restores.labels(how.value) for how in Readied}
        seeds = Counter("nearhit_prefix_seeds", "Seedings, by what came of them", ["result"], registry=registry)
        results = [_SEEDED, _PREEMPTED, *(hitch.value for hitch in Hitch)]
        self._seeds = {result: seeds.labels(result) for result in results}
        self._load = Histogram(
            "nearhit_prefix_load_seconds", "Restoring a prefix before a call", registry=registry, buckets=_FAST
        )
        self._seed = Histogram("nearhit_prefix_seed_seconds", "Computing a prefix", registry=registry, buckets=_SLOW)
        self._reused = Counter(
            "nearhit_prefix_tokens_reused", "Prompt tokens of known prefixes not computed again", registry=registry
        )
        self._seed_wait = Counter(
            "nearhit_prefix_seed_wait_seconds", "Time that calls waited for a seeding to end", registry=registry
        )
        self.met_seeding = Counter("nearhit_prefix_met_seeding", "Calls that met a seeding", registry=registry)
        self.queue_depth = Gauge(
            "nearhit_queue_depth", "Calls that wait for their turn", ["upstream"], registry=registry
        )
        refused = Counter("nearhit_queue_refused", "Calls that got no place", ["reason"], registry=registry)
        self.queue_full, self.queue_timeout = refused.labels("full"), refused.labels("timeout")
        self._queued = Histogram(
            "nearhit_queue_seconds", "Time for which calls waited for their turn", registry=registry, buckets=_SLOW
        )

    def placed(self, place: Place) -> None:
        """A call got its place in a queue."""
        self._queued.observe(place.waited_s)
        if place.met_seeding:
            self.met_seeding.inc()
            self._seed_wait.inc(place.waited_for_seeding_s)

    def restored(self, result: str) -> None:
        """See `Observer`."""
        self._restores[result].inc()

    def load_seconds(self, seconds: float) -> None:
        """See `Observer`."""
        self._load.observe(seconds)

    def reused(self, tokens: int) -> None:
        """See `Observer`."""
        self._reused.inc(tokens)

    def seeded(self, seconds: float) -> None:
        """See `Observer`."""
        self._seeds[_SEEDED].inc()
        self._seed.observe(seconds)

    def preempted(self) -> None:
        """See `Observer`."""
        self._seeds[_PREEMPTED].inc()

    def seed_failed(self, hitch: str) -> None:
        """See `Observer`."""
        self._seeds[hitch].inc()
