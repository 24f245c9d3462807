"""The last calls that the cache could not answer, kept in memory to tell what keeps calls apart."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.parts import Span, likeness, parts_of, spans

_REMEMBERED = 128
_LARGEST_BODY = 65_536
_LOOKED_AT = 20
_FEWEST = 5
_OFTEN = 0.8
"""Share of calls with a system prompt of their own from which it is a habit."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A call as it came; its parts are made only when somebody asks."""

    namespace: bytes
    space_digest: bytes
    model: str
    dialect: Dialect
    query: str
    headers: Mapping[str, str]
    body: bytes

    def parts(self) -> dict[str, str]:
        """See `parts_of`; none where the body is nested too deeply to be taken apart again."""
        try:
            return parts_of(self.dialect, self.query, self.headers, json.loads(self.body))
        except RecursionError:
            return {}


@dataclass(frozen=True, slots=True)
class Changing:
    """A system prompt that was another one in nearly all of the last `calls` for `model`; `span` differed last."""

    model: str
    calls: int
    span: Span


class RecentCalls:
    """A bounded list of calls, the newest last."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self._seen: deque[Seen] = deque(maxlen=_REMEMBERED)

    def note(
        self, call: Call, namespace: bytes, dialect: Dialect, query: str, headers: Mapping[str, str], body: bytes
    ) -> None:
        """A call went upstream because there was no answer to it. Its query may hold a key: only names are kept."""
        if len(body) <= _LARGEST_BODY:
            names = _names(query)
            self._seen.append(Seen(namespace, call.space_digest, call.model, dialect, names, headers, body))

    def nearest_elsewhere(self, call: Call, namespace: bytes, parts: Mapping[str, str]) -> list[Span]:
        """Where the call differs from the most similar recent one of its namespace in another space."""
        best: tuple[tuple[int, float], list[Span]] | None = None
        for seen in reversed(tuple(self._seen)):
            if seen.namespace != namespace or seen.space_digest == call.space_digest:
                continue
            theirs = seen.parts()
            rank = likeness(parts, theirs)
            if best is None or rank < best[0]:
                best = rank, spans(parts, theirs)
        return best[1] if best else []

    def changing_system(self) -> list[Changing]:
        """The models whose system prompt, mostly the same, was another one in every recent call."""
        by_model: dict[tuple[bytes, str], list[str]] = {}
        for seen in tuple(self._seen):
            system = seen.parts().get("system prompt", "")
            if system:
                by_model.setdefault((seen.namespace, seen.model), []).append(system)
        found = [_changing(model, systems[-_LOOKED_AT:]) for (_, model), systems in by_model.items()]
        return [changing for changing in found if changing is not None]


def _names(query: str) -> str:
    """A query without its values; what has no name is a value."""
    named = (part.partition("=") for part in query.split("&") if part)
    return "&".join(f"{name}=..." if equals else "..." for name, equals, _ in named)


def _changing(model: str, systems: list[str]) -> Changing | None:
    if len(systems) < _FEWEST or len(set(systems)) < _OFTEN * len(systems) or systems[-1] == systems[-2]:
        return None
    (span,) = spans({"system prompt": systems[-1]}, {"system prompt": systems[-2]})
    # Mostly the same: prompts that have nothing to do with each other are no fault of anybody's.
    return Changing(model, len(systems), span) if 2 * (span.end - span.start) < len(systems[-1]) else None
