"""Whether seeding helps: a verdict from what replies tell of reuse. Pure.

A server may accept a file and use nothing of it: models with sliding-window or recurrent attention do not find in it
what they need (llama.cpp issues 28194, 25913). Only the count of prompt tokens that a reply did not compute tells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from proxy.upstream.prefix import Evidence

ENOUGH = 0.5
"""The share of a prefix's tokens that must have been reused; what a template adds before each prompt is no success."""

PATIENCE = 2
"""Failures in a row after which something that never helped is given up."""

PATIENCE_PROVED = 6
"""The same where it did help before: then it is no matter of the model, and others may have taken the slot."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What is known of one means on one fingerprint: `helps` is None as long as nothing is proved.

    `failures` counts those in a row.
    """

    helps: bool | None = None
    failures: int = 0


UNPROVED = Effect()
EFFECTIVE = Effect(helps=True)
INEFFECTIVE = Effect(helps=False)


def helped(evidence: Evidence, tokens: int) -> bool | None:
    """Whether a reply shows that a prefix of so many tokens was there; None: it does not say."""
    return None if evidence.cached is None else evidence.cached > 0 and evidence.cached >= ENOUGH * tokens


def judged(effect: Effect, success: bool | None) -> Effect:
    """What is known after one more reply; a verdict of no effect stands."""
    if success is None or effect.helps is False:
        return effect
    if success:
        return EFFECTIVE
    failures = effect.failures + 1
    given_up = failures >= (PATIENCE_PROVED if effect.helps else PATIENCE)
    return INEFFECTIVE if given_up else replace(effect, failures=failures)


def reused(evidence: Evidence, tokens: int) -> int:
    """Tokens of a prefix of so many tokens that a reply shows were not computed again."""
    return min(evidence.cached or 0, tokens)
