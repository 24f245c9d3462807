"""The data directory and the database file. Blocking."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from proxy.finding import Examined, Finding, Severity
from storage.base import NotLocal, StorageCorrupt, StorageError, StorageRefused
from storage.mounts import MOUNTINFO
from storage.sqlite_file import refuse_network
from storage.sqlite_offline import Ahead, ahead_of, entries_of, log_bytes, problems, refuse_too_new, schema_of

_PRIVATE_FILES = ("admin.token", "secret")
_LEAST_FREE = 16 * 1024 * 1024
_LOG_BYTES = 64 * 1024 * 1024
"""A checkpoint comes after a few megabytes; this much stays only where something keeps it from ending."""

_RESTORE = "the next start sets it aside and begins a new one; to go back to a backup, see docs/troubles.md"


def data_directory(data: Path) -> Examined:
    """Where token, secret and usually the database are."""
    name = "data directory"
    try:
        if not data.exists():
            return Examined(name, f"{data}, to be made by the first start", tuple(_creatable(data)))
        findings = [*_usable(data), *_exposed(data, 0o700)]
        for path in (data / name for name in _PRIVATE_FILES):
            if path.exists():
                findings += [*_usable(path), *_exposed(path, 0o600)]
    except OSError as error:
        return Examined(name, str(data), (_unreadable(data, error),))
    return Examined(name, str(data), tuple(findings))


def database(path: Path | None, max_bytes: int, mountinfo: Path = MOUNTINFO) -> tuple[list[Examined], bool]:
    """The file, its disk and its schema; and whether its entries can be read."""
    if path is None:
        return [Examined("database file", "none: cache.persist is off, answers are kept in memory")], False
    examined = [_file(path, mountinfo), _room(path, max_bytes)]
    if not _is_there(path):
        return examined, False
    schema, is_readable = _schema(path)
    return [*examined, schema], is_readable


def contents(path: Path) -> Examined:
    """Every page and rule of a database; seconds for a large one."""
    try:
        broken = problems(path)
    except StorageCorrupt as error:
        broken = [f"integrity: {error}"]
    except StorageError as error:
        note = Finding(Severity.NOTE, f"{path} could not be checked now: {error}")
        return Examined("contents", "not checked", (note,))
    return Examined("contents", "every page and rule", tuple(_broken(path, broken)))


def ahead(path: Path, limit_ms: int, *, is_quick: bool) -> Ahead | None:
    """Entries with times after `limit_ms`; None where the file cannot tell."""
    try:
        return ahead_of(path, limit_ms, all_of_them=not is_quick)
    except StorageError:
        return None


def space(free: int, used: int, max_bytes: int) -> Iterator[Finding]:
    """What is to be said of the `free` bytes of a disk, where the store takes `used` and may take `max_bytes`."""
    more = max(max_bytes - used, 0)
    if free < _LEAST_FREE:
        advice = "new answers may not be kept: free some space, or point data_dir or cache.file at another disk"
        yield Finding(Severity.PROBLEM, f"the disk is nearly full: {_size(free)} are free", advice)
    elif free < more:
        what = f"the store may grow by {_size(more)}, but {_size(free)} are free on its disk"
        yield Finding(Severity.ADVICE, what, "lower cache.max_bytes, or free some space")
    if used > max_bytes:
        what = f"the store takes {_size(used)}, cache.max_bytes is {_size(max_bytes)}"
        yield Finding(Severity.NOTE, what, "a running nearhit takes the least worthy answers out until it holds")


def _file(path: Path, mountinfo: Path) -> Examined:
    name = "database file"
    try:
        refuse_network(path, mountinfo)
    except NotLocal as error:
        return Examined(name, str(path), (Finding(Severity.PROBLEM, str(error), "until then, memory alone is used"),))
    try:
        if not path.exists():
            return Examined(name, f"{path}, to be made by the first start", tuple(_creatable(path)))
        # Beside it, SQLite makes its log.
        findings = [*_usable(path.parent), *_usable(path), *_exposed(path, 0o600), *_log(path), *_set_aside(path)]
        return Examined(name, f"{path}, {_size(path.stat().st_size)}", tuple(findings))
    except OSError as error:
        return Examined(name, str(path), (_unreadable(path, error),))


def _room(path: Path, max_bytes: int) -> Examined:
    name = "disk space"
    try:
        used = path.stat().st_size + log_bytes(path) if path.exists() else 0
        free = shutil.disk_usage(_existing(path)).free
    except OSError as error:
        return Examined(name, str(path), (_unreadable(path, error),))
    return Examined(
        name, f"{_size(free)} free, cache.max_bytes {_size(max_bytes)}", tuple(space(free, used, max_bytes))
    )


def _schema(path: Path) -> tuple[Examined, bool]:
    """Also whether its entries can be read."""
    name = "schema"
    try:
        schema = schema_of(path)
        refuse_too_new(schema)
        entries = entries_of(path) if schema.number else 0
    except StorageRefused as error:
        problem = Finding(Severity.PROBLEM, str(error), "nearhit does not start on it")
        return Examined(name, "refused", (problem,)), False
    except StorageCorrupt as error:
        return Examined(
            name, "unreadable", (Finding(Severity.PROBLEM, f"{path} is corrupt: {error}", _RESTORE),)
        ), False
    except StorageError as error:
        return Examined(name, "unreadable", (Finding(Severity.PROBLEM, f"{path}: {error}"),)), False
    findings: tuple[Finding, ...] = ()
    if schema.missing:
        what = f"the file has schema {schema.number}, this nearhit makes it {schema.known} at its next start"
        findings = (Finding(Severity.NOTE, what, "`nearhit migrate` does it now and keeps a copy of the old one"),)
    return Examined(name, f"{schema.number} of {schema.known}, {entries} entries", findings), schema.number > 0


def _broken(path: Path, broken: Sequence[str]) -> Iterator[Finding]:
    damage = [what.removeprefix("integrity: ") for what in broken if what.startswith("integrity: ")]
    if damage:
        more = f", and {len(damage) - 1} more" if len(damage) > 1 else ""
        yield Finding(Severity.PROBLEM, f"{path} is corrupt: {damage[0]}{more}", _RESTORE)
    for what in broken:
        if not what.startswith("integrity: "):
            advice = "nearhit serves on; export what is good, import it into a new file, and please report this"
            yield Finding(Severity.PROBLEM, f"{path} breaks a rule: {what}", advice)


def _log(path: Path) -> Iterator[Finding]:
    size = log_bytes(path)
    if size > _LOG_BYTES:
        what = f"the write-ahead log {path.name}-wal has {_size(size)}"
        advice = "something reads the file without end (a backup, another program), or nothing closed it: start nearhit"
        yield Finding(Severity.ADVICE, what, advice)


def _set_aside(path: Path) -> Iterator[Finding]:
    found = [part for part in path.parent.glob(f"{path.name}.corrupt-*") if not part.name.endswith(("-wal", "-shm"))]
    if found:
        size = _size(sum(part.stat().st_size for part in found))
        what = f"{len(found)} corrupt databases were set aside as {path}.corrupt-* ({size})"
        yield Finding(Severity.NOTE, what, "is the disk or the memory failing? Delete them when you have looked")


def _usable(path: Path) -> Iterator[Finding]:
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)):
        advice = "is it mounted read-only, or another user's? Run doctor as the user that runs nearhit"
        yield Finding(Severity.PROBLEM, f"{path} cannot be read and written by this user", advice)


def _creatable(path: Path) -> Iterator[Finding]:
    above = _existing(path)
    if not above.is_dir():
        yield Finding(Severity.PROBLEM, f"{path} cannot be made: {above} is no folder", "point data_dir elsewhere")
    else:
        yield from _usable(above)


def _exposed(path: Path, mode: int) -> Iterator[Finding]:
    found = path.stat().st_mode & 0o777
    if found & 0o077:
        yield Finding(Severity.ADVICE, f"others may look into {path} (mode {found:o})", f"chmod {mode:o} {path}")


def _existing(path: Path) -> Path:
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _unreadable(path: Path, error: OSError) -> Finding:
    advice = "run doctor as the user that runs nearhit"
    return Finding(Severity.PROBLEM, f"{path} cannot be looked at: {error.strerror or error}", advice)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
