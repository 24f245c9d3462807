"""Files that become visible whole or not at all: written under a passing name, and then moved."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from pathlib import Path

TEMP = re.compile(r"\.nearhit-[0-9a-f]{16}\.tmp")
"""Passing names; a file that has one is what a crash left."""


def size(path: Path) -> int | None:
    """Bytes of a plain file; None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def same(one: Path, other: Path) -> bool:
    """Whether both are there and are one file."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def passing_name(folder: Path) -> Path:
    """A new passing name in a folder."""
    return folder / f".nearhit-{secrets.token_hex(8)}.tmp"


def stage(source: Path, folder: Path) -> Path:
    """The file once more, under a passing name: linked, or copied with its mode where it cannot be."""
    staged = passing_name(folder)
    try:
        os.link(source, staged, follow_symlinks=False)
    except OSError:
        try:
            _copy(source, staged)
        except OSError:
            unlink(staged)
            raise
    return staged


def place(staged: Path, target: Path) -> None:
    """Move a file from its passing name to its own."""
    staged.replace(target)
    # Replacing a file by another link to it does nothing, and leaves both.
    unlink(staged)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, for us alone; on the disk when this returns."""
    with os.fdopen(_create(path), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def unlink(path: Path) -> None:
    """Delete a file, if it is there."""
    path.unlink(missing_ok=True)


def ignores_case(folder: Path) -> bool:
    """Whether names in this folder that differ by case alone are one."""
    probe = passing_name(folder)
    write_new(probe, b"")
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        unlink(probe)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as original, os.fdopen(_create(target), "wb") as copy:
        shutil.copyfileobj(original, copy, 1024 * 1024)
        copy.flush()
        os.fsync(copy.fileno())
    shutil.copymode(source, target)


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
