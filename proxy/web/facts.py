"""What storage remembers of an upstream between two runs."""

from __future__ import annotations

import logging

from proxy.web.clock import now_ms
from storage.base import StorageError
from storage.store import Store

log = logging.getLogger("nearhit")

_VECTORS = "canary"


class Facts:
    """The facts of one upstream; without storage, there are none. No method raises."""

    def __init__(self, store: Store, origin: str) -> None:
        """`origin` tells upstreams apart."""
        self._store = store
        self._origin = origin

    async def get(self, name: str) -> str | None:
        """What was noted last."""
        try:
            return await self._store.fact(self._origin, name)
        except StorageError:
            return None

    async def note(self, name: str, value: str) -> None:
        """Remember it in the place of what was noted before."""
        try:
            await self._store.note(self._origin, name, value, now_ms())
        except StorageError as error:
            log.warning("what was learned of the upstream (%s) could not be kept: %s", name, error)

    async def load(self) -> str | None:
        """See `proxy.upstream.canary.Vectors`."""
        return await self.get(_VECTORS)

    async def keep(self, text: str) -> None:
        """See `proxy.upstream.canary.Vectors`."""
        await self.note(_VECTORS, text)
