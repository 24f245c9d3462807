"""What `nearhit warm` does with a file of questions, and what it tells of it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO

import click

from proxy.ask import AskError, ask, base_url
from proxy.commands.options import EXIT_CONFIG, EXIT_FAILED, stop
from proxy.commands.progress import progress_line
from proxy.settings import Settings
from proxy.telling import clean
from proxy.transfer_files import numbered_lines
from proxy.warming.asking import Asker, Outcomes, Target
from proxy.warming.questions import Form, Kind, Question, Unusable, kind_of, read_questions

_INTERRUPTED = 130
_LONGEST_FIRST_LINE = 64 * 1024 * 1024
_KEPT = 100
_SHOWN = 10
_EXAMPLES = 3
_SHOWN_CHARACTERS = 400


def kind_found(file: BinaryIO) -> Kind:
    """What the file looks like; it is at its beginning again afterwards."""
    kind = kind_of(numbered_lines(file, _LONGEST_FIRST_LINE))
    file.seek(0)
    return kind


@dataclass(slots=True)
class _Survey:
    questions: int = 0
    bad_count: int = 0
    bad: list[Unusable] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"bad_count": self.bad_count, "bad": _listed(self.bad)}


class Run:
    """One file of questions, called `name`."""

    def __init__(self, settings: Settings, url: str | None, name: str, file: BinaryIO, kind: Kind, form: Form) -> None:
        """`form` is what goes along with plain prompts."""
        self._settings = settings
        self._url = url
        self._name = name
        self._file = file
        self._kind = kind
        self._form = form

    def tell_only(self, *, as_json: bool) -> None:
        """Tell what would be asked. Exits with 1 if a line is no question."""
        survey = self._survey()
        first = [
            {"line": one.line, "url": one.target, "body": json.loads(one.body)}
            for one in islice(self._questions(), _EXAMPLES)
        ]
        if as_json:
            click.echo(json.dumps({"would_ask": survey.questions, **survey.as_json(), "first": first}, indent=2))
        else:
            click.echo(f"{survey.questions} questions would be asked{'; the first ones:' if first else ''}")
            for one in first:
                click.echo(f"  line {one['line']}: {one['url']} {json.dumps(one['body'])[:_SHOWN_CHARACTERS]}")
            _tell_bad(survey)
        if survey.bad_count:
            sys.exit(EXIT_FAILED)

    def ask(self, key: str, concurrency: int, give_up_s: float, *, as_json: bool) -> None:
        """Ask all questions and tell what became of them. Exits with 1 if one of them has no stored answer now."""
        try:
            # Nobody wants to wait for a nearhit that does not run.
            ask(self._settings, self._url, "/-/healthy")
            target = Target(base_url(self._settings, self._url), key, concurrency, give_up_s)
        except AskError as error:
            stop(str(error))
        survey, outcomes = self._survey(), Outcomes()
        started, interrupted = time.monotonic(), False
        try:
            self._ask_all(target, survey.questions, outcomes)
        except KeyboardInterrupt:
            interrupted = True
        except ExceptionGroup as group:
            if group.split(OSError)[1] is not None:
                raise
            stop(f"{self._name} cannot be read to its end", EXIT_CONFIG)
        seconds = round(time.monotonic() - started, 1)
        if as_json:
            click.echo(json.dumps(_told(survey, outcomes, seconds, interrupted=interrupted), indent=2))
        else:
            self._tell(survey, outcomes, seconds, interrupted=interrupted)
        if interrupted:
            sys.exit(_INTERRUPTED)
        if outcomes.stopped or outcomes.failed or outcomes.not_kept or survey.bad_count:
            sys.exit(EXIT_FAILED)

    def _ask_all(self, target: Target, total: int, outcomes: Outcomes) -> None:
        with progress_line("asking", total) as progress:

            async def run() -> None:
                await Asker(target, self._questions(), outcomes, lambda: progress.advance(1), progress.say).run()

            asyncio.run(run())

    def _tell(self, survey: _Survey, outcomes: Outcomes, seconds: float, *, interrupted: bool) -> None:
        click.echo(f"{outcomes.asked} asked, {outcomes.known} known already, in {seconds} s")
        for count, meaning in ((outcomes.failed, "failed"), (outcomes.not_kept, "answered, but not kept")):
            if count:
                click.echo(f"{count} {meaning}", err=True)
        for one in outcomes.trouble[:_SHOWN]:
            click.echo(f"line {one.line}: {clean(one.why)}", err=True)
        _tell_bad(survey)
        if interrupted or outcomes.stopped:
            what = "stopped" if interrupted else f"{outcomes.stopped} ({clean(outcomes.why)})"
            left = f"{survey.questions - outcomes.done} of {survey.questions} are left"
            click.echo(f"nearhit: {what}; {left}: the same command goes on, and skips what is known", err=True)
        elif self._kind is Kind.PROMPTS and self._form.model is None:
            click.echo("asked without a model: clients that name one will not find these; see --model", err=True)

    def _survey(self) -> _Survey:
        survey = _Survey()
        for one in self._read():
            if isinstance(one, Question):
                survey.questions += 1
                continue
            survey.bad_count += 1
            if len(survey.bad) < _KEPT:
                survey.bad.append(one)
        return survey

    def _questions(self) -> Iterator[Question]:
        return (one for one in self._read() if isinstance(one, Question))

    def _read(self) -> Iterator[Question | Unusable]:
        self._file.seek(0)
        return read_questions(
            numbered_lines(self._file, self._settings.limits.max_request_bytes), self._kind, self._form
        )


def _told(survey: _Survey, outcomes: Outcomes, seconds: float, *, interrupted: bool) -> dict[str, Any]:
    return {
        "questions": survey.questions,
        "asked": outcomes.asked,
        "known": outcomes.known,
        "not_kept": outcomes.not_kept,
        "failed": outcomes.failed,
        "left": survey.questions - outcomes.done,
        "trouble": _listed(outcomes.trouble),
        **survey.as_json(),
        "seconds": seconds,
        "stopped": "interrupted" if interrupted else outcomes.stopped,
    }


def _tell_bad(survey: _Survey) -> None:
    if survey.bad_count:
        click.echo(f"{survey.bad_count} lines are no questions", err=True)
    for one in survey.bad[:_SHOWN]:
        click.echo(f"line {one.line}: {one.why}", err=True)


def _listed(lines: list[Unusable]) -> list[dict[str, Any]]:
    return [{"line": one.line, "why": one.why} for one in lines]
