"""The nearhit that runs, and the upstream. Blocking."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy import __version__
from proxy.ask import AskError, Refused, ask
from proxy.finding import Examined, Finding, Severity
from proxy.settings import Settings, UpstreamSettings
from proxy.upstream.adapter import Adapter, Kind, Probe, Seen, Sighting, Silent
from proxy.upstream.client import Upstream, client_session
from proxy.upstream.detect import ADAPTERS, Detected
from proxy.upstream.identity import Identity, after
from proxy.upstream.origin import origin_of

_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Running:
    """The nearhit at the configured address; `upstream` is the origin that it asks, empty where it does not tell."""

    examined: Examined
    upstream: str = ""


@dataclass(frozen=True, slots=True)
class Answering:
    """The upstream; `date` is the field of that name in an answer of its."""

    examined: Examined
    date: str | None


def running(settings: Settings) -> Running | None:
    """What the nearhit tells that listens where the settings say; None where nothing answers there."""
    try:
        version = str(ask(settings, None, "/-/healthy", timeout_s=_TIMEOUT_S)["version"])
    except AskError as error:
        # Only a connection that failed says that nothing is there.
        if isinstance(error.__cause__, OSError) and not isinstance(error, Refused):
            return None
        advice = "stop it, or set listen.port"
        what = f"port {settings.listen.port} is taken by something else than nearhit"
        return Running(Examined("running nearhit", "none", (Finding(Severity.PROBLEM, what, advice),)))
    findings = list(_version(version))
    try:
        findings += [_finding(told) for told in ask(settings, None, "/-/doctor")["findings"]]
        upstream = str(ask(settings, None, "/-/stats")["upstream"]["url"])
    except (AskError, LookupError, TypeError, AttributeError) as error:
        advice = "give doctor the settings, above all data_dir, that it was started with, or NEARHIT_ADMIN_TOKEN"
        findings.append(Finding(Severity.ADVICE, f"the running nearhit was not heard: {error}", advice))
        upstream = ""
    if upstream and upstream != origin_of(settings.upstream.url):
        what = f"the running nearhit has other settings than these: it asks {upstream}"
        findings.append(
            Finding(Severity.NOTE, what, "give doctor the configuration and flags that it was started with")
        )
    return Running(Examined("running nearhit", f"version {version}", tuple(findings)), upstream)


def not_running() -> Examined:
    """What is said where none runs."""
    what = "nearhit is not running at the configured address: its files, its upstream and the clock were looked at"
    return Examined("running nearhit", "none", (Finding(Severity.NOTE, what, "give --port or --url if it is"),))


def upstream(chosen: UpstreamSettings) -> Answering:
    """What the upstream is, and whether it shows what it runs."""
    # What it logs of its doubts, it tells here as well.
    logging.getLogger("nearhit.upstream").addHandler(logging.NullHandler())
    sighting, kind, doubt, date = asyncio.run(_look(chosen))
    origin = origin_of(chosen.url)
    match sighting:
        case Seen(_, _, models):
            shown = f"{origin}, {kind.value}, {', '.join(models) or 'no list of models'}"
            guess = Finding(Severity.ADVICE, f"upstream {origin}: its kind is a guess: {doubt}")
            return Answering(Examined("upstream", shown, (guess,) if doubt else ()), date)
        case Silent():
            what = f"upstream {origin}: it did not answer within {_TIMEOUT_S:g} s; it may be busy"
            return Answering(Examined("upstream", origin, (Finding(Severity.NOTE, what),)), date)
        case trouble:
            identity = after(Identity(), trouble)
            advice = "" if identity.locked else "is it running, and is upstream.url right?"
            problem = Finding(Severity.PROBLEM, f"upstream {origin}: {identity.trouble}", advice)
            return Answering(Examined("upstream", origin, (problem,)), date)


def date_of(origin: str) -> str | None:
    """The `Date` that the upstream gives, where it gives one."""

    async def asked() -> str | None:
        async with client_session(connect_timeout_s=_TIMEOUT_S, read_timeout_s=_TIMEOUT_S) as session:
            return await _date(Probe(Upstream(origin, session, lambda: None), {}, _TIMEOUT_S))

    return asyncio.run(asked())


async def _look(chosen: UpstreamSettings) -> tuple[Sighting, Kind, str, str | None]:
    adapter: Adapter = (
        Detected(chosen.epoch, None) if chosen.kind == "auto" else ADAPTERS[Kind(chosen.kind)](chosen.epoch)
    )
    own = {"Authorization": f"Bearer {chosen.api_key}"} if chosen.api_key else {}
    connect_s = min(chosen.connect_timeout_s, _TIMEOUT_S)
    async with client_session(connect_timeout_s=connect_s, read_timeout_s=_TIMEOUT_S) as session:
        probe = Probe(Upstream(origin_of(chosen.url), session, lambda: None), own, _TIMEOUT_S)
        sighting = await adapter.look(probe)
        doubt = adapter.doubt if isinstance(adapter, Detected) else ""
        return sighting, adapter.kind, doubt, await _date(probe)


async def _date(probe: Probe) -> str | None:
    headers = await probe.headers("/v1/models")
    return None if headers is None else headers.get("Date")


def _version(version: str) -> list[Finding]:
    if version == __version__:
        return []
    what = f"the running nearhit is version {version}, this program {__version__}"
    return [Finding(Severity.ADVICE, what, "restart it, so that one version works on the file")]


def _finding(told: Mapping[str, Any]) -> Finding:
    known = [severity for severity in Severity if severity == told["severity"]]
    return Finding(known[0] if known else Severity.NOTE, str(told["what"]), str(told["advice"]))
