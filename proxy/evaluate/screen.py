"""All that an evaluation prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from proxy.evaluate.run import Report, SetReport, Show
from proxy.evaluate.tally import Case, Counts

_COLUMNS: tuple[tuple[str, JustifyMethod], ...] = (
    ("file", "left"),
    ("form", "left"),
    ("look-ups", "right"),
    ("possible", "right"),
    ("hits", "right"),
    ("recall", "right"),
    ("false", "right"),
    ("per hit", "right"),
    ("95 %", "right"),
    ("p50", "right"),
    ("p99", "right"),
)
_WORST_KINDS = 8
_REFRESH = 64
_SHOWN_CHARACTERS = 240
_BEFORE_DIFFERENCE = 80
_WIDE = 10_000


class Watching:
    """One line on what is going on; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        """`console` is the one that progress goes to, usually stderr."""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._done = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """The line is there in this block."""
        with self._progress:
            yield

    def begin(self, what: str, steps: int) -> None:
        """See `proxy.evaluate.run.Progress`."""
        self._done = 0
        self._progress.reset(self._task, description=printable(what), total=steps or None)

    def step(self) -> None:
        """See `proxy.evaluate.run.Progress`."""
        self._done += 1
        if self._done % _REFRESH == 0:
            self._progress.update(self._task, completed=self._done)


def render(report: Report, console: Console) -> None:
    """Print the figures, and the cases that were asked for."""
    for one in report.sets:
        _cases(one, report.options.show, console)
    _tell(console, "")
    _print_whole(_table(report), console)
    kinds = _kinds_table(report)
    if kinds is not None:
        _tell(console, "\nwhere false hits are")
        _print_whole(kinds, console)
    _tell(console, _LEGEND, style="dim")


_LEGEND = (
    "\npossible: look-ups for which some entry's answer was right; recall: right hits of these. "
    "95 %: upper end of the interval of false hits per hit. p50, p99: microseconds of a near look-up."
)


def printable(text: str) -> str:
    """The text with everything escaped that a terminal may take for more than text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _table(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, side in _COLUMNS:
        table.add_column(name, justify=side)
    for one in report.sets:
        table.add_row(*_row(one))
    return table


def _print_whole(table: Table, console: Console) -> None:
    # Figures that are cut tell nothing: where the terminal is too narrow, lines go on below.
    table.width = console.measure(table, options=console.options.update(max_width=_WIDE)).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


def _row(one: SetReport) -> list[Text]:
    figures, counts = one.tally.as_json(), one.tally.all
    cells = (
        printable(Path(one.file).stem),
        one.form.value,
        f"{counts.lookups}",
        percent(figures["possible_hit_rate"], 1),
        f"{counts.hits} ({percent(figures['hit_rate'], 1)})",
        percent(figures["recall"], 1),
        f"{counts.false_hits}",
        percent(figures["false_per_hit"], 2),
        percent(figures["false_per_hit_upper95"], 2),
        _us(figures["us_per_lookup_p50"]),
        _us(figures["us_per_lookup_p99"]),
    )
    style = "red" if counts.false_hits else ""
    return [Text(cell, style if name == "false" else "") for (name, _), cell in zip(_COLUMNS, cells, strict=True)]


def _kinds_table(report: Report) -> Table | None:
    worst = [(one, kind, counts) for one in report.sets for kind, counts in _worst_kinds(one)]
    if not worst:
        return None
    table = Table("file", "form", "kind", box=None, header_style="bold", pad_edge=False)
    for name in ("look-ups", "hits", "false"):
        table.add_column(name, justify="right")
    for one, kind, counts in worst:
        file = printable(Path(one.file).stem)
        figures = map(str, (counts.lookups, counts.hits, counts.false_hits))
        table.add_row(*map(Text, (file, one.form.value, printable(kind), *figures)))
    return table


def _worst_kinds(one: SetReport) -> list[tuple[str, Counts]]:
    found = [(kind, counts) for kind, counts in one.tally.by_kind.items() if counts.false_hits]
    return sorted(found, key=lambda item: -item[1].false_hits)[:_WORST_KINDS]


def _cases(one: SetReport, show: Show | None, console: Console) -> None:
    if show is None or not one.tally.cases:
        return
    what = "false hits" if show is Show.FALSE else "missed"
    _tell(console, f"\n{printable(one.file)}, {one.form}: {what}", style="bold")
    for case in one.tally.cases:
        _tell(console, _case(case))
    if one.tally.cases_left_out:
        _tell(console, f"  ... and {one.tally.cases_left_out} more")


def _case(case: Case) -> Text:
    stored, asked = _around_difference(case.stored, case.asked)
    score = "" if case.score is None else f"  score {case.score:.2f}"
    kind = f"  {printable(case.kind)}" if case.kind else ""
    tier = f" by {case.tier}" if case.tier not in (None, case.rule) else ""
    lines = Text.assemble(
        (f"  line {case.line}{kind}  ", "dim"),
        (f"{case.rule}{tier}", "yellow"),
        (f"{score}\n", "dim"),
        ("    stored  ", "dim"),
        f"{printable(stored)}\n",
        ("    asked   ", "dim"),
        f"{printable(asked)}\n",
    )
    for left, right in case.differences:
        lines.append("    differ  ", "dim")
        lines.append(_shortened(left) or "-", "red")
        lines.append(" | ", "dim")
        lines.append((_shortened(right) or "-") + "\n", "green")
    return lines


def _around_difference(stored: str, asked: str) -> tuple[str, str]:
    """Both texts from a little before they differ, where they are long."""
    differ = next((at for at, (a, b) in enumerate(zip(stored, asked, strict=False)) if a != b), 0)
    long = max(len(stored), len(asked)) > _SHOWN_CHARACTERS
    begin = max(0, differ - _BEFORE_DIFFERENCE) if long else 0
    return _cut(stored, begin), _cut(asked, begin)


def _cut(text: str, begin: int) -> str:
    end = begin + _SHOWN_CHARACTERS
    return ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")


def _shortened(text: str) -> str:
    return printable(_cut(text, 0))


def percent(share: float | None, digits: int) -> str:
    """A share for people."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _tell(console: Console, text: str | Text, style: str = "") -> None:
    line = text if isinstance(text, Text) else Text(text, style)
    console.print(line, soft_wrap=True)
