"""Every engine that must keep the contract, and entries to put into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from storage.base import Entry, Room, Sketch
from storage.renewal import renewable
from storage.sqlite import open_sqlite
from storage.store import Store

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]

NOW = 1_700_000_000_000
"""The time of all tests that need no other."""

FOREVER = 600.0
"""Seconds after which something would happen that no test waits for."""


def room(max_entries: int = 10**9, max_bytes: int = 2**60, top_k: int = 10**9) -> Room:
    """Bounds that are out of reach but for those given."""
    return Room(max_entries, max_bytes, top_k)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def entry(number: int = 1, **fields: Any) -> Entry:
    """A fresh entry; the number is its key and shows in its answer."""
    plain = Entry(
        key=key(number),
        key_version=1,
        namespace=b"",
        space=b"s" * 32,
        upstream="http://127.0.0.1:8080",
        fingerprint=b"fingerprint",
        endpoint="/v1/chat/completions",
        model="small",
        words=None,
        stored_ms=NOW,
        expires_ms=NOW + 3_600_000,
        cost_ms=1200,
        prompt_tokens=7,
        completion_tokens=None,
        usage_known=True,
        answer=b"answer %d" % number,
    )
    return replace(plain, **fields)


def near(number: int = 1, **fields: Any) -> Entry:
    """A fresh near entry with words."""
    return entry(number, **{"near": True, "words": f"words {number}", **fields})


def sketch(*keys: int, scheme: int = 1, skeleton: str = "skeleton") -> Sketch:
    return Sketch(scheme, skeleton, keys)


def _file(folder: Path) -> AbstractAsyncContextManager[Store]:
    return open_sqlite(folder / "nearhit.db")


def _memory(_: Path) -> AbstractAsyncContextManager[Store]:
    return open_sqlite(None)


def _renewable(engine: Callable[[Path], AbstractAsyncContextManager[Store]]) -> Any:
    return lambda folder: renewable(lambda _: engine(folder), watch_s=FOREVER, retry_s=FOREVER)


ENGINES: dict[str, Callable[[Path], AbstractAsyncContextManager[Store]]] = {
    "file": _file,
    "memory": _memory,
    "renewable file": _renewable(_file),
    "renewable memory": _renewable(_memory),
}
