"""Whoever watches an evaluation in tests."""

from __future__ import annotations


class Watched:
    """Remembers what began, how many steps were promised, and how many came."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def begin(self, what: str, steps: int) -> None:
        self.seen.append((what, steps, 0))

    def step(self) -> None:
        what, steps, done = self.seen[-1]
        self.seen[-1] = (what, steps, done + 1)
