"""The running program: event loop, signals, logging, garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from proxy.lines import Lines, lines
from proxy.settings import Settings
from proxy.web.app import make_app
from proxy.web.listen import listening

log = logging.getLogger("nearhit")

_COLLECTOR_THRESHOLDS = (50_000, 20, 50)
"""With these and a frozen start-up heap the collector's pauses of 18-43 ms are gone from the hit path."""


_SWITCH_S = 0.001


def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is told the address once connections are accepted.

    Raises:
        OSError: the address cannot be listened on.
        StorageRefused: the database file is not ours, or too new.
    """
    # The loop waits at most this long for a thread that prepares a long prompt; the usual 5 ms would be felt.
    sys.setswitchinterval(_SWITCH_S)
    with lines(sys.stderr) as out, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        _set_up_logging(settings, out)
        runner.run(_serve(settings, announce))


async def _serve(settings: Settings, announce: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listen = settings.listen
    async with listening(make_app(settings), listen.host, listen.port, settings.limits.shutdown_s) as (host, port):
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECTOR_THRESHOLDS)
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
        log.info("stopping: running answers get %g s", settings.limits.shutdown_s)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


def _set_up_logging(settings: Settings, out: Lines) -> None:
    handler = _LinesHandler(out)
    handler.setFormatter(_JsonLines() if settings.log.format == "json" else _TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nearhit").setLevel(settings.log.level.upper())


class _LinesHandler(logging.Handler):
    def __init__(self, out: Lines) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.put(f"{self.format(record)}\n")


class _TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields)
