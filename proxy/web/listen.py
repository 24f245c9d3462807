"""The listening socket and the HTTP/1.1 protocol on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from proxy.web.errors import error_response
from proxy.web.stopping import STOPPING

_BACKLOG = 1024
_MAX_FIELD = 32_768
"""Bytes of the request line, and of one header field. Tokens and cookies of some front ends exceed aiohttp's 8 KiB."""

_silent = logging.getLogger("nearhit.http")


class _Protocol(web.RequestHandler):
    """aiohttp's, with malformed requests answered in the OpenAI shape."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        if status == 500:
            _silent.error("unexpected %s while serving %s", type(exc).__name__, request.method)
            response = error_response(500, "nearhit failed; its log says where", "internal_error", kind="server_error")
        else:
            first_line = (message or "malformed request").partition("\n")[0][:200]
            response = error_response(status, f"not a valid HTTP request: {first_line}", "bad_request")
        response.force_close()
        return response

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Send the response; one of aiohttp's own, to what no route takes, is put into the OpenAI shape."""
        # Of an abstract class, an instance is told slowly; nearly all responses are plain ones.
        if type(resp) is not web.Response and isinstance(resp, web.HTTPException):
            resp = _unrouted(request)
        return super().finish_response(request, resp, start_time)


def _unrouted(request: web.BaseRequest) -> web.Response:
    if request.method == "CONNECT":
        message = "nearhit is no forward proxy: give clients its address as their base URL, not as their proxy"
        response = error_response(501, message, "connect_not_supported")
        # What comes next may be of any protocol.
        response.force_close()
        return response
    return error_response(404, "nearhit and the LLM server have paths that begin with /", "not_found")


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int, shutdown_s: float) -> AsyncIterator[tuple[str, int]]:
    """Serve the application for the life of this block; yields the address it listens on.

    Leaving it stops accepting, gives running answers `shutdown_s` seconds, then cancels them and closes the services.

    Raises:
        OSError: the address cannot be listened on.
        StorageRefused: the services cannot start.
    """
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=shutdown_s)
    await runner.setup()
    try:
        server = runner.server
        if server is None:
            raise RuntimeError("the runner has no server after its set-up")
        loop = asyncio.get_running_loop()

        def protocol() -> _Protocol:
            return _Protocol(
                server,
                loop=loop,
                access_log=None,  # type: ignore[arg-type]  # switches aiohttp's own off, as AppRunner does
                auto_decompress=False,
                max_line_size=_MAX_FIELD,
                max_field_size=_MAX_FIELD,
                logger=_silent,
            )

        listener = await loop.create_server(protocol, host, port, backlog=_BACKLOG)
        try:
            yield listener.sockets[0].getsockname()[:2]
        finally:
            listener.close()
            # Once its clean-up begins, aiohttp reads nothing more from clients.
            await app[STOPPING].tell()
    finally:
        await runner.cleanup()
