"""An evaluation from files to figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from proxy.cache.near.matcher import Matcher, load
from proxy.evaluate.errors import EvaluationError
from proxy.evaluate.forms import Form, Outcome, Tick, pair_form, replay_form, trace_form
from proxy.evaluate.rows import Rows, read
from proxy.evaluate.tally import Show, Tally
from storage.base import StorageError

__all__ = ["EvaluationError", "Form", "Options", "Progress", "Report", "SetReport", "Show", "evaluate"]


@dataclass(frozen=True, slots=True)
class Options:
    """What to do: `threshold` is the least similarity of what the guard is shown, `form` None for all that fit."""

    threshold: float = 0.6
    form: Form | None = None
    show: Show | None = None


class Progress(Protocol):
    """Whoever watches an evaluation."""

    def begin(self, what: str, steps: int) -> None:
        """Something begins that takes so many steps; what began before has ended. 0: nobody knows how many."""
        ...

    def step(self) -> None:
        """One step is done."""
        ...


@dataclass(frozen=True, slots=True)
class SetReport:
    """The figures of one file in one form."""

    file: str
    form: Form
    tally: Tally

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"file": self.file, "form": self.form.value, **self.tally.as_json()}


@dataclass(frozen=True, slots=True)
class Report:
    """All figures, and what they were measured with."""

    options: Options
    scheme: int
    description: str
    sets: tuple[SetReport, ...]

    @property
    def false_hits(self) -> int:
        """Those of all sets together."""
        return sum(one.tally.all.false_hits for one in self.sets)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        policy = {
            "threshold": self.options.threshold,
            "scheme": self.scheme,
            "description": self.description,
            "form": self.options.form.value if self.options.form else None,
        }
        return {"policy": policy, "sets": [one.as_json() for one in self.sets]}


def evaluate(
    files: Sequence[Path], options: Options, progress: Progress, *, loading: Callable[[], Matcher] = load
) -> Report:
    """Replay the rows of all files through the code that serves.

    Raises:
        EvaluationError: a file is not understood, or has no rows of the form asked for while no other has.
    """
    progress.begin("reading", len(files))
    jobs: list[_Job] = []
    for file in files:
        jobs += _jobs(file, options.form)
        progress.step()
    if not jobs:
        raise EvaluationError(f"no rows to evaluate in the form {options.form}")
    progress.begin("loading dictionaries", 0)
    matcher = loading()
    try:
        sets = asyncio.run(_run(jobs, options, matcher, progress))
    except StorageError as error:
        raise EvaluationError(f"the store in memory failed: {error}") from error
    return Report(options, matcher.scheme, matcher.description, sets)


@dataclass(frozen=True, slots=True)
class _Job:
    file: Path
    form: Form
    rows: Rows

    @property
    def steps(self) -> int:
        if self.form is Form.TRACE:
            return len(self.rows.log)
        entries = {pair.a.digest for pair in self.rows.pairs} if self.form is Form.REPLAY else set()
        return len(entries) + len(self.rows.pairs)

    def outcomes(self, matcher: Matcher, threshold: float, tick: Tick) -> AsyncIterator[Outcome]:
        match self.form:
            case Form.PAIR:
                return pair_form(self.rows.pairs, matcher, threshold, tick)
            case Form.REPLAY:
                return replay_form(self.rows.pairs, matcher, threshold, tick)
            case Form.TRACE:
                return trace_form(self.rows.log, matcher, threshold, tick)


def _jobs(file: Path, only: Form | None) -> list[_Job]:
    rows = read(file)
    fitting = [*((Form.PAIR, Form.REPLAY) if rows.pairs else ()), *((Form.TRACE,) if rows.log else ())]
    return [_Job(file, form, rows) for form in fitting if only in (None, form)]


async def _run(jobs: Sequence[_Job], options: Options, matcher: Matcher, progress: Progress) -> tuple[SetReport, ...]:
    sets: list[SetReport] = []
    for job in jobs:
        progress.begin(f"{job.file.name}, {job.form}", job.steps)
        tally = Tally(options.show)
        async for outcome in job.outcomes(matcher, options.threshold, progress.step):
            tally.add(outcome)
        sets.append(SetReport(str(job.file), job.form, tally))
    return tuple(sets)
