"""Slips of the keyboard. Pure."""

from __future__ import annotations

SHORTEST_SLIP = 5
"""In shorter words one letter makes another word too easily."""


def is_one_slip(short: str, long: str) -> bool:
    """Whether one letter more, less or other, or two neighbours exchanged, make one word of the other.

    The optimal string alignment distance is at most 1; `short` is not the longer one.
    """
    if len(long) - len(short) > 1:
        return False
    at = next((k for k, (p, q) in enumerate(zip(short, long, strict=False)) if p != q), len(short))
    if len(long) > len(short):
        return short[at:] == long[at + 1 :]
    other = short[at + 1 :] == long[at + 1 :]
    return other or (short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :])
