"""Which entries somebody asks for: a query or a JSON object, read as conditions on what is stored. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.cache.dialects import DIALECTS
from storage.listing import Which

DEFAULT_LIMIT = 50
MOST_LISTED = 1000
_LONGEST_TEXT = 1000
_MOST_SECONDS = 10_000_000_000
_HIGHEST_MARK = (1 << 63) - 1

_ENDPOINTS = tuple(dialect.endpoint for dialect in DIALECTS)


class BadSelection(ValueError):
    """The message names a field and says what is expected of it."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A part of a list: at most `limit` entries after the place `mark`, 0 for the beginning."""

    which: Which
    limit: int
    mark: int
    newest_first: bool


@dataclass(frozen=True, slots=True)
class Purging:
    """Entries that shall go, or with `dry_run` only be counted."""

    which: Which
    dry_run: bool


def read_listing(query: Iterable[tuple[str, str]], now_ms: int) -> Listing:
    """What the fields of a URL's query ask for.

    Raises:
        BadSelection: a field is unknown, stands twice, or is not what is expected.
    """
    given: dict[str, Any] = {}
    for name, value in query:
        if name in given:
            raise BadSelection(f"{name}: expected once")
        given[name] = _number_of(value) if name in _NUMBERS else value
    _refuse_unknown(given, (*_CONDITIONS, "order", "limit", "after"))
    return Listing(
        _which(given, now_ms),
        limit=_whole("limit", given.get("limit", DEFAULT_LIMIT), MOST_LISTED),
        mark=_whole("after", given["after"], _HIGHEST_MARK) if "after" in given else 0,
        newest_first=_one_of("order", given.get("order", "newest"), ("newest", "oldest")) == "newest",
    )


def read_purging(given: Mapping[str, Any], now_ms: int) -> Purging:
    """What the fields of a JSON object ask for: at least one condition, or `"all": true`.

    Raises:
        BadSelection: a field is unknown or not what is expected, or nothing says which entries are meant.
    """
    _refuse_unknown(given, (*_CONDITIONS, "all", "dry_run"))
    everything, dry_run = (_flag(name, given.get(name, False)) for name in ("all", "dry_run"))
    conditions = [name for name in _CONDITIONS if name in given]
    if not conditions and not everything:
        raise BadSelection(f'say which entries: one or more of {", ".join(_CONDITIONS)}, or "all": true')
    if conditions and everything:
        raise BadSelection(f'all: expected without {conditions[0]}: "all" means every entry')
    return Purging(_which(given, now_ms), dry_run)


def _which(given: Mapping[str, Any], now_ms: int) -> Which:
    read = {name: reader(name, given[name]) for name, reader in _CONDITIONS.items() if name in given}
    older_s, newer_s = read.get("older_s"), read.get("newer_s")
    if older_s is not None and newer_s is not None and older_s >= newer_s:
        raise BadSelection("older_s: expected less than newer_s, or no entry can be meant")
    return Which(
        model=read.get("model"),
        endpoint=read.get("endpoint"),
        namespace=read.get("namespace"),
        fingerprint=read.get("fingerprint"),
        # Whoever is N seconds old to the millisecond is "older": each entry is on one side.
        stored_before_ms=None if older_s is None else now_ms - round(older_s * 1000) + 1,
        stored_after_ms=None if newer_s is None else now_ms - round(newer_s * 1000),
        text=read.get("text"),
        key_prefix=read.get("id"),
    )


def _refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    known = tuple(known)
    for name in given:
        if name not in known:
            raise BadSelection(f"{ascii(name)[1:-1][:60]}: no such field; there are {', '.join(known)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _is_unicode(value):
        raise BadSelection(f"{name}: expected a text")
    return value


def _searched(name: str, value: Any) -> str:
    within = isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT
    if not within or "\0" in value or not _is_unicode(value):
        raise BadSelection(f"{name}: expected a text of 1 to {_LONGEST_TEXT} characters, none of them NUL")
    return str(value)


def _endpoint(name: str, value: Any) -> str:
    return _one_of(name, value, _ENDPOINTS)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise BadSelection(f"{name}: expected {' or '.join(known)}")
    return str(value)


def _namespace(name: str, value: Any) -> bytes:
    if not isinstance(value, str) or not re.fullmatch("([0-9a-fA-F]{2}){0,64}", value):
        raise BadSelection(
            f"{name}: expected the hexadecimal digits that an entry shows, or nothing for the shared one"
        )
    return bytes.fromhex(value)


def _fingerprint(name: str, value: Any) -> bytes:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{64}", value):
        raise BadSelection(f"{name}: expected the 64 hexadecimal digits that an entry shows")
    return bytes.fromhex(value)


def _prefix(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-fA-F]{8,64}", value):
        raise BadSelection(f"{name}: expected the first 8 to 64 hexadecimal digits of an entry's id")
    return value.lower()


def _seconds(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MOST_SECONDS:
        raise BadSelection(f"{name}: expected seconds, 0 to {_MOST_SECONDS}")
    return float(value)


def _whole(name: str, value: Any, most: int) -> int:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise BadSelection(f"{name}: expected a whole number, 1 to {most}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadSelection(f"{name}: expected true or false")
    return value


def _number_of(text: str) -> int | float | str:
    """The number, or the text itself where it is none."""
    if re.fullmatch("[0-9]{1,19}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[0-9]{1,19}\.[0-9]{1,19}", text) else text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_CONDITIONS: Mapping[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "endpoint": _endpoint,
    "namespace": _namespace,
    "fingerprint": _fingerprint,
    "id": _prefix,
    "text": _searched,
    "older_s": _seconds,
    "newer_s": _seconds,
}
_NUMBERS = ("older_s", "newer_s", "limit", "after")
