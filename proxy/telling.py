"""What a running nearhit tells, for people: tables and lines on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.finding import Examined

_STYLES = {"HIT": "green", "NEAR": "green", "MISS": "yellow", "BYPASS": "magenta", "JOINED": "green", "STALE": "yellow"}
_SEVERITIES = {"problem": "bold red", "advice": "yellow", "note": "cyan"}
_ENTRY_COLUMNS = ("id", "age", "ttl", "hits", "saved", "model", "words")
_EXPIRED = "expired"
_MODEL = 24
_NARROWEST = 12
_OWN_PLACE = ("version", "id", "words", "answer", "answer_note")


def clean(text: str) -> str:
    """The text without what a terminal would take for a command."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tell_explanation(console: Console, told: Mapping[str, Any]) -> None:
    """Why a call would or would not be answered from the cache."""
    outcome = str(told["outcome"])
    console.print(Text.assemble((outcome, _STYLES.get(outcome, "")), f"  {told['reason']}  ({told['endpoint']})"))
    if told.get("assumed"):
        console.print(Text(f"  assumed: {', '.join(told['assumed'])}", "dim"))
    if told.get("entry"):
        console.print(Text("  " + ", ".join(f"{name} {value}" for name, value in told["entry"].items())))
    if told.get("near", {}).get("shadow") and any(one["same"] for one in told["near"].get("candidates", ())):
        console.print(
            Text("  an answer to other words was found, but cache.shadow keeps it from being served", "yellow")
        )
    if "items" in told:
        _tell_items(console, told["items"])
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


def tell_entries(console: Console, entries: Sequence[Mapping[str, Any]], width: int | None) -> None:
    """A line for each entry, cut to `width` characters where that is given."""
    rows = [_entry_row(one) for one in entries]
    table = Table(*_ENTRY_COLUMNS, box=None, header_style="bold", pad_edge=False)
    taken = sum(
        max(map(cell_len, column)) + 2 for column in zip(_ENTRY_COLUMNS[:-1], *(r[:-1] for r in rows), strict=True)
    )
    for row in rows:
        cells = [Text(cell, "yellow" if cell == _EXPIRED else "", no_wrap=True) for cell in row]
        if width is not None:
            cells[-1].truncate(max(width - taken, _NARROWEST), overflow="ellipsis")
        table.add_row(*cells)
    console.print(table)


def tell_entry(console: Console, told: Mapping[str, Any]) -> None:
    """All that is known of an entry."""
    console.print(Text(f"entry {told['id']}", "bold"))
    for name, value in told.items():
        if name not in _OWN_PLACE:
            console.print(Text.assemble((f"  {name:18}", "dim"), _field(name, value)))
    if told["ttl_s"] <= 0:
        left_s = told["ttl_s"] + told.get("grace_s", 0)
        then = f"for {span(left_s)} it may stand in for one that cannot be had" if left_s > 0 else "it is not served"
        console.print(Text(f"  it has expired: {then}", "yellow"))
    if told["words"] is not None:
        console.print(Text("\nWords", "bold"))
        _tell_lines(console, told["words"])
    console.print(Text("\nAnswer", "bold"))
    _tell_lines(console, told.get("answer_note") or _said(told["answer"]))


def tell_doomed(console: Console, told: Mapping[str, Any], width: int | None) -> None:
    """What a purge would remove."""
    console.print(Text(f"{counted(told['would_remove'])} would go, with {told['bytes']} bytes of answers"))
    for one in told["examples"]:
        line = Text(f"  {one['id'][:16]}  {clean(one['words'] or '-')}", no_wrap=True)
        if width is not None:
            line.truncate(max(width, _NARROWEST), overflow="ellipsis")
        console.print(line)
    more = told["would_remove"] - len(told["examples"])
    if more > 0 and told["examples"]:
        console.print(Text(f"  and {more} more", "dim"))


def counted(entries: int) -> str:
    """So many entries."""
    return f"{entries} {'entry' if entries == 1 else 'entries'}"


def span(seconds: float) -> str:
    """A time in its two largest units: `45s`, `12m`, `3h 5m`, `2d 4h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    parts = [f"{days}d"] * bool(days) + [f"{hours}h"] * bool(hours) + [f"{minutes}m"] * bool(minutes and not days)
    return " ".join(parts)


def took(ms: float) -> str:
    """A duration for people."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s" if ms < 600_000 else span(ms / 1000)


def _entry_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    ttl = span(one["ttl_s"]) if one["ttl_s"] > 0 else _EXPIRED
    model = clean(one["model"])
    return (
        one["id"][:16],
        span(one["age_s"]),
        ttl,
        str(one["hits"]),
        took(one["cost_ms"]),
        model if len(model) <= _MODEL else f"{model[: _MODEL - 1]}…",
        "-" if one["words"] is None else clean(one["words"]),
    )


def _field(name: str, value: Any) -> str:
    if value is None or value == "":
        return "shared" if name == "namespace" else "-"
    return ("yes" if value else "no") if isinstance(value, bool) else clean(str(value))


def _said(answer: Any) -> str:
    """What the answer says; where that is more than text, all of it as JSON."""
    forms = (_choice_said, _blocks_said, _output_said, _vector_said) if isinstance(answer, dict) else ()
    said = next((said for form in forms if (said := form(answer))), "")
    return said or json.dumps(answer, indent=2, ensure_ascii=False)


def _choice_said(answer: Mapping[str, Any]) -> str:
    """Of chat and completions: where there is one choice, and it calls no tool."""
    choices = _objects(answer.get("choices"))
    if len(choices) != 1:
        return ""
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return _text(choices[0])
    said = message.get("content")
    return said if isinstance(said, str) and not message.get("tool_calls") else ""


def _blocks_said(answer: Mapping[str, Any]) -> str:
    """Of messages: where there are only texts, and perhaps what was thought before."""
    blocks = _objects(answer.get("content"))
    if any(block.get("type") not in ("text", "thinking", "redacted_thinking") for block in blocks):
        return ""
    return "".join(_text(block) for block in blocks)


def _output_said(answer: Mapping[str, Any]) -> str:
    """Of responses, likewise."""
    items = _objects(answer.get("output"))
    if any(item.get("type") not in ("message", "reasoning") for item in items):
        return ""
    return "".join(_text(part) for item in items if item["type"] == "message" for part in _objects(item.get("content")))


def _vector_said(answer: Mapping[str, Any]) -> str:
    """Of embeddings, which are kept one by one: numbers, or 32-bit floats in base64."""
    data = _objects(answer.get("data"))
    vector = data[0].get("embedding") if len(data) == 1 else None
    if isinstance(vector, list) and vector:
        return f"a vector of {len(vector)} numbers"
    is_packed = isinstance(vector, str) and len(vector) % 4 == 0
    return f"a vector of {len(vector.rstrip('=')) * 3 // 16} numbers" if is_packed and vector else ""


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(holder: Mapping[str, Any]) -> str:
    text = holder.get("text")
    return text if isinstance(text, str) else ""


def _tell_lines(console: Console, text: str) -> None:
    for line in text.split("\n"):
        console.print(Text(f"  {clean(line)}"))


def tell_examined(console: Console, examined: Iterable[Examined]) -> None:
    """What was looked at, and whether it is well."""
    for one in examined:
        mark = ("ok", "green") if one.is_well else ("--", "yellow")
        console.print(Text.assemble(mark, f"  {one.name:<16} ", (clean(one.seen), "dim")))


def _tell_items(console: Console, items: Mapping[str, Any]) -> None:
    console.print(Text(f"  {items['known']} of {items['asked']} inputs are known", "bold"))
    for one in items["told"]:
        state = f"known, {span(one['age_s'])} old" if one["known"] else one["reason"]
        console.print(Text.assemble(f"    {one['place']}: ", (state, "green" if one["known"] else "yellow")))
    if len(items["told"]) < items["asked"]:
        console.print(Text(f"    and {items['asked'] - len(items['told'])} more"))


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
