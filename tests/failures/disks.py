"""Disks that fill up, turn read-only, are hidden and come back. Blocking.

A small file system of its own, in a mount namespace of its own, where this machine lets us; a limit on the size of
files, and rights that are taken away, everywhere.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

_SIZE = 3 * 1024 * 1024


class Disk:
    """A folder on a disk. `prefix` comes before the command of a program that is to use it."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        """As such a program knows it."""
        self.prefix = prefix

    @property
    def seen(self) -> Path:
        """The folder as this process finds it."""
        return self.folder

    def fill(self, process: int | None) -> None:
        """Leave no room; `process` is the program that uses it, None before its start."""
        raise AssertionError

    def free(self, process: int) -> None:
        """Make room again."""
        raise AssertionError

    def protect(self) -> None:
        """Let nothing be written."""
        raise AssertionError

    def release(self) -> None:
        """Let it be written again."""
        raise AssertionError


class Limited(Disk):
    """Files may grow no further: what a quota, or the limit of a service, looks like."""

    def fill(self, process: int | None) -> None:
        if process is None:
            self.prefix = ("prlimit", "--fsize=0:unlimited")
            return
        # What a file has already may be written again, as on a full disk.
        logs = list(self.folder.glob("*-wal"))
        self._limit(process, logs[0].stat().st_size if logs else 0)

    def free(self, process: int) -> None:
        self._limit(process, resource.RLIM_INFINITY)

    @staticmethod
    def _limit(process: int, size: int) -> None:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Guarded(Disk):
    """A folder in which the user that runs the program has no right to write."""

    def protect(self) -> None:
        self.folder.chmod(0o500)

    def release(self) -> None:
        self.folder.chmod(0o700)


class Mounted(Disk):
    """A file system in memory, in a mount namespace that the process `keeper` keeps."""

    def __init__(self, folder: Path, keeper: int) -> None:
        super().__init__(folder, (*_entering(keeper), "env", "-C", str(folder)))
        self._keeper = keeper
        self._filler = self.seen / "filler"

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self._keeper}/root{self.folder}")

    def fill(self, process: int | None) -> None:
        with self._filler.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def free(self, process: int) -> None:
        self._filler.unlink()

    def protect(self) -> None:
        self._run("mount", "-o", "remount,ro", str(self.folder))

    def release(self) -> None:
        self._run("mount", "-o", "remount,rw", str(self.folder))

    def hide(self) -> None:
        """Put an empty disk that cannot be written in its place."""
        self._run("mount", "-t", "tmpfs", "-o", "ro", "none", str(self.folder))

    def show(self) -> None:
        """Take that away again."""
        self._run("umount", str(self.folder))

    def _run(self, *command: str) -> None:
        subprocess.run((*_entering(self._keeper), *command), check=True, capture_output=True)


@contextmanager
def limited(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    yield Limited(folder)


@contextmanager
def guarded(folder: Path) -> Iterator[Disk]:
    folder.mkdir(mode=0o700)
    # Root may write anywhere, unless it gives that up.
    mine = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
    disk = Guarded(folder, mine if os.geteuid() == 0 else ())
    try:
        yield disk
    finally:
        disk.release()


@contextmanager
def mounted(folder: Path) -> Iterator[Mounted]:
    folder.mkdir()
    with _keeping(folder) as keeper:
        yield Mounted(folder, keeper.pid)


@contextmanager
def _keeping(folder: Path) -> Iterator[subprocess.Popen[str]]:
    script = f'mount -t tmpfs -o size={_SIZE},mode=700 none "$0" && echo mounted && exec cat'
    command = (*_unsharing(), "sh", "-c", script, str(folder))
    keeper = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            if keeper.stdout.readline() != "mounted\n":
                raise PermissionError("this machine lets us mount nothing")
            yield keeper
        finally:
            keeper.stdin.close()


def _unsharing() -> tuple[str, ...]:
    return ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--mount", "--map-root-user")


def _entering(keeper: int) -> tuple[str, ...]:
    user = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")
    return ("nsenter", f"--target={keeper}", "--mount", *user)


@cache
def may_mount() -> bool:
    """Whether this machine lets us mount; a container may not."""
    try:
        with _keeping(Path("/mnt") if Path("/mnt").is_dir() else Path("/tmp")):
            return True
    except OSError:
        return False


OpenDisk = Callable[[Path], AbstractContextManager[Disk]]

FILLING: dict[str, OpenDisk] = {"limit": limited, **({"full disk": mounted} if may_mount() else {})}
READ_ONLY: dict[str, OpenDisk] = {"no rights": guarded, **({"read-only disk": mounted} if may_mount() else {})}
