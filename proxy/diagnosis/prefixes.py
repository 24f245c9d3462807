"""What is configured of prefix caches: files with system prompts, folders with slot files. Blocking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from proxy.finding import Examined, Finding, Severity
from proxy.settings import Settings
from proxy.upstream.routing import DEFAULT
from proxy.web.prefixing import read_seeds


def prefixes(settings: Settings) -> Iterator[Examined]:
    """What was looked at, where anything is configured."""
    upstreams = {DEFAULT: settings.upstream, **{one.name: one for one in settings.upstreams}}
    findings: list[Finding] = []
    seen = 0
    for name, chosen in upstreams.items():
        configured, problems = read_seeds(settings, name)
        seen += len(configured)
        findings += [Finding(Severity.PROBLEM, problem, "put it right, then start nearhit") for problem in problems]
        if chosen.slot_dir and not Path(chosen.slot_dir).expanduser().is_dir():
            what = f"{name}: upstream.slot_dir: {chosen.slot_dir} is no folder"
            findings.append(Finding(Severity.PROBLEM, what, "give the folder of llama-server's --slot-save-path"))
    if seen or findings:
        yield Examined("prefixes", f"{seen} system prompts to seed", tuple(findings))
