"""The CORS header fields that the upstream gives for an Origin, so that an answer from the cache carries the same."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping

_KEPT_S = 300.0
_SILENT_S = 5.0
_REMEMBERED = 1024

AskUpstream = Callable[[], Awaitable[Mapping[str, str] | None]]
"""The header fields of some answer to the Origin in question; None where the upstream gave none."""


class CorsMemory:
    """Learns from answers that pass; asks the upstream about an Origin that is new."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: OrderedDict[str, tuple[float, dict[str, str]]] = OrderedDict()

    def learn(self, origin: str, headers: Mapping[str, str]) -> None:
        """Take what an answer to this Origin carried."""
        kept = {name: value for name, value in headers.items() if name.lower().startswith("access-control-")}
        self._keep(origin, kept, _KEPT_S)

    async def fields(self, origin: str, ask: AskUpstream) -> dict[str, str]:
        """What an answer to this Origin should carry; what was known last where the upstream does not tell."""
        until, kept = self._known.get(origin, (0.0, {}))
        if time.monotonic() >= until:
            headers = await ask()
            if headers is not None:
                self.learn(origin, headers)
                return self._known[origin][1]
            self._keep(origin, kept, _SILENT_S)
        return kept

    def _keep(self, origin: str, kept: dict[str, str], seconds: float) -> None:
        self._known.pop(origin, None)
        self._known[origin] = (time.monotonic() + seconds, kept)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
