"""What the prefixes of an upstream are given: terms, surroundings, and what is configured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.upstream.adapter import Probe
from proxy.upstream.prefix import Hitch, Lead, Prefixing, Readied
from proxy.upstream.prefix_shelf import Keeping
from proxy.upstream.seeding import Quiet


@dataclass(frozen=True, slots=True)
class PrefixTerms:
    """How prefixes are treated.

    A lead is learned from its `learn_after`th call on (0: never); `max_known` leads are counted. Servers that can be
    interrupted are seeded after `soon_s` without a call, others after `seed_idle_s`. One seeding may take
    `seed_timeout_s`, preparing one call `restore_timeout_s`. Readiness waits `ready_timeout_s` for what is configured.
    What failed is tried again after `retry_s`, then twice that, and so on. `keeps_readable`: what clients wrote may be
    kept in a readable form. At most `max_unproved` leads are learned that no call has had restored yet, and at most
    `learn_per_hour` in an hour.
    """

    learn_after: int = 3
    max_known: int = 256
    max_unproved: int = 16
    learn_per_hour: int = 60
    soon_s: float = 1.0
    seed_idle_s: float = 60.0
    seed_timeout_s: float = 900.0
    restore_timeout_s: float = 15.0
    ready_timeout_s: float = 300.0
    retry_s: float = 5.0
    keeps_readable: bool = True


@dataclass(frozen=True, slots=True)
class Configured:
    """A prefix that the operator named; `model` empty: whatever model the upstream runs."""

    name: str
    lead: Lead
    model: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """What the upstream is known to run: its fingerprint, its model's friendly name, and all names that mean it.

    `run` is another for each run of the server, as far as runs can be told apart. `instance` is what the server itself
    calls the run, empty where it does not.
    """

    fingerprint: bytes
    model: str
    names: frozenset[str] = frozenset()
    run: str = ""
    instance: str = ""

    def is_model(self, name: str) -> bool:
        """Whether a name, empty for any, means the model."""
        return name in ("", self.model) or name in self.names


class PrefixRefused(Exception):
    """A prefix cannot be made; the message says why, for people."""


class NotRunning(PrefixRefused):
    """The upstream does not run that model now."""


class Observer(Protocol):
    """Counts for the metrics."""

    def restored(self, result: Readied) -> None:
        """A call's lead was kept by the server, and this came of it."""
        ...

    def load_seconds(self, seconds: float) -> None:
        """Restoring took so long."""
        ...

    def reused(self, tokens: int) -> None:
        """So many tokens of a seeded prefix were not computed again."""
        ...

    def seeded(self, seconds: float) -> None:
        """Seeding one took so long."""
        ...

    def preempted(self) -> None:
        """A seeding gave way to a call."""
        ...

    def seed_failed(self, hitch: Hitch) -> None:
        """A seeding failed."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a prefix cache works with.

    `prefixing` is what the kind of server can do, None: nothing. `running` is what is confirmed to run, None as long as
    that is not known. `probe` asks with nearhit's own credential and may take `seed_timeout_s`.
    """

    prefixing: Callable[[], Prefixing | None]
    running: Callable[[], Running | None]
    quiet: Quiet
    probe: Probe
    keeping: Keeping
    observer: Observer
