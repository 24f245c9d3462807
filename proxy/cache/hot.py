"""The hot tier: the answers used last, in memory, as bytes that are ready to send."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from proxy.cache.answer import Wire, decode_body
from proxy.cache.dialects.call import Json
from proxy.cache.dialects.dialect import Dialect
from storage.base import Entry

_OVERHEAD = 4096
"""Bytes an entry weighs beside its answer; an estimate."""


Place = tuple[bytes, bytes, bytes]
"""Namespace, upstream with its fingerprint, and call digest: what a key is made of, before it costs a digest."""


class Ready:
    """A stored answer with its renderings, each made when first asked for."""

    __slots__ = ("_dialect", "_wires", "entry")

    def __init__(self, entry: Entry, dialect: Dialect) -> None:
        """The answer in `entry` is in `dialect`'s form."""
        self.entry = entry
        self._dialect = dialect
        self._wires: dict[tuple[bool, bool], Wire] = {}

    def wire(self, *, stream: bool, include_usage: bool) -> Wire:
        """The rendering for an asker of this form."""
        form = (stream, stream and include_usage)
        wire = self._wires.get(form)
        if wire is None:
            body = decode_body(self.entry.answer)
            wire = self._wires[form] = render(self._dialect, body, stream=stream, include_usage=include_usage)
        return wire

    @property
    def weight(self) -> int:
        """About how many bytes of memory it takes with its usual renderings."""
        return 3 * len(self.entry.answer) + _OVERHEAD


def render(dialect: Dialect, body: Mapping[str, Json], *, stream: bool, include_usage: bool) -> Wire:
    """The answer in the form that an asker wants."""
    return dialect.stream(body, include_usage=include_usage) if stream else dialect.whole(body)


class HotTier:
    """A least-recently-used map of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        """Hold nothing yet."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._held: OrderedDict[Place, Ready] = OrderedDict()

    def get(self, place: Place, now_ms: int) -> Ready | None:
        """The answer of this place whose grace has not passed at `now_ms`: it may be stale."""
        ready = self._held.get(place)
        if ready is None:
            return None
        if ready.entry.ends_ms <= now_ms:
            self.discard(place)
            return None
        self._held.move_to_end(place)
        return ready

    def put(self, place: Place, ready: Ready) -> None:
        """Hold the answer, letting go of the least recently used."""
        self.discard(place)
        if ready.weight > self._max_bytes:
            return
        self._held[place] = ready
        self._bytes += ready.weight
        while self._bytes > self._max_bytes:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.weight

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self._bytes = 0

    def find(self, shown_id: str) -> list[Entry]:
        """The entries whose key begins with these digits, fresh or not. Looks at all of them: for rare occasions."""
        entries = {ready.entry.key: ready.entry for ready in self._held.values()}
        return [entry for key, entry in entries.items() if key.hex().startswith(shown_id)]

    def discard_entry(self, key: bytes) -> None:
        """Let go of the entry of this key, wherever it is held. Looks at all of them: for rare occasions."""
        for place in [place for place, ready in self._held.items() if ready.entry.key == key]:
            self.discard(place)

    def discard(self, place: Place) -> None:
        """Let go of the answer of this place, if it is held."""
        ready = self._held.pop(place, None)
        if ready is not None:
            self._bytes -= ready.weight
