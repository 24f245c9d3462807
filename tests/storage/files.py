"""What tests do to database files. Blocking, like `storage.sqlite_file`."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def query(path: Path, sql: str) -> list[Any]:
    """Rows of a plain connection."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def pragma(path: Path, name: str) -> Any:
    return query(path, f"PRAGMA {name}")[0][0]


def set_asides(path: Path) -> list[str]:
    """Names of what was set aside, stamps cut out."""
    found = path.parent.glob(f"{path.name}.corrupt-*")
    return sorted(f"corrupt{p.name[p.name.index('.corrupt-') :].partition('-wal')[1]}{_shm(p)}" for p in found)


def _shm(path: Path) -> str:
    return "-shm" if path.name.endswith("-shm") else ""


def damage(path: Path, offset: int, content: bytes) -> None:
    """Overwrite part of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def damage_all_but_header(path: Path) -> None:
    """Overwrite every page but the first."""
    size = path.stat().st_size
    damage(path, 8192, b"\xaa" * (size - 8192))


def damage_second_half(path: Path) -> None:
    """Overwrite what a small store wrote last: answers, not the schema."""
    size = path.stat().st_size
    damage(path, size // 2, b"\xaa" * (size - size // 2))


def _environment() -> dict[str, str]:
    # Such a process is killed, or may write no further: a measurement of coverage would be a broken file.
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def run_python(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; its errors become ours."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=_environment())
    if check:
        assert done.returncode == 0, done.stderr
    return done


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start code in a process of its own, to talk with by its pipes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())
