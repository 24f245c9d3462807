"""When to ask again what was not answered in time. Pure."""

from __future__ import annotations

from collections.abc import Callable


class Silence:
    """Counts what was not answered: after `patience` times in a row nothing is asked for `pause_s` seconds.

    The pause doubles with each further time, up to `longest_s`. An answer ends it all.
    """

    def __init__(
        self, clock: Callable[[], float], *, patience: int = 2, pause_s: float = 30.0, longest_s: float = 600.0
    ) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._patience = patience
        self._pause_s = pause_s
        self._longest_s = longest_s
        self.answered()

    @property
    def lasts(self) -> bool:
        """Whether it is too early to ask again."""
        return self._clock() < self._until

    def answered(self) -> None:
        """There was an answer."""
        self._unanswered, self._next_s, self._until = 0, self._pause_s, float("-inf")

    def unanswered(self) -> None:
        """There was none in time. Several that were asked at once count once they have begun a pause."""
        self._unanswered += 1
        if self._unanswered < self._patience or self.lasts:
            return
        self._until = self._clock() + self._next_s
        self._next_s = min(self._longest_s, 2 * self._next_s)
