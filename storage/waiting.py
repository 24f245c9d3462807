"""Changes of entries that wait to be written: the last one of each key, found by the key and by the band keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from storage.base import Candidate, Delete, Entry, Put, Sketch

ROW_BYTES = 512
"""What an entry weighs beside its answer and words; an estimate for the bound on pending bytes."""
BAND_BYTES = 330
"""What a band key weighs while it waits; mostly the dictionary of those that have it."""

_NOBODY: dict[bytes, int] = {}


class Waiting:
    """The changes, in the order in which they came; `weight` is their estimated size in bytes."""

    def __init__(self) -> None:
        """Begin with none."""
        self.weight = 0
        self._changes: dict[bytes, Put | Delete] = {}
        self._bands: dict[int, dict[bytes, int]] = {}
        self._came = 0

    def __contains__(self, key: bytes) -> bool:
        """Whether a change of this key waits."""
        return key in self._changes

    def __iter__(self) -> Iterator[Put | Delete]:
        """The changes, earliest first."""
        return iter(self._changes.values())

    def __len__(self) -> int:
        """How many keys change."""
        return len(self._changes)

    def get(self, key: bytes) -> Put | Delete | None:
        """The change of this key that waits."""
        return self._changes.get(key)

    def weight_of(self, key: bytes) -> int:
        """What the change of this key adds to the weight; 0 where none waits."""
        return weight(self._changes.get(key))

    def add(self, change: Put | Delete) -> None:
        """Let the change wait, in place of an earlier one of its key."""
        key = change.entry.key if isinstance(change, Put) else change.key
        self._remove(key)
        self._changes[key] = change
        self.weight += weight(change)
        self._came += 1
        for band in _bands(change):
            self._bands.setdefault(band, {})[key] = self._came

    def take(self, limit: int, max_weight: int) -> Waiting:
        """Take out the earliest changes, at most `limit` keys, which weigh at most `max_weight` unless it is one."""
        taken = Waiting()
        for key in list(islice(self._changes, limit)):
            if taken.weight and taken.weight + self.weight_of(key) > max_weight:
                break
            taken.add(self._changes[key])
            self._remove(key)
        return taken

    def candidates(self, space: bytes, keys: Iterable[int], now_ms: int, per_key: int) -> list[Candidate]:
        """Entries that wait, as `storage.base.Sketches.candidates` would find them; latest first, not the best."""
        came: dict[bytes, int] = {}
        shared: Counter[bytes] = Counter()
        for band in set(keys):
            having = self._bands.get(band, _NOBODY)
            for key in islice(reversed(having), per_key):
                came[key] = having[key]
                shared[key] += 1
        found: list[Candidate] = []
        for key in sorted(came, key=came.__getitem__, reverse=True):
            match self._changes[key]:
                case Put(Entry(words=str(words)) as entry, Sketch(skeleton=skeleton)):
                    if entry.space == space and entry.expires_ms > now_ms:
                        found.append(Candidate(key, words, skeleton, shared[key]))
        return found

    def _remove(self, key: bytes) -> None:
        change = self._changes.pop(key, None)
        self.weight -= weight(change)
        for band in _bands(change):
            having = self._bands[band]
            del having[key]
            if not having:
                del self._bands[band]


def weight(change: Put | Delete | None) -> int:
    """The estimated size in memory, in bytes; a deletion weighs nothing."""
    if not isinstance(change, Put):
        return 0
    own = ROW_BYTES + len(change.entry.answer) + len(change.entry.words or "")
    sketch = change.sketch
    return own if sketch is None else own + len(sketch.skeleton) + BAND_BYTES * len(sketch.keys)


def _bands(change: Put | Delete | None) -> set[int]:
    match change:
        case Put(Entry(near=True, words=str()), Sketch(keys=keys)):
            return set(keys)
        case _:
            return set()
