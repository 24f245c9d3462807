"""Files of entries, as export writes and import reads them: cut into pieces, looked through, gone on with. Blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from proxy.cache.importing import Bad
from proxy.cache.transfer import BadLine, End, Header, LineSplitter, Terms, end_line, read_line

PIECE_LINES = 1000
"""Most lines that are sent at once."""
PIECE_BYTES = 8 * 1024 * 1024
"""What these may weigh, unless one alone weighs more."""

_CHUNK = 1 << 20
_END = b'{"end":'


class TransferError(Exception):
    """The file cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole lines, of which `first` is the number of the first."""

    first: int
    lines: int
    data: bytes


def numbered_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines without their ends, from 1; None for one that is too long."""
    splitter, number = LineSplitter(max_bytes), 0
    while True:
        chunk = file.read(_CHUNK)
        for line in splitter.feed(chunk) if chunk else splitter.end():
            number += 1
            yield number, line
        if not chunk:
            return


class Cutter:
    """Cuts a file into pieces to send, and remembers whether it came to its end line."""

    def __init__(self, file: BinaryIO, max_line_bytes: int, from_line: int) -> None:
        """Begin at the line `from_line`."""
        self._file = file
        self._max_line_bytes = max_line_bytes
        self._from_line = from_line
        self._last = b""

    def pieces(self) -> Iterator[Piece | Bad]:
        """The pieces, and lines that are too long to be sent."""
        waiting: list[bytes] = []
        first, weight = self._from_line, 0
        for number, line in numbered_lines(self._file, self._max_line_bytes):
            if number < self._from_line:
                continue
            if line is None:
                if waiting:
                    yield _piece(first, waiting)
                yield Bad(number, f"expected at most {self._max_line_bytes} bytes")
                waiting, first, weight = [], number + 1, 0
                continue
            waiting.append(line)
            weight += len(line)
            self._last = line if line.strip() else self._last
            if len(waiting) >= PIECE_LINES or weight >= PIECE_BYTES:
                yield _piece(first, waiting)
                waiting, first, weight = [], number + 1, 0
        if waiting:
            yield _piece(first, waiting)

    @property
    def ended(self) -> bool:
        """Whether the last line is one that ends an export."""
        try:
            return isinstance(msgspec.json.decode(self._last, type=End), End)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False


def _piece(first: int, lines: list[bytes]) -> Piece:
    return Piece(first, len(lines), b"\n".join(lines) + b"\n")


def bad_lines(file: BinaryIO, terms: Terms, from_line: int, read: Callable[[int], None]) -> Iterator[Bad]:
    """The lines that are no entries that may be stored; `read` hears how many bytes were looked through."""
    for number, line in numbered_lines(file, terms.max_line_bytes):
        if line is None:
            yield Bad(number, f"expected at most {terms.max_line_bytes} bytes")
            continue
        read(len(line) + 1)
        if number < from_line or not line or line.isspace():
            continue
        try:
            read_line(line, terms)
        except BadLine as error:
            yield Bad(number, str(error))


@dataclass(slots=True)
class Part:
    """An export on its way into a file; `mark` is that of the last entry written."""

    path: Path
    file: BinaryIO
    mark: int = 0
    entries: int = 0
    filters: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False

    def write(self, lines: list[bytes]) -> None:
        """Add whole lines as they came from nearhit: a header only at the beginning, the end not at all."""
        for line in lines:
            if line.startswith(_END):
                self.complete = True
            elif not line.startswith(b'{"nearhit_export":'):
                self.entries += 1
                self.file.write(line + b"\n")
            elif self.file.tell() == 0:
                self.file.write(line + b"\n")

    def finish(self) -> None:
        """End the file and give it its name."""
        self.file.write(end_line(self.entries))
        self.file.flush()
        os.fsync(self.file.fileno())
        _part_of(self.path).replace(self.path)


def begin(path: Path) -> Part:
    """A new part of an export to `path`, in the place of an earlier one."""
    return Part(path, _open(path, os.O_TRUNC))


def go_on(path: Path) -> Part:
    """The part that was begun, without what was not written to its end.

    Raises:
        TransferError: there is none, or it is none.
    """
    if not _part_of(path).is_file():
        raise TransferError(f"{_part_of(path)} is not there: there is nothing to go on with")
    part = Part(path, _open(path, 0))
    size, last = 0, b""
    header: Header | None = None
    for line in part.file:
        if not line.endswith(b"\n"):
            break
        if header is None:
            header = _header(path, line)
        elif line.startswith(_END):
            break
        else:
            part.entries += 1
            last = line
        size += len(line)
    part.file.truncate(size)
    part.file.seek(size)
    if header is not None:
        part.filters = header.filters
    if last:
        part.mark = _mark(path, last)
    return part


class _Marked(msgspec.Struct):
    mark: int


def _header(path: Path, line: bytes) -> Header:
    try:
        return msgspec.json.decode(line, type=Header)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _not_ours(path) from None


def _mark(path: Path, line: bytes) -> int:
    try:
        return msgspec.json.decode(line, type=_Marked).mark
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _not_ours(path) from None


def _not_ours(path: Path) -> TransferError:
    return TransferError(f"{_part_of(path)} is not the beginning of an export: delete it and begin anew")


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _open(path: Path, more: int) -> BinaryIO:
    descriptor = os.open(_part_of(path), os.O_RDWR | os.O_CREAT | more, 0o600)
    # It may have been there, open to others.
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "r+b")
