"""The files of an installation that only its user may read: the local admin token and the secret. Blocking."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("nearhit")


@dataclass(frozen=True, slots=True)
class PrivateFiles:
    """The token for the routes of this machine, the installation's secret, and whether the next run has them, too."""

    token: str
    secret: bytes
    lasting: bool


def private_files(data: Path) -> PrivateFiles:
    """Read them; each is made when it is missing."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        token = _kept(data / "admin.token", secrets.token_urlsafe(32).encode()).decode("ascii").strip()
        return PrivateFiles(token, _kept(data / "secret", secrets.token_bytes(32)), lasting=True)
    except (OSError, ValueError) as error:
        log.warning("%s: %s: no local admin token, and credentials are told apart for this run only", data, error)
    return PrivateFiles(secrets.token_urlsafe(32), secrets.token_bytes(32), lasting=False)


def _kept(path: Path, fresh: bytes) -> bytes:
    """The content of a private file, `fresh` where there was none; whoever else makes it first wins."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(fresh)
        # Linking a finished file, where the name is free, shows nobody a half-written one.
        with suppress(FileExistsError):
            os.link(scratch, path)
    finally:
        scratch.unlink()
    return path.read_bytes() or fresh
