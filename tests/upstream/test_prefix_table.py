"""What is done next about leads, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.upstream.effect import EFFECTIVE
from proxy.upstream.prefix import Evidence, Hitch, Readied, Ready, Seeded, Style, lead_of_prompt
from proxy.upstream.prefix_table import Entry, Job, Source, State, Table, Work

LEADS = [lead_of_prompt(f"You are number {number}. " * 20) for number in range(5)]


def table_of(*sources: Source) -> Table:
    table = Table(b"\1" * 32, keeps_files=True, keeps_learned=True, retry_s=1.0)
    for lead, source in zip(LEADS, sources, strict=False):
        table.entries[lead.id] = Entry(lead, f"{source}-{lead.id.hex()[:4]}", "small", source)
    return table


def seeded(file: str = "f") -> Seeded:
    return Seeded(100, b"", file, 1000 if file else 0, 1.0)


def job_of(table: Table, style: Style = Style.FILE, now: float = 0.0) -> Job:
    job = table.next_job(style, now)
    assert job is not None
    return job


def test_what_somebody_asked_for_comes_first_and_then_what_is_called_most() -> None:
    table = table_of(Source.LEARNED, Source.LEARNED, Source.API, Source.CONFIG)
    often = table.entries[LEADS[1].id]
    table.called(often)
    done = []
    while (job := table.next_job(Style.FILE, 0.0)) is not None:
        done.append(job.entry)
        table.seeded(job.entry, seeded(), Style.FILE, 0.0)
    assert [entry.source for entry in done] == [Source.CONFIG, Source.API, Source.LEARNED, Source.LEARNED]
    assert done[2] is often


def test_each_pause_is_twice_as_long_as_the_last() -> None:
    table = table_of(Source.CONFIG)
    entry = table.entries[LEADS[0].id]
    pauses, now = [], 0.0
    for _ in range(12):
        table.failed(entry, Hitch.BUSY, now)
        pauses.append(entry.not_before - now)
        assert table.next_job(Style.FILE, now) is None
        now = entry.not_before
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert pauses[-1] == 600.0
    assert job_of(table, now=now).entry is entry


def test_six_failures_in_a_row_unmake_what_was_proved() -> None:
    table = table_of(Source.CONFIG)
    entry = table.entries[LEADS[0].id]
    table.seeded(entry, seeded(), Style.FILE, 0.0)
    restored = Ready(Readied.RESTORED)
    table.answered(entry, restored, Evidence(100, 10), Style.FILE)
    assert table.keeping_helps is True
    for _ in range(6):
        assert table.usable(entry, Style.FILE) is not None
        table.answered(entry, restored, Evidence(3, 107), Style.FILE)
    assert table.keeping_helps is False
    assert table.usable(entry, Style.FILE) is None


@pytest.mark.parametrize(
    ("restores", "stopped"),
    [
        ([Ready(Readied.RESTORED, 1.5)] * 2, True),
        ([Ready(Readied.RESTORED, 1.5), Ready(Readied.RESTORED, 0.5), Ready(Readied.RESTORED, 1.5)], False),
        ([Ready(Readied.RESTORED, 1.5), Ready(Readied.RESIDENT, 0.5), Ready(Readied.RESTORED, 1.5)], True),
        ([Ready(Readied.SKIPPED, 5.0)] * 2, True),
        ([Ready(Readied.SKIPPED, 5.0), Ready(Readied.RESTORED, 1.5)], True),
        ([Ready(Readied.SKIPPED, 1.0)] * 9, False),
        ([Ready(Readied.RESTORED, 0.9)] * 9, False),
    ],
)
def test_restoring_that_takes_longer_than_computing_twice_in_a_row_ends(restores: list[Ready], stopped: bool) -> None:
    table = table_of(Source.CONFIG, Source.CONFIG)
    entry, other = table
    table.seeded(entry, seeded(), Style.FILE, 0.0)
    told = [table.restore_took(entry, ready, 15.0) for ready in restores]
    assert told == [False] * (len(restores) - 1) + [stopped]
    assert (table.usable(entry, Style.FILE) is None) == stopped
    assert table.todo(other, Style.FILE) is Work.SEED
    if stopped:
        assert table.state(entry, Style.FILE) == (
            State.INEFFECTIVE,
            "restoring it takes longer than computing it",
        )
        assert table.effective(entry, Style.FILE) is False


def test_restoring_at_once_is_never_too_slow() -> None:
    table = table_of(Source.CONFIG, Source.CONFIG)
    fast, unknown = table
    table.seeded(fast, replace(seeded(), seconds=0.01), Style.FILE, 0.0)
    table.seeded(unknown, replace(seeded(), seconds=0.0), Style.FILE, 0.0)
    assert not any(table.restore_took(fast, Ready(Readied.RESTORED, 0.05), 15.0) for _ in range(5))
    assert not any(table.restore_took(unknown, Ready(Readied.RESTORED, 9.0), 15.0) for _ in range(5))


def test_what_a_slot_held_anyway_says_nothing_about_files() -> None:
    table = table_of(Source.CONFIG)
    entry = table.entries[LEADS[0].id]
    table.seeded(entry, seeded(), Style.FILE, 0.0)
    for _ in range(5):
        table.answered(entry, Ready(Readied.RESIDENT), Evidence(0, 110), Style.FILE)
    assert table.keeping_helps is None


def test_learned_warm_ups_that_nobody_used_are_not_repeated_after_a_restart() -> None:
    table = table_of(Source.LEARNED, Source.CONFIG)
    learned, configured = table
    for entry in (learned, configured):
        table.seeded(entry, seeded(""), Style.WARM, 0.0)
    table.restarted()
    assert job_of(table, Style.WARM).entry is configured
    table.seeded(configured, seeded(""), Style.WARM, 0.0)
    assert table.next_job(Style.WARM, 0.0) is None
    table.called(learned)
    assert job_of(table, Style.WARM).entry is learned


def test_a_silent_server_is_measured_once_and_one_that_tells_is_not() -> None:
    table = table_of(Source.CONFIG)
    entry = table.entries[LEADS[0].id]
    table.seeded(entry, seeded(""), Style.WARM, 0.0)
    table.called(entry)
    table.answered(entry, Ready(Readied.NOTHING), Evidence(), Style.WARM)
    assert job_of(table, Style.WARM).work is Work.PROVE
    table.proved(entry, Style.WARM, None, 0.0)
    assert table.next_job(Style.WARM, 0.0) is None
    table.proved(entry, Style.WARM, False, 0.0)
    assert table.state(entry, Style.WARM)[0] is State.INEFFECTIVE


def test_a_measurement_that_never_succeeds_ends_without_a_lasting_verdict() -> None:
    table = table_of(Source.CONFIG, Source.CONFIG)
    entry = next(iter(table))
    table.seeded(entry, seeded(), Style.NAMED, 0.0)
    now = 0.0
    for _ in range(3):
        job = job_of(table, Style.NAMED, now)
        assert (job.work, job.entry) == (Work.PROVE, entry)
        table.proved(entry, Style.NAMED, None, now)
        now = entry.not_before
    assert table.next_job(Style.NAMED, now) is None
    assert table.keeping_helps is None
    state, reason = table.state(entry, Style.NAMED)
    assert (state, reason) == (State.INEFFECTIVE, "it could not be measured whether it helps")


def test_one_named_cache_that_does_not_help_is_left_alone_where_others_do() -> None:
    table = table_of(Source.CONFIG, Source.CONFIG)
    first, second = table
    table.kept = EFFECTIVE
    for entry, helps in ((first, True), (second, False)):
        table.seeded(entry, seeded(), Style.NAMED, 0.0)
        table.proved(entry, Style.NAMED, helps, 0.0)
    assert table.usable(first, Style.NAMED) is not None
    assert table.usable(second, Style.NAMED) is None
    assert table.state(second, Style.NAMED)[0] is State.FAILED


@pytest.mark.parametrize("style", list(Style))
def test_every_state_but_the_good_ones_has_a_reason_or_is_open(style: Style) -> None:
    for keeps_learned in (True, False):
        table = Table(b"\1" * 32, keeps_files=True, keeps_learned=keeps_learned, retry_s=1.0)
        entry = table.entries[LEADS[0].id] = Entry(LEADS[0], "a", "small", Source.LEARNED)
        state, reason = table.state(entry, style)
        assert reason or state is State.WANTED


class Tables(RuleBasedStateMachine):
    """Anything may happen to leads, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table_of(Source.CONFIG, Source.API, Source.LEARNED, Source.LEARNED)
        self.now = 0.0
        self.style = Style.FILE

    def entry(self, number: int) -> Entry:
        return list(self.table)[number % 4]

    @rule(style=st.sampled_from(list(Style)))
    def becomes(self, style: Style) -> None:
        self.style = style

    @rule(seconds=st.floats(0, 700))
    def passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.table.next_job(self.style, self.now) is not None)
    @rule(
        outcome=st.sampled_from([*Hitch, "file", "nothing", "preempted", "long"]),
        effect=st.sampled_from([True, False, None]),
    )
    def works(self, outcome: Hitch | str, effect: bool | None) -> None:
        job = job_of(self.table, self.style, self.now)
        entry = job.entry
        assert not entry.stopped
        assert entry.not_before <= self.now
        if job.work is Work.PROVE:
            assert entry.file or entry.warm
            self.table.proved(entry, self.style, effect, self.now)
        elif isinstance(outcome, Hitch):
            self.table.failed(entry, outcome, self.now)
        elif outcome == "preempted":
            self.table.preempted(entry, self.now)
        elif outcome == "long":
            self.table.took_too_long(entry, 9.0, self.now)
        else:
            self.table.seeded(entry, seeded("f" if outcome == "file" else ""), self.style, self.now)

    @rule(number=st.integers(0, 3), how=st.sampled_from(list(Readied)), cached=st.sampled_from([None, 0, 100]))
    def calls(self, number: int, how: Readied, cached: int | None) -> None:
        entry = self.entry(number)
        self.table.called(entry)
        if how is Readied.REFUSED and self.table.usable(entry, self.style):
            self.table.file_refused(entry)
        tokens = self.table.answered(entry, Ready(how), Evidence(cached, cached), self.style)
        assert 0 <= tokens <= (cached or 0)

    @rule()
    def restarts(self) -> None:
        self.table.restarted()

    @invariant()
    def what_is_used_was_proved_or_tells(self) -> None:
        for entry in self.table:
            kept = self.table.usable(entry, self.style)
            assert kept is None or (entry.file and not entry.stopped)
            assert kept is None or self.style is Style.FILE or entry.proved
            assert self.table.kept.helps is not False or kept is None

    @invariant()
    def a_reason_is_shown(self) -> None:
        for entry in self.table:
            state, reason = self.table.state(entry, self.style)
            assert reason or state not in (State.FAILED, State.INEFFECTIVE)

    @invariant()
    def the_next_job_is_due_when_it_is_said_to_be(self) -> None:
        job, due = self.table.next_job(self.style, self.now), self.table.next_at(self.style)
        assert (job is not None) == (due is not None and due <= self.now)


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_whatever_a_server_does_seeding_comes_to_an_end() -> None:
    for hitch in (Hitch.REFUSED, Hitch.TOO_SHORT, Hitch.UNSUPPORTED):
        table = table_of(Source.CONFIG, Source.LEARNED)
        now, jobs = 0.0, 0
        while (job := table.next_job(Style.FILE, now)) is not None:
            table.failed(job.entry, hitch, now)
            now, jobs = now + 1000.0, jobs + 1
        assert jobs <= 4
