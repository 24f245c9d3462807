"""Whether this machine's clock can be right. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from proxy.finding import Examined, Finding, Severity
from storage.sqlite_offline import Ahead

TOLERATED_MS = 60_000
_BEFORE_NEARHIT_MS = 1_735_689_600_000  # 2025-01-01
_CHECK = "check it with `timedatectl`, and let the network set it"


def clock(now_ms: int, ahead: Ahead | None, upstream_ms: int | None) -> Examined:
    """What is to be said of a clock that shows `now_ms`; `ahead` are entries later than that, None is not known."""
    return Examined("clock", _shown(now_ms), tuple(_findings(now_ms, ahead, upstream_ms)))


def date_ms(header: str | None) -> int | None:
    """The time of an HTTP `Date` field (RFC 9110 section 6.6.1), to the second; None where there is none."""
    try:
        return round(parsedate_to_datetime(header or "").timestamp() * 1000)
    except (ValueError, OverflowError):
        return None


def _findings(now_ms: int, ahead: Ahead | None, upstream_ms: int | None) -> Iterator[Finding]:
    if now_ms < _BEFORE_NEARHIT_MS:
        what = f"the clock of this machine says {_shown(now_ms)}: it is not set"
        yield Finding(Severity.PROBLEM, what, "answers never expire by such a clock; let the network set it")
    if ahead is not None and ahead.entries:
        what = f"{ahead.entries} entries have times of up to {_span(ahead.latest_ms - now_ms)} from now"
        advice = "the clock was ahead then, and they live that much longer; or it is behind now: "
        yield Finding(Severity.ADVICE, what, advice + _CHECK)
    if upstream_ms is not None and abs(now_ms - upstream_ms) > TOLERATED_MS:
        side = "ahead of" if now_ms > upstream_ms else "behind"
        what = f"the clock of this machine is {_span(abs(now_ms - upstream_ms))} {side} the upstream's"
        yield Finding(Severity.ADVICE, what, f"one of them is wrong; {_CHECK}")


def _shown(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span(span_ms: int) -> str:
    seconds = span_ms // 1000
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {name}"
    return f"{seconds} seconds"
