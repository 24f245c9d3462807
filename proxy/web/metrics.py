"""Prometheus metrics of one application. Labels are bounded and never hold text, keys or credentials."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from proxy.cache.dialects import DIALECTS
from proxy.cache.near.guard import Rule
from proxy.cache.near.tier import Nearest
from proxy.cache.policy import Bypass, Drop, Miss, Outcome, Tier
from proxy.web.client_metrics import ClientMetrics
from proxy.web.prefix_metrics import PrefixMetrics
from storage.base import Entry, StorageError

log = logging.getLogger("nearhit.storage")

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_SCORES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)
_COMPLAIN_EVERY_S = 60.0


class Tally:
    """The counters of the hit path as plain numbers: five counters with locks would cost as much as the look-up."""

    def __init__(self) -> None:
        """Begin at zero, with every series that there can be."""
        self.requests = {(dialect.endpoint, outcome): 0 for dialect in DIALECTS for outcome in Outcome}
        self.hits = dict.fromkeys(Tier, 0)
        self.saved_ms = dict.fromkeys(Tier, 0)
        self.saved_prompt = 0
        self.saved_completion = 0

    def hit(self, entry: Entry, tier: Tier) -> None:
        """Count an answer from the cache."""
        self.hits[tier] += 1
        self.saved_ms[tier] += entry.cost_ms
        self.saved_prompt += entry.prompt_tokens or 0
        self.saved_completion += entry.completion_tokens or 0

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as Prometheus knows them."""
        requests = CounterMetricFamily(
            "nearhit_requests", "Requests to cacheable endpoints", labels=["endpoint", "outcome"]
        )
        for (endpoint, outcome), count in self.requests.items():
            requests.add_metric([endpoint, outcome], count)
        hits = CounterMetricFamily("nearhit_hits", "Answers from the cache", labels=["tier"])
        saved = CounterMetricFamily("nearhit_saved_seconds", "Upstream time that hits did not take", labels=["tier"])
        for tier in Tier:
            hits.add_metric([tier], self.hits[tier])
            saved.add_metric([tier], self.saved_ms[tier] / 1000)
        tokens = CounterMetricFamily("nearhit_saved_tokens", "Tokens that hits did not compute", labels=["kind"])
        tokens.add_metric(["prompt"], self.saved_prompt)
        tokens.add_metric(["completion"], self.saved_completion)
        yield from (requests, hits, saved, tokens)


class Metrics:
    """Every counter, with the children of fixed labels bound once."""

    def __init__(self) -> None:
        """Begin at zero, in a registry of its own."""
        self.registry = registry = CollectorRegistry()
        self._process = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self.tally = Tally()
        registry.register(self.tally)
        self.misses = Counter("nearhit_misses", "Calls that the cache could not answer", ["reason"], registry=registry)
        self.bypass = Counter("nearhit_bypass", "Requests neither looked up nor stored", ["reason"], registry=registry)
        self.stored_answers = Counter("nearhit_stored", "Answers kept", registry=registry)
        self.drops = Counter("nearhit_not_stored", "Answers relayed and not kept", ["reason"], registry=registry)
        self.evicted = Counter("nearhit_evicted", "Entries removed", ["reason"], registry=registry)
        self.joined = Counter("nearhit_joined", "Calls that shared another's fetch", registry=registry)
        lookup = Histogram("nearhit_lookup_seconds", "Look-ups in storage", ["tier"], registry=registry, buckets=_FAST)
        self.lookup, self.near_lookup = lookup.labels(Tier.EXACT), lookup.labels(Tier.NEAR)
        self.near_score = Histogram("nearhit_near_score", "Similarity of near hits", registry=registry, buckets=_SCORES)
        self.verdicts = Counter(
            "nearhit_near_verdicts", "Near look-ups by the rule that decided", ["verdict"], registry=registry
        )
        self.shadow = Counter("nearhit_shadow_hits", "Near hits that were not served", registry=registry)
        self.wrong = Counter("nearhit_wrong_hits", "Hits that were called wrong", ["source"], registry=registry)
        self.upstream = Histogram(
            "nearhit_upstream_seconds", "Upstream exchanges of cacheable calls", registry=registry, buckets=_SLOW
        )
        self.ttft = Histogram(
            "nearhit_upstream_ttft_seconds", "Time to the first token from upstream", registry=registry, buckets=_SLOW
        )
        self.storage_errors = Counter("nearhit_storage_errors", "Failed storage operations", ["op"], registry=registry)
        self.entries = Gauge("nearhit_entries", "Entries in the store", registry=registry)
        self.bytes = Gauge("nearhit_bytes", "Bytes of the store", registry=registry)
        self.enabled = Gauge("nearhit_enabled", "1 while the cache is on", registry=registry)
        self.inflight = Gauge("nearhit_inflight", "Upstream fetches under way", registry=registry)
        self.storage_up = Gauge("nearhit_storage_up", "1 while the store is open", registry=registry)
        self.upstream_up = Gauge("nearhit_upstream_up", "1 while the upstream answers", ["upstream"], registry=registry)
        self.prefixes = PrefixMetrics(registry)
        self.clients = ClientMetrics(registry)
        self._bind()
        self.near_failed = False
        """Whether the near tier could not be loaded."""
        self._complained: dict[str, float] = defaultdict(lambda: -_COMPLAIN_EVERY_S)

    def _bind(self) -> None:
        # Series that exist from the start show up as 0 in rate() and alerts; a label look-up costs 5 us.
        self.by_miss = {reason: self.misses.labels(reason) for reason in Miss}
        self.by_bypass = {reason: self.bypass.labels(reason) for reason in Bypass}
        self.by_drop = {reason: self.drops.labels(reason) for reason in Drop}
        self.by_verdict = {rule: self.verdicts.labels(rule) for rule in Rule}
        self.no_candidate = self.verdicts.labels("no-candidate")
        self.wrong_by_feedback = self.wrong.labels("feedback")

    def stored(self) -> None:
        """See `proxy.cache.ports.Observer`."""
        self.stored_answers.inc()

    def not_stored(self, reason: Drop) -> None:
        """See `proxy.cache.ports.Observer`."""
        self.by_drop[reason].inc()

    def fetched(self, seconds: float, ttft_seconds: float | None) -> None:
        """See `proxy.cache.ports.Observer`."""
        self.upstream.observe(seconds)
        if ttft_seconds is not None:
            self.ttft.observe(ttft_seconds)

    def looked_near(self, seconds: float, nearest: Nearest) -> None:
        """See `proxy.cache.ports.Observer`."""
        self.near_lookup.observe(seconds)
        deciding = nearest.deciding
        (self.no_candidate if deciding is None else self.by_verdict[deciding.verdict.rule]).inc()
        if nearest.found is not None:
            self.near_score.observe(nearest.found.score)

    def looked_up(self, seconds: float) -> None:
        """See `proxy.cache.ports.Observer`."""
        self.lookup.observe(seconds)

    def storage_failed(self, op: str, error: StorageError) -> None:
        """Count a failed storage operation; say so at most once a minute for each operation."""
        self.storage_errors.labels(op).inc()
        now = time.monotonic()
        if now - self._complained[op] >= _COMPLAIN_EVERY_S:
            self._complained[op] = now
            log.warning("storage failed (%s): %s; requests are answered without it", op, error)

    def removed(self, reason: str, count: int) -> None:
        """Count entries that upkeep removed."""
        self.evicted.labels(reason).inc(count)

    def value(self, name: str, labels: dict[str, str] | None = None) -> float:
        """The current value of a sample, 0 where it does not exist."""
        return self.registry.get_sample_value(name, labels or {}) or 0.0

    def summary(self) -> dict[str, Any]:
        """The figures of `/-/stats`: totals, and every count by its outcome or reason where it is not 0."""
        totals: dict[str, float] = defaultdict(float)
        by_label: dict[str, dict[str, int]] = defaultdict(dict)
        for family in self.registry.collect():
            for sample in family.samples:
                totals[sample.name] += sample.value
                told = sample.labels.get("outcome") or sample.labels.get("reason") or sample.labels.get("verdict")
                if told and sample.value and not sample.name.endswith("_created"):
                    counts = by_label[sample.name]
                    counts[told] = counts.get(told, 0) + int(sample.value)
        return {
            "cache.hit_exact": self.tally.hits[Tier.EXACT],
            "cache.hit_approx": self.tally.hits[Tier.NEAR],
            "cache.hit_shadow": int(totals["nearhit_shadow_hits_total"]),
            "cache.wrong_hits": int(totals["nearhit_wrong_hits_total"]),
            "cache.saved_ms": round(totals["nearhit_saved_seconds_total"] * 1000),
            "cache.load_ms": round(totals["nearhit_lookup_seconds_sum"] * 1000, 3),
            "cache.stored": int(totals["nearhit_stored_total"]),
            "cache.saved_tokens": int(totals["nearhit_saved_tokens_total"]),
            "requests": {outcome.value: 0 for outcome in Outcome} | by_label["nearhit_requests_total"],
            "misses": by_label["nearhit_misses_total"],
            "near_verdicts": by_label["nearhit_near_verdicts_total"],
            "bypassed": by_label["nearhit_bypass_total"],
            "not_stored": by_label["nearhit_not_stored_total"],
            "evicted": by_label["nearhit_evicted_total"],
        }

    async def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        # Process metrics are read from files.
        return generate_latest(self.registry) + await asyncio.to_thread(generate_latest, self._process)
