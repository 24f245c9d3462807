"""What is wrong or could be better in a running nearhit, in words, with advice."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from proxy.cache.recent import Changing
from proxy.finding import Finding, Severity, worst_first
from proxy.upstream.detect import Detected
from proxy.upstream.prefix_table import State
from proxy.web.services import Services
from storage.base import StorageError

_TOTALS_TIMEOUT_S = 2.0


async def findings(services: Services) -> list[Finding]:
    """Everything there is to say, the worst first."""
    systems = await changing_systems(services)
    return worst_first(
        [*_upstream(services), *_prefixes(services), *await _storage(services), *_near(services), *systems]
    )


async def changing_systems(services: Services) -> list[Finding]:
    """A warning for each model whose system prompt is another one in every call."""
    # In a thread: it takes the last calls apart, which may be megabytes.
    changing = await asyncio.to_thread(services.recent.changing_system)
    return [Finding(Severity.ADVICE, *_told(one)) for one in changing]


def _told(changing: Changing) -> tuple[str, str]:
    span = changing.span
    looks = f", which look like {span.looks_like}" if span.looks_like else ""
    model = f" for model {changing.model}" if changing.model else ""
    what = (
        f"the system prompt was another one in nearly all of the last {changing.calls} calls{model}: "
        f"characters {span.start} to {span.end} differ{looks}"
    )
    return what, "calls with different system prompts never share an answer; move what changes into the last message"


def _upstream(services: Services) -> Iterator[Finding]:
    for one in services.backends:
        identity, origin = one.tracker.current, one.upstream.origin
        if identity.trouble:
            yield Finding(Severity.PROBLEM, f"upstream {origin}: {identity.trouble}")
        if one.gate.trouble:
            advice = "give nearhit a key that this upstream takes"
            yield Finding(Severity.PROBLEM, f"upstream {origin}: {one.gate.trouble}", advice)
        if isinstance(one.tracker.adapter, Detected) and one.tracker.adapter.doubt:
            yield Finding(Severity.ADVICE, f"upstream {origin}: its kind is a guess: {one.tracker.adapter.doubt}")
        if identity.fingerprint is None:
            advice = "set upstream.api_key, so that nearhit may ask" if identity.locked else "is upstream.url right?"
            of = "" if len(services.backends) == 1 else f" of {origin}"
            yield Finding(Severity.PROBLEM, f"nothing{of} is cached: it is not known what the upstream runs", advice)


def _prefixes(services: Services) -> Iterator[Finding]:
    for one in services.backends:
        for problem in one.seed_problems:
            yield Finding(Severity.PROBLEM, problem, "put it right and restart nearhit")
        for row in one.prefixes.listing() if one.prefixes is not None else ():
            if row.state in (State.INEFFECTIVE, State.FAILED):
                what = f"the prefix {row.name} of {row.model or one.name} is {row.state}: {row.reason}"
                yield Finding(Severity.NOTE, what, "see docs/prefixes.md")


async def _storage(services: Services) -> list[Finding]:
    try:
        async with asyncio.timeout(_TOTALS_TIMEOUT_S):
            totals = await services.store.totals()
    except (StorageError, TimeoutError) as error:
        return [
            Finding(Severity.PROBLEM, f"the store does not answer: {error}", "answers come from upstream meanwhile")
        ]
    failed = services.metrics.value("nearhit_storage_errors_total", {"op": "write"})
    if failed:
        what = f"{int(failed)} times since the start, answers could not be written to the store"
        return [Finding(Severity.ADVICE, what, "is the disk full, or the file system read-only? The log says why")]
    limit = services.settings.cache.max_entries
    if totals.entries >= limit:
        return [Finding(Severity.NOTE, f"the cache is full ({totals.entries} entries)", "raise cache.max_entries")]
    return []


def _near(services: Services) -> Iterator[Finding]:
    if services.near_state == "loading":
        yield Finding(Severity.NOTE, "the near tier is still loading its lists", "wait a few seconds")
    elif services.near_state == "failed":
        yield Finding(Severity.PROBLEM, "the near tier could not be loaded; equal calls are answered", "see the log")
    wrong = services.metrics.value("nearhit_wrong_hits_total", {"source": "feedback"})
    if wrong:
        yield Finding(Severity.NOTE, f"{int(wrong)} answers were called wrong since the start", "see nearhit explain")
