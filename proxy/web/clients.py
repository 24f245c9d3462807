"""Named clients: who they are, told by their keys, and what is theirs."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Client:
    """One client of the settings.

    `namespace` is the digest that it shares answers under. `may_store`: its answers are kept; `uses_cache`: it is
    answered from the cache at all; `is_admin`: it may use the routes under `/-/`.
    """

    name: str
    namespace: bytes
    may_store: bool = True
    uses_cache: bool = True
    is_admin: bool = False


CLIENT = web.RequestKey("client", Client)
"""Whose request it is, where clients are named; set before a handler sees it."""
