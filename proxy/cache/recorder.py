"""A bounded copy of an upstream's answer, taken while it is relayed, and judged when it has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from proxy.cache.answer import Assembling, Recorded
from proxy.cache.dialects.call import Call
from proxy.cache.dialects.dialect import Dialect, read_whole
from proxy.cache.policy import Drop
from proxy.cache.sse import EventSplitter
from proxy.cache.trust import ORDINARY, Trust


class Recording(Protocol):
    """What a fetch does with the bytes that it relays."""

    @property
    def spoke(self) -> bool:
        """Whether the first token has come."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the answer has said that it is over, though its body may not have ended yet."""
        ...

    @property
    def full(self) -> bool:
        """Whether nothing is held for readers who come later, so that the fetch goes at the pace of its readers."""
        ...

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Take the head of the response."""
        ...

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        ...

    def finish(self) -> Recorded | Drop:
        """Judge the answer, now that its body has ended."""
        ...


class Unrecorded:
    """For what is relayed only; up to `ahead_bytes` of it are held for readers that are slower than the upstream."""

    spoke = False
    complete = False

    def __init__(self, ahead_bytes: int = 0) -> None:
        """Nothing has come yet."""
        self._left = ahead_bytes

    @property
    def full(self) -> bool:
        """See `Recording`."""
        return self._left <= 0

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """See `Recording`."""

    def feed(self, chunk: bytes) -> None:
        """See `Recording`."""
        self._left -= len(chunk)

    def finish(self) -> Recorded | Drop:
        """See `Recording`."""
        return Drop.NO_STORE


class Recorder:
    """Feed it every chunk; `finish` tells whether the whole may be kept."""

    def __init__(
        self, dialect: Dialect, call: Call, *, max_bytes: int, usage_from_timings: bool, trust: Trust = ORDINARY
    ) -> None:
        """Record the answer to `call`, up to `max_bytes` as they come over the wire."""
        self._dialect = dialect
        self._call = call
        self._max_bytes = max_bytes
        self._usage_from_timings = usage_from_timings
        self._trust = trust
        self._size = 0
        self._drop: Drop | None = None
        self._chunks: list[bytes] = []
        self._splitter = EventSplitter()
        self._assembler: Assembling | None = None

    @property
    def spoke(self) -> bool:
        """Whether the first token of a stream has come."""
        return self._assembler is not None and self._assembler.spoke

    @property
    def complete(self) -> bool:
        """See `Recording`."""
        return self._drop is None and self._assembler is not None and self._assembler.done

    @property
    def full(self) -> bool:
        """Whether the answer outgrew the bound, so that nothing of it is held any more."""
        return self._size > self._max_bytes

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Take the head of the response."""
        self._drop = unusable(status, headers)
        if self._drop is None and self._call.stream and "json" not in headers.get("Content-Type", "").lower():
            self._assembler = self._dialect.assembler()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._size += len(chunk)
        if self.full:
            self._drop = self._drop or Drop.TOO_LARGE
            self._chunks.clear()
        if self._drop is not None:
            return
        if self._assembler is None:
            self._chunks.append(chunk)
            return
        try:
            self._take(self._assembler, self._splitter.feed(chunk))
        except Exception:  # noqa: BLE001 - whatever an upstream sends, recording it must not end its relay
            self._drop = Drop.NOT_UNDERSTOOD

    def finish(self) -> Recorded | Drop:
        """Judge the answer, now that its body has ended."""
        if self._drop is not None:
            return self._drop
        try:
            return self._judge()
        except Exception:  # noqa: BLE001 - as above
            return Drop.NOT_UNDERSTOOD

    def _judge(self) -> Recorded | Drop:
        result = self._result()
        if isinstance(result, Drop):
            return result
        gist = result.gist
        if self._trust.tells_length:
            return replace(result, seems_cut=self._trust.fills(self._call, gist))
        deltas = self._assembler.deltas if self._assembler is not None else None
        cut = self._trust.seems_cut(
            self._call, max(gist.texts, key=len, default=""), counted=gist.completion_tokens, deltas=deltas
        )
        return replace(result, seems_cut=cut)

    def _result(self) -> Recorded | Drop:
        if self._assembler is None:
            return read_whole(self._dialect, b"".join(self._chunks))
        self._take(self._assembler, self._splitter.end())
        return self._assembler.finish(usage_asked=self._call.include_usage, usage_from_timings=self._usage_from_timings)

    @staticmethod
    def _take(assembler: Assembling, events: Iterable[str | None]) -> None:
        for data in events:
            if data is None:
                assembler.fail()
            else:
                assembler.feed(data)


def unusable(status: int, headers: Mapping[str, str]) -> Drop | None:
    """Why an answer with this head is not kept, whatever follows."""
    if not 200 <= status < 300:
        return Drop.STATUS
    encoded = headers.get("Content-Encoding", "identity").lower() != "identity"
    return Drop.CONTENT_ENCODING if encoded else None
