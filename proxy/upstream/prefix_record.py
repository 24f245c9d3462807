"""What is known of a kept prefix, and the names of its files: on our disk and on the server's. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import unquote_to_bytes

from msgspec import Meta

Json = Any
Count = Annotated[int, Meta(ge=0)]

_MAC = 8
_SERVER_FILE = re.compile(r"[0-9a-f]{32}\.kv")
_LONGEST = 200
"""Bytes of an encoded name; file systems take 255, suffix included."""
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, whatever follows the dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One prefix: times in seconds since the epoch, `content_length` in characters, `tokens` 0 where unknown.

    `fingerprint`, `lead` and `digest` (of the tokens) are hex. `upstream` is the server's origin; `file` is the name
    under which it keeps the prefix, empty where it keeps none, and `bytes` that file's size. `effective` is None until
    replies have told. `body` is the lead as a request's fields; None where it is not to be kept readable. `seconds` is
    what seeding took (0: unknown); `slow`: restoring it took longer. `restored`: some call had it restored.
    """

    cache_name: str
    model_name: str
    created_at: float
    modified_at: float
    used_at: float
    content_length: Count
    source: Literal["config", "learned", "api", "server"]
    tokens: Count = 0
    bytes: Count = 0
    fingerprint: str = ""
    upstream: str = ""
    lead: str = ""
    digest: str = ""
    file: str = ""
    effective: bool | None = None
    seconds: float = 0.0
    slow: bool = False
    restored: bool = False
    body: dict[str, Json] | None = None
    version: Literal[1] = 1


def encode_name(name: str, *, fold: bool = False) -> str:
    """A file name for any text, without suffix: percent-encoded, legal on every common file system.

    With `fold`, names that differ by case alone get names that do not. A name that is too long is cut and marked with
    its digest: only `decode_name` of the whole name gets it back.

    Raises:
        ValueError: it is empty, or no valid Unicode.
    """
    if not name:
        raise ValueError("a name must not be empty")
    plain = _PLAIN - frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ") if fold else _PLAIN
    encoded = "".join(c if c in plain else _percent(c) for c in name)
    if encoded[0] == "." or _DEVICES.fullmatch(encoded):
        encoded = _percent(name[0]) + encoded[len(encoded[0]) :]
    if encoded[-1] == ".":
        encoded = encoded[:-1] + "%2E"
    if len(encoded) <= _LONGEST:
        return encoded
    mark = "~" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return re.sub(r"(%[0-9A-F]?)?\Z", "", encoded[: _LONGEST - len(mark)]) + mark


def decode_name(encoded: str) -> str:
    """The text of a file name without suffix, people's own ones included.

    Raises:
        ValueError: it is empty, or no valid UTF-8.
    """
    name = unquote_to_bytes(encoded.encode()).decode()
    if not name:
        raise ValueError("a name must not be empty")
    return name


def name_beside(name: str, upstream: str) -> str:
    """The name for a prefix of this server's where another server's has the same."""
    return f"{name}@{hashlib.sha256(upstream.encode()).hexdigest()[:8]}"


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


class ServerNames:
    """Names for files on servers, `<32 hex>.kv`; those of one installation are known by a MAC in their last digits."""

    def __init__(self, secret: bytes) -> None:
        """`secret` is the installation's own."""
        self._secret = secret

    def of(self, *parts: bytes) -> str:
        """The name of the file for what these say together: fingerprint and lead, say."""
        digest = hashlib.sha256(self._secret)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big") + part)
        start = digest.hexdigest()[: 32 - _MAC]
        return f"{start}{self._mac(start)}.kv"

    def ours(self, file: str) -> bool:
        """Whether this installation made the name."""
        return is_server_file(file) and hmac.compare_digest(file[32 - _MAC : 32], self._mac(file[: 32 - _MAC]))

    def _mac(self, start: str) -> str:
        return hmac.new(self._secret, start.encode(), hashlib.sha256).hexdigest()[:_MAC]


def is_server_file(file: str) -> bool:
    """Whether it is a name that nearhit gives: nothing else is ever linked or deleted."""
    return _SERVER_FILE.fullmatch(file) is not None


class Ring:
    """Names for a server whose files cannot be deleted: as many as there may be, each overwritten in its turn."""

    def __init__(self, size: int, names: ServerNames, upstream: str = "") -> None:
        """`size` names; `upstream` keeps apart servers that save into one folder."""
        self.files = tuple(names.of(b"ring", upstream.encode(), str(index).encode()) for index in range(size))

    def take(self, used_at: Mapping[str, float]) -> str:
        """The name to save under: one that is not in `used_at`, else the one that was used longest ago.

        Whatever was kept under it is lost with the save. Raises ValueError for a ring of no names.
        """
        return min(self.files, key=lambda file: used_at.get(file, float("-inf")))
