"""The word that nearhit stops, for what would otherwise last until it is cut off."""

from __future__ import annotations

import asyncio

from aiohttp import web

STOPPING = web.AppKey("stopping", asyncio.Event)
"""Set as soon as no new connections are accepted; running answers have their time from then on."""


def tells_of_stopping(app: web.Application) -> None:
    """Have the application set `STOPPING` when it stops."""
    stopping = app[STOPPING] = asyncio.Event()

    async def tell(app: web.Application) -> None:
        del app
        stopping.set()

    app.on_shutdown.append(tell)
