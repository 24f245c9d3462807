"""Asks questions of a running nearhit, some at a time, and waits where the LLM server is busy or away."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any

import aiohttp
from yarl import URL

from proxy.warming.questions import Question, Unusable

_READ_AHEAD = 64
_CONNECT_S = 10.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_BUSY = (429, 503)
_KEY_REFUSED = (401, 403)
_KNOWN = ("HIT", "NEAR", "JOINED", "STALE")
_AWAY = "upstream_unreachable"
_MOST_TOLD = 100


class Stop(StrEnum):
    """Why not all was asked."""

    GAVE_UP = "gave up"
    KEY_REFUSED = "the LLM server does not accept the key"
    NO_NEARHIT = "what answers there is no nearhit, or one whose answers are not cached"


@dataclass(frozen=True, slots=True)
class Target:
    """Where questions go: a base URL, with a key or "". After `give_up_s` seconds of nothing but trouble, it ends."""

    base: str
    key: str
    concurrency: int
    give_up_s: float


@dataclass(slots=True)
class Outcomes:
    """What became of the questions: `known` had an answer already, `not_kept` got one that is not kept."""

    asked: int = 0
    known: int = 0
    not_kept: int = 0
    failed: int = 0
    trouble: list[Unusable] = field(default_factory=list)
    stopped: Stop | None = None
    why: str = ""

    @property
    def done(self) -> int:
        """How many are through."""
        return self.asked + self.known + self.not_kept + self.failed

    def tell(self, line: int, why: str) -> None:
        """Keep the reason for a line's trouble, as long as there are not too many."""
        if len(self.trouble) < _MOST_TOLD:
            self.trouble.append(Unusable(line, why))


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    outcome: str | None
    detail: str
    code: str
    message: str
    retry_after_s: float | None


class Asker:
    """Asks all questions of an iterator."""

    def __init__(
        self,
        target: Target,
        questions: Iterator[Question],
        outcomes: Outcomes,
        step: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """`outcomes` tells at any time how far it came.

        `step` hears of each question that is through, `say` what is going on.
        """
        self.outcomes = outcomes
        self._target = target
        self._questions = questions
        self._step = step
        self._say = say
        self._read: deque[Question] = deque()
        self._reading = asyncio.Lock()
        self._trouble_since: float | None = None
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Ask them; cancelling it leaves `outcomes` as far as they came."""
        # What is stale is to be asked again, not to be given for want of an answer.
        headers = {"Content-Type": "application/json", "Cache-Control": "max-stale=0, stale-if-error=0"}
        # A model on a small box may be silent for minutes.
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=self._target.concurrency)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(self._target.concurrency):
                group.create_task(self._work(session))

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while not self._over.is_set():
            question = await self._next()
            if question is None:
                return
            await self._ask(session, question)

    async def _next(self) -> Question | None:
        async with self._reading:
            if not self._read:
                # Files are read in a thread: standard input may make us wait.
                self._read.extend(await asyncio.to_thread(lambda: list(islice(self._questions, _READ_AHEAD))))
            return self._read.popleft() if self._read else None

    async def _ask(self, session: aiohttp.ClientSession, question: Question) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._over.is_set():
            reply = await self._sent(session, question)
            if isinstance(reply, _Reply) and not _may_pass(reply):
                self._trouble_since = None
                self._say("asking")
                self._judge(question, reply)
                return
            why = reply if isinstance(reply, str) else f"HTTP {reply.status}: {reply.message}"
            asked_for = reply.retry_after_s if isinstance(reply, _Reply) else None
            if not await self._wait(max(pause_s, asked_for or 0), why):
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _wait(self, pause_s: float, why: str) -> bool:
        """Whether it is worth trying again, now."""
        now = time.monotonic()
        if self._trouble_since is None:
            self._trouble_since = now
        left_s = self._target.give_up_s - (now - self._trouble_since)
        if left_s <= 0:
            self._stop(Stop.GAVE_UP, why)
            return False
        self._say(f"waiting, {round(left_s)} s at most: {why}")
        try:
            async with asyncio.timeout(min(pause_s, left_s)):
                await self._over.wait()
        except TimeoutError:
            return True
        return False

    def _stop(self, stop: Stop, why: str) -> None:
        if self.outcomes.stopped is None:
            self.outcomes.stopped, self.outcomes.why = stop, why
        self._over.set()

    async def _sent(self, session: aiohttp.ClientSession, question: Question) -> _Reply | str:
        """The reply, or why there was none."""
        # As it stands: the query counts, byte for byte.
        url = URL(f"{self._target.base}{question.target}", encoded=True)
        try:
            headers = question.headers(self._target.key)
            async with session.post(url, data=question.body, headers=headers, allow_redirects=False) as response:
                return _reply(response, await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"no nearhit answers at {self._target.base} ({_told(error)})"

    def _judge(self, question: Question, reply: _Reply) -> None:
        outcomes = self.outcomes
        if reply.status in _KEY_REFUSED:
            self._stop(Stop.KEY_REFUSED, reply.message)
            return
        if reply.outcome is None and reply.status not in (400, 408, 413):
            self._stop(Stop.NO_NEARHIT, f"HTTP {reply.status} without X-Cache")
            return
        if not 200 <= reply.status < 300:
            outcomes.failed += 1
            outcomes.tell(question.line, f"HTTP {reply.status}: {reply.message}")
        elif reply.outcome in _KNOWN:
            outcomes.known += 1
        elif reply.outcome == "BYPASS":
            outcomes.not_kept += 1
            outcomes.tell(question.line, f"answered, but not kept: {reply.detail}")
        else:
            outcomes.asked += 1
        self._step()


def _may_pass(reply: _Reply) -> bool:
    return reply.status in _BUSY or (reply.status == 502 and reply.code == _AWAY)


def _reply(response: aiohttp.ClientResponse, content: bytes) -> _Reply:
    error: Any = None
    if response.status >= 400:
        try:
            told = json.loads(content)
            error = told.get("error") if isinstance(told, dict) else None
        except (ValueError, RecursionError):
            error = None
    error = error if isinstance(error, dict) else {}
    detail = response.headers.get("Cache-Status", "").rpartition("detail=")[2]
    return _Reply(
        response.status,
        response.headers.get("X-Cache"),
        detail,
        str(error.get("code", "")),
        str(error.get("message", ""))[:200],
        _seconds(response.headers.get("Retry-After", "")),
    )


def _seconds(text: str) -> float | None:
    return min(float(text), _LONGEST_PAUSE_S) if text.isascii() and text.isdigit() else None


def _told(error: Exception) -> str:
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or type(error).__name__
