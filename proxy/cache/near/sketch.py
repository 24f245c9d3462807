"""MinHash signatures over the shingles of a skeleton, cut into LSH bands. Finds candidates and decides nothing. Pure.

The parameters are pinned here and recorded with every sketch; sketches made with other ones are never compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from hashlib import blake2b, sha256

SHINGLE = 4
"""Characters of a shingle."""
PERMUTATIONS = 64
BANDS = 16
ROWS = PERMUTATIONS // BANDS
SEED = 1
SCHEME = "affine32"
"""datasketch's name for how permutations are made."""

_PROBE = "the quick brown fox jumps over the lazy dog"


def shingles(skeleton: str) -> set[str]:
    """Every run of `SHINGLE` characters, a space at either end included."""
    text = f" {skeleton} "
    return {text[at : at + SHINGLE] for at in range(max(1, len(text) - SHINGLE + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared shingles as a share of all, 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


class Sketcher:
    """Makes signatures and keys under one scheme: these parameters and one version of the normaliser."""

    def __init__(self, normaliser: str) -> None:
        """`normaliser` names what made the skeletons. Loads datasketch, which takes about a second."""
        # Imported here: it brings scipy along, and without the near tier nobody needs it.
        from datasketch import MinHash

        self._new = MinHash
        self._permutations = MinHash(num_perm=PERMUTATIONS, seed=SEED, scheme=SCHEME, hashfunc=zlib.crc32).permutations
        # What datasketch makes of a fixed text stands for whatever else it may change under the same names.
        probe = sha256(b"".join(self._rows(_PROBE))).hexdigest()[:16]
        self.description = (
            f"datasketch {SCHEME}, {PERMUTATIONS} permutations, seed {SEED}, {BANDS} bands x {ROWS} rows, "
            f"char-{SHINGLE} shingles, crc32, probe {probe}; {normaliser}"
        )
        self._salt = sha256(self.description.encode()).digest()[:16]
        self.scheme = int.from_bytes(self._salt[:8], "big", signed=True)

    def band_keys(self, skeleton: str, space: bytes) -> tuple[int, ...]:
        """The LSH keys of a skeleton in a space, as signed 64-bit integers."""
        rows = self._rows(skeleton)
        return tuple(self._key(space, b"%d" % number, row) for number, row in enumerate(rows))

    def digest_keys(self, digests: Sequence[bytes], space: bytes) -> tuple[int, ...]:
        """The keys of equal forms in a space, without repetitions."""
        return tuple(dict.fromkeys(self._key(space, b"=", digest) for digest in digests))

    def _rows(self, skeleton: str) -> list[bytes]:
        minhash = self._new(
            num_perm=PERMUTATIONS, seed=SEED, scheme=SCHEME, hashfunc=zlib.crc32, permutations=self._permutations
        )
        minhash.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles(skeleton)])
        raw = minhash.hashvalues.tobytes()
        width = len(raw) // BANDS
        return [raw[at : at + width] for at in range(0, len(raw), width)]

    def _key(self, space: bytes, kind: bytes, content: bytes) -> int:
        digest = blake2b(kind + b"\n" + content, digest_size=8, key=self._salt, salt=space[:16]).digest()
        return int.from_bytes(digest, "big", signed=True)
