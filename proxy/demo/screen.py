"""All that the demo prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from proxy.config import Settings
from proxy.demo.totals import Row, Totals
from proxy.demo.workload import Ask

_COLUMNS = (("#", 3), ("form", 14), ("outcome", 8), ("first token", 11), ("total", 9))
_GAPS = 12
_QUESTION_WIDTHS = (16, 52)
_LEFT = frozenset({"form", "outcome"})


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
        self._line([Text(name, "bold") for name in ("#", "request", *(name for name, _ in _COLUMNS[1:]))])

    def asking(self, done: int, total: int, ask: Ask) -> None:
        """Say which request is under way. Rows alone tell it where there is no terminal."""
        text = f"asking {done + 1}/{total} ({ask.form})"
        self._progress.update(self._task, description=text, completed=done, total=total)

    def row(self, row: Row) -> None:
        """Print how a request went."""
        style = "green" if row.is_hit else "yellow" if row.outcome == "MISS" else "red"
        self._line(
            [
                Text(str(row.number), "dim"),
                Text(row.question),
                Text(row.form, "dim"),
                Text(row.outcome, f"bold {style}"),
                Text(duration(row.first_token_ms)),
                Text(duration(row.total_ms), style),
            ]
        )

    def totals(self, totals: Totals) -> None:
        """Print the sums."""
        table = Table.grid(padding=(0, 3))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim")
        table.add_row("requests", str(totals.requests), f"{totals.hits} hits, {totals.misses} misses")
        table.add_row("time spent", duration(totals.spent_ms))
        table.add_row(
            "without the cache",
            duration(totals.without_cache_ms),
            "a hit counted with the time measured for the miss of the same question",
        )
        table.add_row(
            Text("saved", "bold green"),
            Text(duration(totals.saved_ms), "bold green"),
            f"{totals.saved_percent:.0f} % of the latency",
        )
        if totals.median_hit_ms and totals.median_miss_ms:
            table.add_row("median miss", duration(totals.median_miss_ms))
            factor = totals.median_miss_ms / totals.median_hit_ms
            table.add_row("median hit", duration(totals.median_hit_ms), f"{factor:.0f} times as fast")
        self._console.print()
        self._console.print(table)

    def farewell(self) -> None:
        """Print what to do next."""
        settings = Settings()
        listen = settings.listen
        print_ = self._console.print
        print_("\nNow with your own server:\n", highlight=False)
        print_(f"  nearhit serve --upstream {settings.upstream.url}\n", style="bold", highlight=False, soft_wrap=True)
        print_(
            f"and in your application change base_url to http://{listen.host}:{listen.port}/v1, nothing else.",
            highlight=False,
            soft_wrap=True,
        )

    def _line(self, cells: list[Text]) -> None:
        # A table of one row each, all of the same widths: rows appear at once, however high the terminal is.
        number, *others = _COLUMNS
        free = self._console.width - sum(width for _, width in _COLUMNS) - _GAPS
        table = Table.grid(padding=(0, 2))
        for name, width in (number, ("request", max(_QUESTION_WIDTHS[0], min(free, _QUESTION_WIDTHS[1]))), *others):
            right = name not in _LEFT and name != "request"
            table.add_column(width=width, no_wrap=True, justify="right" if right else "left", overflow="ellipsis")
        table.add_row(*cells)
        self._console.print(table)


def duration(ms: float) -> str:
    """A time for people: 1.24 s, 843 ms, 2.1 ms."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"
