"""Stores with many near entries, filled by processes of their own so that the memory of the caller stays its own."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Lock
from pathlib import Path

from bench.load import Invalid
from bench.prompts import prompt
from proxy.cache.near import matcher
from proxy.cache.near.prompt import Prompt
from proxy.cache.near.sketch import Sketcher
from storage.base import Entry, Put, Sketch
from storage.sqlite import open_sqlite

_BATCH = 25_000
"""Band keys are hashes, so that each batch touches most pages of their table: few large batches are written faster."""
_DISTINCT = 10_000
_APART = 37
_ANSWER = b"{}"
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Stock:
    """What a store has. Spaces take turns; with several, entries of different spaces may have the same prompt.

    With a single one, the entry of a number has the prompt of `stride` times this number.
    """

    path: Path
    entries: int
    spaces: int = 1
    stride: int = 1

    def prompt_of(self, number: int) -> str:
        """The words of an entry."""
        if self.spaces == 1:
            return prompt(number * self.stride)
        return prompt((number // self.spaces + _APART * (number % self.spaces)) % _DISTINCT)

    def space_of(self, number: int) -> bytes:
        """The space of an entry."""
        return hashlib.sha256(b"space %d" % (number % self.spaces)).digest()

    def key_of(self, number: int) -> bytes:
        """The key of an entry."""
        return hashlib.sha256(b"key %d" % number).digest()


def fill(stocks: Sequence[Stock]) -> float:
    """Make and fill the stores; how many seconds it took.

    Raises:
        Invalid: a process failed.
    """
    begun = time.monotonic()
    context = multiprocessing.get_context("spawn")
    workers = os.cpu_count() or 1
    for stock in stocks:
        lock = context.Lock()
        asyncio.run(_create(stock.path))
        with ExitStack() as stack:
            filling = [
                context.Process(target=_fill, args=(stock, n, workers, lock), daemon=True) for n in range(workers)
            ]
            for process in filling:
                process.start()
                stack.callback(_end, process)
            for process in filling:
                process.join()
                if process.exitcode:
                    raise Invalid(f"filling {stock.path.name} failed")
    return time.monotonic() - begun


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.terminate()
    process.join()


async def _create(path: Path) -> None:
    async with open_sqlite(path):
        pass


def _fill(stock: Stock, worker: int, workers: int, lock: Lock) -> None:
    # The caller hears of Ctrl-C, too, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_fill_share(stock, worker, workers, lock))


async def _fill_share(stock: Stock, worker: int, workers: int, lock: Lock) -> None:
    puts = _puts(stock, worker, workers)
    async with open_sqlite(stock.path) as store:
        for _ in range(0, stock.entries, _BATCH):
            # Made while another process writes.
            batch = [put for _, put in zip(range(_BATCH), puts, strict=False)]
            if not batch:
                return
            with lock:
                await store.write(batch)


def _puts(stock: Stock, worker: int, workers: int) -> Iterator[Put]:
    loaded = matcher.load()
    sketcher = _Sketcher(loaded.description.partition("; ")[2])
    if sketcher.scheme != loaded.scheme:
        raise Invalid("entries would be sketched under another scheme than they are looked up with")
    now_ms = time.time_ns() // 1_000_000
    for number in range(worker, stock.entries, workers):
        words, space = stock.prompt_of(number), stock.space_of(number)
        yield Put(entry_of(stock, number, words, now_ms), _sketched(loaded, sketcher, words, space))


def _sketched(loaded: matcher.Matcher, sketcher: Sketcher, words: str, space: bytes) -> Sketch:
    prepared = _remembered(loaded, words)
    keys = (*sketcher.digest_keys(prepared.digests(), space), *sketcher.band_keys(prepared.skeleton, space))
    return Sketch(sketcher.scheme, prepared.skeleton, keys)


@functools.lru_cache(maxsize=12_000)
def _remembered(loaded: matcher.Matcher, words: str) -> Prompt:
    return loaded.prepare(words)


class _Sketcher(Sketcher):
    """Remembers signatures: the same prompts in many spaces have the same."""

    @functools.lru_cache(maxsize=12_000)  # noqa: B019 - there is one for the life of the process
    def _rows(self, skeleton: str) -> list[bytes]:
        return super()._rows(skeleton)


def entry_of(stock: Stock, number: int, words: str, now_ms: int) -> Entry:
    """An entry with these words."""
    return Entry(
        key=stock.key_of(number),
        key_version=1,
        namespace=b"",
        space=stock.space_of(number),
        upstream="http://127.0.0.1:8080",
        fingerprint=hashlib.sha256(b"model").digest(),
        endpoint="chat",
        model="tiny-1b-instruct",
        words=words,
        stored_ms=now_ms,
        expires_ms=now_ms + _DAY_MS,
        cost_ms=1_200,
        prompt_tokens=52,
        completion_tokens=71,
        usage_known=True,
        answer=_ANSWER,
        near=True,
    )
