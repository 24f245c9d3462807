"""What several processes may see of one file, judged from what each of them noted while it ran.

Every stored answer says by itself whose it is, so a reader needs to know nothing else. Times are of `time.monotonic`,
which all processes of a machine share.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

GRACE_S = 1.0
"""So long after one process was told that something is done, another may still see what was before."""


@dataclass(frozen=True, slots=True)
class Event:
    """One operation on a key, from `began` to `ended`; `ended` is infinite where nobody said that it was done.

    `kind` is get, put, delete or remove; the last is a deletion that holds once it ended, where its own process sees a
    put or delete at once. `value` is the name of the value put or got, empty for none.
    """

    process: int
    kind: str
    key: str
    value: str
    began: float
    ended: float

    def encoded(self) -> str:
        ended = None if math.isinf(self.ended) else self.ended
        return json.dumps([self.process, self.kind, self.key, self.value, self.began, ended])

    @classmethod
    def decoded(cls, line: str) -> Event:
        process, kind, key, value, began, ended = json.loads(line)
        return cls(process, kind, key, value, began, math.inf if ended is None else ended)


def answer_of(key: bytes, value: str, size: int) -> bytes:
    """An answer of about `size` bytes that says whose it is."""
    body = f"{key.hex()} {value} {'.' * size}".encode()
    return hashlib.sha256(body).hexdigest().encode() + body


def value_of(key: bytes, answer: bytes) -> str:
    """The value's name, from an answer of this key.

    Raises:
        ValueError: it is another key's answer, or a torn one.
    """
    digest, body = answer[:64], answer[64:]
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("a torn answer")
    owner, value, _ = body.decode().split(" ")
    if owner != key.hex():
        raise ValueError("the answer of another key")
    return value


def wrong_reads(events: Iterable[Event]) -> Iterator[str]:
    """Every read of a value that had been replaced or deleted long enough before, in words."""
    of_key: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        of_key[event.key].append(event)
    for key, all_of_it in of_key.items():
        changes = [event for event in all_of_it if event.kind != "get"]
        puts = {event.value: event for event in changes if event.kind == "put"}
        for read in all_of_it:
            # Of a process that was killed, the notes are lost: nothing is known of what it put.
            put = puts.get(read.value) if read.kind == "get" else None
            for change in changes:
                if put is not None and put is not change and _hides(change, put, read):
                    yield f"{key[:8]}: {read.process} read {read.value} after a {change.kind} by {change.process}"


def _hides(change: Event, put: Event, read: Event) -> bool:
    """Whether the read must not give what was put, because of the change."""
    if change.process == read.process == put.process and change.kind != "remove":
        return put.began < change.began < read.began
    grace_s = 0.0 if change.process == read.process else GRACE_S
    return put.ended < change.began and change.ended + grace_s < read.began


def final_values(events: Iterable[Event]) -> dict[str, set[str]]:
    """For each key the values that may be there in the end, where nothing went by itself; empty for none."""
    of_key: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind != "get":
            of_key[event.key].append(event)
    return {key: {event.value for event in changes if _may_be_last(event, changes)} for key, changes in of_key.items()}


def _may_be_last(event: Event, changes: list[Event]) -> bool:
    return not any(_overwrites(other, event) for other in changes)


def _overwrites(later: Event, earlier: Event) -> bool:
    if later.process == earlier.process and "remove" not in (later.kind, earlier.kind) and not math.isinf(later.ended):
        return later.began > earlier.began
    return later.began > earlier.ended
