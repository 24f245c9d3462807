"""What a running nearhit tells, for people: tables and lines on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"HIT": "green", "NEAR": "green", "MISS": "yellow", "BYPASS": "magenta", "JOINED": "green"}
_SEVERITIES = {"problem": "bold red", "advice": "yellow", "note": "cyan"}


def clean(text: str) -> str:
    """The text without what a terminal would take for a command."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell_explanation(console: Console, told: Mapping[str, Any]) -> None:
    """Why a call would or would not be answered from the cache."""
    outcome = str(told["outcome"])
    console.print(Text.assemble((outcome, _STYLES.get(outcome, "")), f"  {told['reason']}  ({told['endpoint']})"))
    if told.get("entry"):
        console.print(Text("  " + ", ".join(f"{name} {value}" for name, value in told["entry"].items())))
    if told.get("near", {}).get("shadow") and any(one["same"] for one in told["near"].get("candidates", ())):
        console.print(
            Text("  an answer to other words was found, but cache.shadow keeps it from being served", "yellow")
        )
    if "key" not in told:
        return
    _tell_key(console, told["key"])
    if told["words"]:
        words = told["words"]
        console.print(Text(f"\nCompared words ({words['rules']} rules): ", "bold"), Text(clean(words["text"])))
        console.print(Text(f"  as: {clean(' | '.join(words['compared']))}", "dim"))
    _tell_candidates(console, told["near"])
    _tell_elsewhere(console, told.get("nearest_call_elsewhere", ()))
    stores = ", ".join(f"{name} {value}" for name, value in told["would_store"].items())
    console.print(Text("\nA good answer would be stored: ", "bold"), Text(stores))


def tell_findings(console: Console, found: Iterable[Mapping[str, str]]) -> None:
    """What is wrong or could be better."""
    for finding in found:
        style = _SEVERITIES.get(finding["severity"], "")
        console.print(Text.assemble((f"{finding['severity']}: ", style), clean(finding["what"])))
        if finding["advice"]:
            console.print(Text(f"  {clean(finding['advice'])}", "dim"))


def _tell_key(console: Console, key: Mapping[str, Any]) -> None:
    table = Table("key part", "characters", "digest", "begins", box=None, header_style="bold")
    for part in key["parts"]:
        begins = clean(part["text"][:70])
        table.add_row(Text(clean(part["name"])), str(part["characters"]), part["digest"], Text(begins, "dim"))
    console.print(Text(f"\nkey {key['digest']}  space {key['space']}  fingerprint {key['fingerprint']}", "dim"))
    console.print(table)


def _tell_candidates(console: Console, near: Mapping[str, Any]) -> None:
    candidates = near.get("candidates")
    if not candidates:
        console.print(Text(f"\nNo stored prompt of this space is near (mode {near['mode']}, {near['state']})."))
        return
    console.print(Text("\nNearest stored prompts of this space", "bold"))
    for one in candidates[:5]:
        verdict = ("same", "green") if one["same"] else ("refused", "yellow")
        console.print(Text.assemble(f"  {one['score']:.3f} ", verdict, f" by {one['rule']}  {one['id'][:16]}"))
        console.print(Text(f"    {clean(one['difference'])}"))


def _tell_elsewhere(console: Console, spans: Iterable[Mapping[str, Any]]) -> None:
    for number, span in enumerate(spans):
        if not number:
            console.print(Text("\nThe most similar recent call is in another space; it differs in", "bold"))
        looks = f", which looks like {span['looks_like']}" if span["looks_like"] else ""
        console.print(Text(f"  {clean(span['part'])}, characters {span['start']} to {span['end']}{looks}"))
        console.print(Text(f"    here: {clean(span['here'])}\n    there: {clean(span['there'])}", "dim"))
