"""What a request and answer format is to the rest of nearhit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from proxy.cache.answer import Assembling, Gist, Pieces, Recorded, Wire, decode, in_one
from proxy.cache.dialects.call import Json, Readable
from proxy.cache.policy import Drop


class Dialect(Readable, Protocol):
    """One request and answer format."""

    @property
    def usage_on_request(self) -> bool:
        """Whether a stream tells its usage only where `stream_options.include_usage` asks for it."""
        ...

    def kept(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """The part of a non-streamed answer that is stored: all but what every replay makes anew."""
        ...

    def judge(self, body: Mapping[str, Json]) -> Gist | Drop:
        """What a complete answer comes to, or why it is not worth keeping: servers report failures with status 200."""
        ...

    def assembler(self) -> Assembling:
        """Puts the events of one stream together."""
        ...

    def whole(self, body: Mapping[str, Json]) -> Wire:
        """A stored answer as one JSON object.

        Raises:
            NotUnderstood: it cannot be given in this form.
        """
        ...

    def stream(self, body: Mapping[str, Json], *, include_usage: bool, pieces: Pieces = in_one) -> Wire:
        """A stored answer as server-sent events, ended as this dialect ends; its texts cut by `pieces`.

        Raises:
            NotUnderstood: it cannot be given in this form.
        """
        ...


def read_whole(dialect: Dialect, content: bytes) -> Recorded | Drop:
    """Judge a non-streamed answer."""
    try:
        body = decode(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return Drop.NOT_JSON
    if not isinstance(body, dict):
        return Drop.NOT_UNDERSTOOD
    kept = dialect.kept(body)
    gist = dialect.judge(kept)
    return gist if isinstance(gist, Drop) else Recorded(kept, usage_known=True, gist=gist)
