"""The word that nearhit stops, for what would otherwise last until it is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web


class Stopping:
    """Told as soon as no new connections are accepted; running answers have their time from then on."""

    def __init__(self) -> None:
        """Nobody wants to stop yet."""
        self._told = asyncio.Event()
        self._leaving: set[asyncio.Future[None]] = set()

    @property
    def told(self) -> bool:
        """Whether nearhit stops."""
        return self._told.is_set()

    async def wait(self) -> None:
        """Wait until nearhit stops."""
        await self._told.wait()

    @contextmanager
    def farewell(self) -> Iterator[None]:
        """A block that is soon left once nearhit stops; until then what clients send is still read."""
        left = asyncio.get_running_loop().create_future()
        self._leaving.add(left)
        try:
            yield
        finally:
            self._leaving.discard(left)
            left.set_result(None)

    async def tell(self) -> None:
        """Tell everybody, and wait for those who take leave."""
        self._told.set()
        if self._leaving:
            await asyncio.wait(self._leaving)


STOPPING = web.AppKey("stopping", Stopping)
