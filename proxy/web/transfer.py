"""Routes that carry entries from one store to another: export and import, as lines of JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime

from aiohttp import web

from proxy import __version__
from proxy.cache.importing import BATCH, BATCH_BYTES, Importer, Place, Refused, Tally
from proxy.cache.selection import BadSelection, Listing, read_listing
from proxy.cache.transfer import LineSplitter, Terms, end_line, entry_line, header_line
from proxy.web.accesslog import Exchange
from proxy.web.clock import now_ms
from proxy.web.errors import error_response
from proxy.web.services import Services
from storage.base import StorageError
from storage.listing import Listed, Page

LINES = "application/x-ndjson"
"""The media type of lines of JSON; none is registered."""

_PAGE = 256
_MOST_EXPORTS = 4
EXPORTS = web.AppKey("exports", asyncio.Semaphore)
"""What an export holds while it runs."""
_OF_A_LIST = ("order", "limit")
_HIGHEST_LINE = 1 << 53
_BAD = ("refuse", "skip")
_OF_AN_IMPORT = ("bad", "first")


async def exporting(app: web.Application) -> AsyncIterator[None]:
    """Only so many exports run at a time: each holds pages in memory, and its readers may be slow."""
    app[EXPORTS] = asyncio.Semaphore(_MOST_EXPORTS)
    yield


async def exported(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    """All entries that are meant, oldest first; without the last line where the store failed in the middle."""
    if request.app[EXPORTS].locked():
        return _unavailable(f"{_MOST_EXPORTS} exports run already; try again when one of them is done")
    async with request.app[EXPORTS]:
        return await _export(request, services, exchange)


async def _export(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    try:
        asked = _chosen(request)
        # What was stored a moment ago may wait to be written.
        await services.buffer.flush()
        page = await _page(services, asked, asked.mark)
    except BadSelection as bad:
        return error_response(400, str(bad), "bad_selection")
    except StorageError:
        return _unavailable("the store does not answer; try again")
    response = web.StreamResponse(headers={"Content-Type": LINES})
    await response.prepare(request)
    filters = {name: value for name, value in request.query.items() if name != "after"}
    await _send(response, exchange, header_line(datetime.now(UTC).isoformat(timespec="seconds"), filters))
    try:
        await _send_pages(services, asked, page, response, exchange)
    except StorageError as error:
        exchange.reason = type(error).__name__
        services.metrics.storage_failed("export", error)
    return response


async def _send_pages(
    services: Services, asked: Listing, page: Page, response: web.StreamResponse, exchange: Exchange
) -> None:
    entries = 0
    while True:
        lines, count = await asyncio.to_thread(_lines, page.listed)
        entries += count
        if count:
            await _send(response, exchange, lines)
        if page.mark is None:
            await _send(response, exchange, end_line(entries))
            return
        page = await _page(services, asked, page.mark)


async def _page(services: Services, asked: Listing, mark: int) -> Page:
    return await services.store.select(asked.which, mark, _PAGE, answers=True)


def _lines(page: Iterable[Listed]) -> tuple[bytes, int]:
    lines = [line for line in map(entry_line, page) if line is not None]
    return b"".join(lines), len(lines)


async def _send(response: web.StreamResponse, exchange: Exchange, data: bytes) -> None:
    exchange.sent += len(data)
    await response.write(data)


def _chosen(request: web.Request) -> Listing:
    for name in _OF_A_LIST:
        if name in request.query:
            raise BadSelection(f"{name}: an export has all entries that are meant, in the order in which they came")
    return read_listing(request.query.items(), now_ms())


async def imported(request: web.Request, services: Services, exchange: Exchange) -> web.StreamResponse:
    """Store the entries in the body, and tell what became of them."""
    for name in request.query:
        if name not in _OF_AN_IMPORT:
            message = f"{ascii(name)[1:-1][:60]}: no such field; there are {', '.join(_OF_AN_IMPORT)}"
            return error_response(400, message, "bad_query")
    bad, first = request.query.get("bad", _BAD[0]), request.query.get("first", "1")
    if bad not in _BAD:
        return error_response(400, f"bad: expected {' or '.join(_BAD)}", "bad_query")
    if not (first.isascii() and first.isdigit() and 1 <= int(first[:20]) <= _HIGHEST_LINE):
        return error_response(400, "first: expected the number of the first line, 1 or more", "bad_query")
    importer = _importer(services, skip_bad=bad == "skip", first=int(first))
    try:
        # What waits to be written would take the place of what is newer.
        await services.buffer.flush()
        async for lines in _batches(request, services, importer.terms.max_line_bytes):
            await importer.take(lines)
    except Refused as refused:
        message = f"{refused}; the lines before it are in: correct it and send the rest, or send all with ?bad=skip"
        return _stopped(400, message, "bad_line", importer.tally)
    except StorageError as error:
        exchange.reason = type(error).__name__
        message = f"the store cannot be written now; go on with line {importer.next_line}"
        return _stopped(503, message, "storage_unavailable", importer.tally)
    except TimeoutError:
        message = f"nothing came for limits.request_timeout_s; go on with line {importer.next_line}"
        return _stopped(408, message, "request_timeout", importer.tally)
    except web.RequestPayloadError:
        message = f"the request body is broken; go on with line {importer.next_line}"
        return _stopped(400, message, "broken_body", importer.tally)
    return web.json_response({"version": __version__, **importer.tally.as_json()})


def _importer(services: Services, *, skip_bad: bool, first: int) -> Importer:
    cache = services.settings.cache

    def added(keys: Sequence[bytes]) -> None:
        for key in keys:
            services.presence.add(key)

    return Importer(
        services.store,
        services.room,
        [Place(one.upstream.origin, one.tracker.current.fingerprint) for one in services.backends],
        Terms(now_ms(), services.backends.first.answers.max_answer_bytes, sealed_only=cache.store_words == "digest"),
        skip_bad=skip_bad,
        first=first,
        added=added,
        replaced=services.hot.clear,
    )


async def _batches(
    request: web.Request, services: Services, max_line_bytes: int
) -> AsyncIterator[Sequence[bytes | None]]:
    """The lines of the body, as many at a time as are stored at once.

    Raises:
        TimeoutError: nothing came for too long.
        RequestPayloadError: the body broke off. Of the line that it broke off in, nothing is given.
    """
    splitter = LineSplitter(max_line_bytes)
    waiting: list[bytes | None] = []
    weight = 0
    async for chunk in _chunks(request, services.settings.limits.request_timeout_s):
        for line in splitter.feed(chunk):
            waiting.append(line)
            weight += len(line or b"")
            if len(waiting) >= BATCH or weight >= BATCH_BYTES:
                yield waiting
                waiting, weight = [], 0
    waiting += splitter.end()
    if waiting:
        yield waiting


async def _chunks(request: web.Request, timeout_s: float) -> AsyncIterator[bytes]:
    while True:
        async with asyncio.timeout(timeout_s):
            chunk = await request.content.readany()
        if not chunk:
            return
        yield chunk


def _unavailable(message: str) -> web.Response:
    return error_response(503, message, "storage_unavailable", kind="unavailable_error")


def _stopped(status: int, message: str, code: str, tally: Tally) -> web.Response:
    """An error after a part of the work was done: it tells of both."""
    kind = "unavailable_error" if status == 503 else "invalid_request_error"
    error = {"message": message, "type": kind, "code": code}
    return web.json_response({"error": error, "import": tally.as_json()}, status=status)
