"""What somebody who looks for trouble has found: in words, with advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters: `problem` costs answers, `advice` could save time, `note` is good to know."""

    PROBLEM = "problem"
    ADVICE = "advice"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know, and what to do."""

    severity: Severity
    what: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Examined:
    """One thing that was looked at, what it is like, and what is to be said of it."""

    name: str
    seen: str
    findings: tuple[Finding, ...] = ()

    @property
    def is_well(self) -> bool:
        """Whether nothing needs to be done about it."""
        return all(finding.severity is Severity.NOTE for finding in self.findings)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Problems, then advice, then notes; within each, as they came."""
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))
