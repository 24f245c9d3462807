"""One record of a kept prefix on disk, and the names that its path says. Blocking."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from proxy.upstream.prefix_record import Record, decode_name, encode_name

_LARGEST_JSON = 16 * 1024 * 1024


class PrefixFilesError(OSError):
    """Says in one line what could not be done, and why. The record concerned is as it was, on disk too."""


@dataclass(frozen=True, slots=True)
class Held:
    """A record and its JSON file."""

    record: Record
    path: Path

    @property
    def bin(self) -> Path:
        """The server's file once more."""
        return self.path.with_suffix(".bin")


def read_record(path: Path) -> Record:
    """The record in a file, with the names that its path says. Raises OSError or ValueError where it is none."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_JSON:
        raise ValueError("not a file of ours")
    record = msgspec.json.decode(path.read_bytes(), type=Record)
    model = _name(path.parent.name, record.model_name)
    return replace(record, model_name=model, cache_name=_name(path.stem, record.cache_name))


def _name(encoded: str, said: str) -> str:
    """The name that a file name stands for; what the content says counts only where that has this very file name."""
    with suppress(ValueError):
        if encoded in (encode_name(said), encode_name(said, fold=True)):
            return said
    return decode_name(encoded)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say of whatever goes wrong in this block that `what` could not be done: raises PrefixFilesError."""
    try:
        yield
    except OSError as error:
        raise PrefixFilesError(f"{what}: {error.strerror or type(error).__name__}") from error
    except (ValueError, TypeError) as error:
        raise PrefixFilesError(f"{what}: {error}") from error
