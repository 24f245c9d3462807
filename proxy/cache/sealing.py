"""Answers that only who asks the same question can read: kept encrypted under a key that is made of the question. Pure.

The store has a digest of that key's source and nothing else of the question, so that what is at rest tells neither
question nor answer. Whoever can guess a whole request, byte for byte, can still tell that it was asked.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from storage.base import Entry

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

_PURPOSE = b"nearhit answer 1"
_NONCE_BYTES = 12


def load() -> None:
    """Import the library, which reads files: for a start that will need it, not for somebody's request."""
    _cipher(b"")


def sealed(entry: Entry, call_digest: bytes) -> Entry:
    """The entry as it may be stored: without words, its answer encrypted (ChaCha20-Poly1305, RFC 8439)."""
    nonce = os.urandom(_NONCE_BYTES)
    hidden = nonce + _cipher(call_digest).encrypt(nonce, entry.answer, entry.key)
    return replace(entry, words=None, near=False, answer=hidden, sealed=True)


def opened(entry: Entry, call_digest: bytes) -> Entry | None:
    """The entry with its answer readable; None where it was sealed by another question, or damaged."""
    if not entry.sealed:
        return entry
    from cryptography.exceptions import InvalidTag

    nonce, hidden = entry.answer[:_NONCE_BYTES], entry.answer[_NONCE_BYTES:]
    try:
        answer = _cipher(call_digest).decrypt(nonce, hidden, entry.key)
    except (InvalidTag, ValueError):
        return None
    return replace(entry, answer=answer)


def _cipher(call_digest: bytes) -> ChaCha20Poly1305:
    # Who keeps questions readable needs no library for this.
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(hashlib.blake2b(call_digest, digest_size=32, person=_PURPOSE).digest())
