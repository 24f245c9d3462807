"""What is on disk about prefixes: `<folder>/<model>/<name>.json`, and `<name>.bin` where we see the server's files.

The JSON file is the record; its path says the names, so that people may rename, move and delete while nearhit is off.
The `.bin` is the server's own file once more, a hard link where the file system allows: it brings the file back after
the server's folder was emptied. A file becomes visible whole or not at all; what a crash left is swept later.

Methods block: call them in a thread. Only `touch` does not.
"""

from __future__ import annotations

import logging
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from proxy.upstream.folder_lock import FolderLock
from proxy.upstream.prefix_json import Held, read_record, told
from proxy.upstream.prefix_json import PrefixFilesError as PrefixFilesError
from proxy.upstream.prefix_record import Record as Record
from proxy.upstream.prefix_record import ServerNames, encode_name, is_server_file, name_beside
from proxy.upstream.whole_files import TEMP, ignores_case, passing_name, place, same, size, stage, unlink, write_new

log = logging.getLogger("nearhit.prefixes")

GRACE_S = 600.0
"""How long a file that nothing names is left alone: another process may be about to name it."""
_POLL_S = 0.02

Key = tuple[str, str]


class PrefixFiles:
    """The files of one installation. Safe to use from several threads."""

    def __init__(
        self,
        folder: Path,
        slot_dir: Path | None,
        max_bytes: int,
        *,
        names: ServerNames,
        upstream: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`slot_dir` is the server's folder for slot files as seen from here, None where it cannot be seen.

        `max_bytes` bounds the disk space that `prune` leaves. `names` tells our own files in the server's folder. Only
        records of `upstream`, or of none, are dealt with (None: all are); others may have theirs in the same folder.
        """
        self._folder = folder
        self._slot_dir = slot_dir
        self._max_bytes = max_bytes
        self._names = names
        self._upstream = upstream
        self._others: set[str] = set()
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[Key, Held] = {}
        self._touched: dict[Key, float] = {}
        self._warned: set[str] = set()
        self._fold: bool | None = None
        self._ownership = FolderLock(folder, upstream or "")
        self._is_anothers = False

    def own(self) -> bool:
        """Whether the names that are used again and again are this process's, from now until `close`.

        Of two processes, one would otherwise overwrite what the other goes on restoring. Never raises.
        """
        with self._lock:
            try:
                self._is_anothers = not self._ownership.take()
            except OSError as error:
                self._is_anothers = True
                self._warn(self._folder, error.strerror or type(error).__name__)
            return not self._is_anothers

    def close(self) -> None:
        """Let others have those names; idempotent."""
        with self._lock:
            self._ownership.close()
            self._is_anothers = False

    def load(self) -> list[Record]:
        """Read everything anew; what cannot be read is told once and left alone. Raises PrefixFilesError."""
        with self._lock, told(f"cannot read {self._folder}"):
            self._held, self._others, all_read = {}, set(), True
            for model in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
                if model.is_dir() and not model.name.startswith("."):
                    all_read &= self._load_model(model)
            self._sweep(all_read=all_read)
            return [held.record for held in self._held.values()]

    def keep(self, record: Record) -> Record:
        """Write a record, and put the server's file beside it where that is seen; returns it with the file's size.

        What was kept under the same names is replaced, and its file deleted. Where another server's prefix has its
        name, it gets one of its own. Raises PrefixFilesError.
        """
        with self._lock, told(f"cannot keep the prefix {record.cache_name!r}"):
            record = self._named(record)
            key = (record.model_name, record.cache_name)
            old = self._held.get(key)
            path = old.path if old else self._free_path(*key)
            server = self._server_file(record.file)
            server_size = size(server) if server else None
            if server_size is not None:
                record = replace(record, bytes=server_size)
            held = Held(record, path)
            self._write(held, server if server_size is not None else None)
            self._held[key] = held
            self._touched.pop(key, None)
            if old and old.record.file != record.file:
                self._unlink_server_file(old.record.file)
            if record.file == "" or (old and old.record.file != record.file and server_size is None):
                unlink(held.bin)
            return record

    def release(self, file: str) -> None:
        """See that no record names a file of the server's any more: it is about to be overwritten.

        Raises PrefixFilesError; then some record may still name it.
        """
        with self._lock, told("cannot forget what a file of the server's held"):
            for key, held in list(self._held.items()):
                if held.record.file == file:
                    emptied = replace(held, record=replace(held.record, file="", bytes=0))
                    self._write(emptied, None)
                    self._held[key] = emptied
                    unlink(held.bin)

    def touch(self, record: Record, used_at: float) -> None:
        """Remember that it was used; `flush` writes it down. Does no I/O, and may be called anywhere."""
        self._touched[record.model_name, record.cache_name] = used_at

    def flush(self) -> None:
        """Write what was remembered. Raises PrefixFilesError; then the rest stays remembered."""
        with self._lock, told("cannot write when prefixes were used"):
            for key, used_at in list(self._touched.items()):
                held = self._held.get(key)
                if held and used_at > held.record.used_at:
                    held = replace(held, record=replace(held.record, used_at=used_at))
                    self._write(held, None)
                    self._held[key] = held
                if self._touched.get(key) == used_at:
                    del self._touched[key]

    def remove(self, record: Record) -> bool:
        """Delete its files, the server's included where it is seen; False where there was none.

        Raises PrefixFilesError.
        """
        with self._lock, told(f"cannot delete the prefix {record.cache_name!r}"):
            return self._remove((record.model_name, record.cache_name))

    def prune(self, keep: Callable[[Record], bool] | None = None) -> list[Record]:
        """Delete what was used longest ago until the rest fits, but nothing that `keep` says.

        Returns what went; what cannot be deleted is told and stays. Only disks that are seen from here count.
        """
        with self._lock:
            costs = {key: self._cost(held) for key, held in self._held.items()}
            excess, gone = sum(costs.values()) - self._max_bytes, list[Record]()
            for key in sorted(costs, key=self._used_at):
                if excess <= 0:
                    break
                record = self._held[key].record
                if keep and keep(record):
                    continue
                try:
                    self._remove(key)
                except OSError as error:
                    self._warn(self._held[key].path, str(error))
                    continue
                gone.append(record)
                excess -= costs[key]
            return gone

    def rename_model(self, old: str, new: str) -> list[Record]:
        """Give a model's prefixes to another name; what that has already stays. Returns them as they are now.

        Raises PrefixFilesError.
        """
        with self._lock, told(f"cannot rename the prefixes of {old!r} to {new!r}"):
            moved: list[Record] = []
            for (model, name), held in list(self._held.items()):
                if model != old or (new, name) in self._held:
                    continue
                record = replace(held.record, model_name=new)
                now = Held(record, self._free_path(new, name))
                self._write(now, held.bin if size(held.bin) is not None else None)
                self._held[new, name] = now
                del self._held[model, name]
                unlink(held.path)
                unlink(held.bin)
                moved.append(record)
            with suppress(OSError):
                (self._folder / encode_name(old, fold=bool(self._fold))).rmdir()
            return moved

    def appeared(self, file: str, within_s: float = 1.0) -> bool:
        """Whether a file that the server saved is in `slot_dir` within that time: if not, that is another folder."""
        until = time.monotonic() + within_s
        server = self._server_file(file)
        while server is None or size(server) is None:
            if server is None or time.monotonic() >= until:
                return False
            time.sleep(_POLL_S)
        return True

    def _load_model(self, folder: Path) -> bool:
        """Read one model's records; False if any could not be read."""
        all_read = True
        for path in sorted(folder.glob("*.json")):
            if path.name.startswith("."):
                continue
            try:
                record = read_record(path)
            except (OSError, ValueError, RecursionError) as error:
                self._warn(path, str(error))
                all_read = False
                continue
            key = (record.model_name, record.cache_name)
            if not self._is_mine(record):
                self._others.add(record.file)
                continue
            if key in self._held:
                self._warn(path, f"{self._held[key].path.name} stands for the same name")
                all_read = False
                continue
            self._held[key] = self._with_files(Held(record, path))
        return all_read

    def _with_files(self, held: Held) -> Held:
        """Make the server's file and ours agree; the record loses its `file` where neither is what it was."""
        held = self._with_own_name(held)
        record = held.record
        server = self._server_file(record.file)
        if server is None:
            return held
        found = {path: size(path) for path in (server, held.bin)}
        sizes = {path: n for path, n in found.items() if n and n == (record.bytes or n)}
        if not sizes:
            return replace(held, record=replace(record, file="", bytes=0))
        source = next(iter(sizes))
        try:
            for target in (server, held.bin):
                if target not in sizes:
                    place(stage(source, target.parent), target)
        except OSError as error:
            self._warn(held.path, str(error))
            if server not in sizes:
                return replace(held, record=replace(record, file="", bytes=0))
        return replace(held, record=replace(record, bytes=sizes[source]))

    def _with_own_name(self, held: Held) -> Held:
        """A record whose file is another installation's, or another process's, goes on without, or with ours."""
        record = held.record
        if not is_server_file(record.file):
            return held
        sees = self._slot_dir is not None and self._slot_dir.is_dir()
        if self._names.ours(record.file) and (sees or not self._is_anothers):
            return held
        if sees and size(held.bin) == record.bytes:
            with suppress(ValueError):
                own = self._names.of(bytes.fromhex(record.fingerprint), bytes.fromhex(record.lead))
                return replace(held, record=replace(record, file=own))
        return replace(held, record=replace(record, file="", bytes=0))

    def _write(self, held: Held, server: Path | None) -> None:
        """Put the record, and beside it the server's file; nothing is changed unless there is room for both."""
        folder = held.path.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged: list[tuple[Path, Path]] = []
        try:
            if server and not same(server, held.bin):
                staged.append((stage(server, folder), held.bin))
            staged.append((passing_name(folder), held.path))
            write_new(staged[-1][0], msgspec.json.format(msgspec.json.encode(held.record)))
            for passing, target in staged:
                place(passing, target)
        finally:
            for passing, _ in staged:
                unlink(passing)

    def _remove(self, key: Key) -> bool:
        held = self._held.pop(key, None)
        self._touched.pop(key, None)
        if held is None:
            return False
        try:
            self._unlink_server_file(held.record.file)
            unlink(held.bin)
            held.path.unlink()
        except FileNotFoundError:
            return False
        except OSError:
            self._held[key] = held
            raise
        with suppress(OSError):
            held.path.parent.rmdir()
        return True

    def _unlink_server_file(self, file: str) -> None:
        """Delete a file of the server's, unless another record needs it."""
        server = self._server_file(file)
        named = self._others.union(held.record.file for held in self._held.values())
        if server is None or file in named:
            return
        try:
            if size(server) is not None:
                unlink(server)
        except OSError as error:
            self._warn(server, str(error))

    def _sweep(self, *, all_read: bool) -> None:
        """Delete what crashes left behind and nothing names; files of the server's only if every record was read."""
        named = self._others.union(held.record.file for held in self._held.values())
        for path in (*self._folder.glob("*"), *self._folder.glob("*/*")):
            orphan = path.suffix == ".bin" and not path.with_suffix(".json").exists()
            if orphan or TEMP.fullmatch(path.name):
                self._sweep_one(path)
        for path in self._slot_dir.iterdir() if self._slot_dir and self._slot_dir.is_dir() else []:
            orphan = all_read and self._names.ours(path.name) and path.name not in named
            if orphan or TEMP.fullmatch(path.name):
                self._sweep_one(path)

    def _sweep_one(self, path: Path) -> None:
        with suppress(OSError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and self._clock() - max(found.st_mtime, found.st_ctime) > GRACE_S:
                path.unlink()

    def _server_file(self, file: str) -> Path | None:
        """Where the server's file would be, None where its folder is not seen or the name is none of ours."""
        if self._slot_dir is None or not self._names.ours(file) or not self._slot_dir.is_dir():
            return None
        return self._slot_dir / file

    def _path(self, model: str, name: str) -> Path:
        if self._fold is None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fold = ignores_case(self._folder)
        return self._folder / encode_name(model, fold=self._fold) / f"{encode_name(name, fold=self._fold)}.json"

    def _free_path(self, model: str, name: str) -> Path:
        """Where to write a record that is new; raises ValueError where something lies that is not ours to replace."""
        path = self._path(model, name)
        if path.exists():
            with suppress(OSError, ValueError, RecursionError):
                if self._is_mine(read_record(path)):
                    return path
            raise ValueError(f"{path} is in the way")
        return path

    def _named(self, record: Record) -> Record:
        """A record with a name that is not another server's."""
        path = self._path(record.model_name, record.cache_name)
        if (record.model_name, record.cache_name) in self._held or not path.exists():
            return record
        with suppress(OSError, ValueError, RecursionError):
            if not self._is_mine(read_record(path)):
                return replace(record, cache_name=name_beside(record.cache_name, self._upstream or ""))
        return record

    def _is_mine(self, record: Record) -> bool:
        return self._upstream is None or record.upstream in ("", self._upstream)

    def _cost(self, held: Held) -> int:
        """Bytes of its files on disks that are seen from here; a hard link costs nothing."""
        sizes: dict[tuple[int, int], int] = {}
        for path in (held.path, held.bin, self._server_file(held.record.file)):
            with suppress(OSError):
                if path is not None:
                    found = path.lstat()
                    sizes[found.st_dev, found.st_ino] = found.st_size
        return sum(sizes.values())

    def _used_at(self, key: Key) -> float:
        return max(self._held[key].record.used_at, self._touched.get(key, 0.0))

    def _warn(self, path: Path, why: str) -> None:
        # A name that is no UTF-8 would break the log.
        line = f"{path} is left alone: {why}".encode("utf-8", "backslashreplace").decode()
        if line not in self._warned:
            self._warned.add(line)
            log.warning("%s", line)
