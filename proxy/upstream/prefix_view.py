"""Prefixes as they are shown to people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from proxy.upstream.prefix import Style
from proxy.upstream.prefix_record import Record
from proxy.upstream.prefix_shelf import Shelved
from proxy.upstream.prefix_table import Entry, Source, State, Table
from proxy.upstream.prefix_terms import Configured, Running


@dataclass(frozen=True, slots=True)
class Row:
    """A prefix: times in seconds since 1970 (0: never), `chars` of its text, `tokens` (0: unknown).

    `bytes` are its file's. `state` is a value of `State`, `reason` says why it is no better; `effective` None: unknown.
    """

    name: str
    model: str
    source: str
    created_at: float
    modified_at: float
    used_at: float
    chars: int
    tokens: int
    bytes: int
    state: str
    reason: str
    restores: int
    tokens_reused: int
    effective: bool | None


def row_of(entry: Entry, record: Record | None, table: Table, style: Style) -> Row:
    """A lead of the model that runs."""
    state, reason = table.state(entry, style)
    return Row(
        name=entry.name,
        model=entry.model,
        source=entry.source.value,
        created_at=record.created_at if record else 0.0,
        modified_at=record.modified_at if record else 0.0,
        used_at=record.used_at if record else 0.0,
        chars=entry.lead.chars,
        tokens=entry.tokens,
        bytes=entry.size,
        state=state.value,
        reason=reason,
        restores=entry.restores,
        tokens_reused=entry.tokens_reused,
        effective=table.effective(entry, style),
    )


def rows_of(
    shelved: Shelved, configured: Sequence[Configured], running: Running | None, here: Table | None, style: Style
) -> list[Row]:
    """All there is, by model and name: of the model that runs, kept for other models, and configured for them."""
    rows = [row_of(entry, shelved.find(here.fingerprint, entry), here, style) for entry in here] if here else []
    elsewhere = [one for one in shelved if here is None or one.fingerprint != here.fingerprint.hex()]
    rows += [row_of_record(record) for record in elsewhere]
    waiting = [one for one in configured if running is None or not running.is_model(one.model)]
    rows += [row_of_waiting(one, "its model is not loaded") for one in waiting]
    # Of rows of one name, the first tells more.
    known = {(row.model, row.name): row for row in reversed(rows)}
    return [known[names] for names in sorted(known)]


def row_of_record(record: Record) -> Row:
    """One that was made for a model which does not run now."""
    return Row(
        name=record.cache_name,
        model=record.model_name,
        source=str(record.source),
        created_at=record.created_at,
        modified_at=record.modified_at,
        used_at=record.used_at,
        chars=record.content_length,
        tokens=record.tokens,
        bytes=record.bytes,
        state=State.SEEDED.value if record.file else State.WANTED.value,
        reason="it was made by a model, or for settings, that the upstream does not run now",
        restores=0,
        tokens_reused=0,
        effective=record.effective,
    )


def row_of_waiting(configured: Configured, reason: str) -> Row:
    """One whose model does not run now, and never did."""
    return Row(
        name=configured.name,
        model=configured.model,
        source=Source.CONFIG.value,
        created_at=0.0,
        modified_at=0.0,
        used_at=0.0,
        chars=configured.lead.chars,
        tokens=0,
        bytes=0,
        state=State.WANTED.value,
        reason=reason,
        restores=0,
        tokens_reused=0,
        effective=None,
    )


def readiness(
    configured: Sequence[Configured], running: Running | None, table: Table | None, style: Style, left_s: float
) -> tuple[bool, str]:
    """Whether what is configured needs no more waiting for, of which `left_s` seconds are left, and how it is."""
    if not configured:
        return True, "no prefixes are configured"
    if running is None or table is None:
        return left_s <= 0, "prefixes are not seeded: the upstream does not show what it runs"
    if style is Style.NONE:
        return True, "prefixes are not seeded: this kind of server cannot be"
    shown = {_label(one): _shown(one, running, table, style) for one in configured}
    open_ones = sorted(name for name, (state, _) in shown.items() if state in (State.WANTED, State.SEEDING))
    if open_ones and left_s > 0:
        return False, f"prefixes are being seeded: {', '.join(_with_reasons(open_ones, shown))} to come"
    done = sum(state in (State.SEEDED, State.WARM) for state, _ in shown.values())
    missing = sorted(name for name, (state, _) in shown.items() if state not in (State.SEEDED, State.WARM))
    told = f"{done} of {len(shown)} prefixes are seeded"
    return True, f"{told}; not {', '.join(_with_reasons(missing, shown))}" if missing else told


def _shown(one: Configured, running: Running, table: Table, style: Style) -> tuple[State, str]:
    if not running.is_model(one.model):
        return State.FAILED, f"model {one.model} is not loaded"
    entry = table.entries.get(one.lead.id)
    return (State.WANTED, "") if entry is None else table.state(entry, style)


def _label(one: Configured) -> str:
    return f"{one.model}/{one.name}" if one.model else one.name


def _with_reasons(names: Iterable[str], shown: dict[str, tuple[State, str]]) -> list[str]:
    return [f"{name} ({shown[name][1]})" if shown[name][1] else name for name in names]
