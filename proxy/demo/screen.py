"""All that the demo prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from proxy.demo.totals import Row, Totals
from proxy.demo.workload import Ask
from proxy.settings import Settings

_COLUMNS: tuple[tuple[str, int, JustifyMethod], ...] = (
    ("#", 2, "right"),
    ("request", 0, "left"),
    ("form", 6, "left"),
    ("outcome", 7, "left"),
    ("first token", 11, "right"),
    ("total", 7, "right"),
)
"""Names, widths (0 takes what is left) and sides."""
_GAP = 2
_QUESTION_WIDTHS = (16, 60)


class Screen:
    """Rows as they come above one line that says what is going on; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    @contextmanager
    def working(self) -> Iterator[None]:
        """The line that says what is going on is there in this block."""
        with self._progress:
            yield

    def doing(self, what: str) -> None:
        """Say what is going on."""
        self._progress.update(self._task, description=what)
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", highlight=False)

    def tell(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, highlight=False, markup=False, style="dim", soft_wrap=True)

    def heading(self) -> None:
        """Print the names of the columns."""
        self._console.print()
        self._line(*(Text(name, "bold") for name, _, _ in _COLUMNS))

    def asking(self, done: int, total: int, ask: Ask) -> None:
        """Say which request is under way. Rows alone tell it where there is no terminal."""
        text = f"asking {done + 1}/{total} ({ask.form})"
        self._progress.update(self._task, description=text, completed=done, total=total)

    def row(self, row: Row) -> None:
        """Print how a request went."""
        style = "green" if row.is_hit else "yellow" if row.outcome == "MISS" else "red"
        self._line(
            Text(str(row.number), "dim"),
            Text.assemble((f"turn {row.turn}: " if row.turn > 1 else "", "dim"), row.question),
            Text(row.form, "dim"),
            Text(row.outcome, f"bold {style}"),
            Text(duration(row.first_token_ms)),
            Text(duration(row.total_ms), style),
        )

    def totals(self, totals: Totals) -> None:
        """Print the sums."""
        table = Table.grid(padding=(0, 3))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        table.add_row("requests", str(totals.requests), f"{totals.hits} hits, {totals.misses} misses")
        table.add_row("time spent", duration(totals.spent_ms))
        table.add_row("without the cache*", duration(totals.without_cache_ms))
        saved = f"{totals.saved_percent:.0f} % of the latency"
        table.add_row("saved", Text(duration(totals.saved_ms)), saved, style="bold green")
        if totals.median_hit_ms and totals.median_miss_ms:
            table.add_row("median miss", duration(totals.median_miss_ms))
            factor = totals.median_miss_ms / totals.median_hit_ms
            table.add_row("median hit", duration(totals.median_hit_ms), f"{factor:.0f} times as fast")
        self._console.print()
        self._console.print(table)
        self.tell("* a hit counts with the time measured for the miss of the same question")

    def farewell(self) -> None:
        """Print what to do next."""
        settings = Settings()
        listen = settings.listen
        lines = Text.assemble(
            "\nNow with your own server:\n\n",
            (f"  nearhit serve --upstream {settings.upstream.url}\n\n", "bold"),
            f"and in your application change base_url to http://{listen.host}:{listen.port}/v1, nothing else.",
        )
        self._console.print(lines, soft_wrap=True)

    def _line(self, *cells: Text) -> None:
        # A table of one row each, all of the same widths: rows appear at once, however high the terminal is.
        free = self._console.width - sum(width for _, width, _ in _COLUMNS) - _GAP * (len(_COLUMNS) - 1)
        table = Table.grid(padding=(0, _GAP))
        for _, width, justify in _COLUMNS:
            fitting = width or max(_QUESTION_WIDTHS[0], min(free, _QUESTION_WIDTHS[1]))
            table.add_column(width=fitting, no_wrap=True, justify=justify, overflow="ellipsis")
        table.add_row(*cells)
        self._console.print(table)


def duration(ms: float) -> str:
    """A time for people: 1.24 s, 843 ms, 2.1 ms."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
