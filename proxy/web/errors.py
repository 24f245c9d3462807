"""nearhit's own errors, in the shape that OpenAI clients understand."""

from __future__ import annotations

import json
import logging
import traceback

from aiohttp import web

from proxy.cache.flight import Interrupted
from proxy.upstream.client import UpstreamBusy, UpstreamError, UpstreamGarbled, UpstreamInterrupted, UpstreamTimeout

log = logging.getLogger("nearhit")

RETRY_AFTER_S = "2"


def error_response(
    status: int, message: str, code: str, *, kind: str = "invalid_request_error", headers: dict[str, str] | None = None
) -> web.Response:
    """`{"error": {"message", "type", "code"}}` with the given status."""
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}})
    return web.Response(status=status, text=body, content_type="application/json", headers=headers)


def upstream_failure(error: UpstreamError | Interrupted) -> web.Response:
    """What a client hears when no answer could be had: 502, 503 or 504, and when to try again."""
    retry = {"Retry-After": RETRY_AFTER_S}
    if isinstance(error, Interrupted):
        return error_response(503, "nearhit is stopping", "stopping", kind="unavailable_error", headers=retry)
    if isinstance(error, UpstreamBusy):
        busy = {"Retry-After": str(error.retry_after_s)}
        return error_response(503, str(error), "upstream_busy", kind="unavailable_error", headers=busy)
    if isinstance(error, UpstreamTimeout):
        message = "the LLM server did not answer within upstream.read_timeout_s"
        return error_response(504, message, "upstream_timeout", kind="server_error", headers=retry)
    if isinstance(error, UpstreamGarbled):
        message = "the LLM server's answer is not HTTP that nearhit can read"
        return error_response(502, message, "upstream_garbled", kind="server_error", headers=retry)
    if isinstance(error, UpstreamInterrupted):
        message = "the LLM server broke off its answer"
        return error_response(502, message, "upstream_interrupted", kind="server_error", headers=retry)
    message = "the LLM server cannot be reached: is it running, and is upstream.url right?"
    return error_response(502, message, "upstream_unreachable", kind="server_error", headers=retry)


def complain(error: Exception) -> None:
    """Log a fault of ours that costs no client its answer."""
    # Messages of exceptions may quote what a client wrote: name the kind and the place only.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    log.error(
        "%s at %s:%s while looking up an answer; the call went upstream",
        type(error).__name__,
        frame.filename,
        frame.lineno,
    )
