"""Every directive in every state comes to what docs/http.md says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.web import clock
from tests.conftest import Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, held, numbered, raw
from tests.web import semantics
from tests.web.semantics import AGE_S, LATE_S, RESULTS, STATES, TABLE, TTL_S, Result

Ask = Callable[[str, str], Coroutine[Any, Any, Result]]
_NUMBER = re.compile(r"ttl=(-?)\d+")


@asynccontextmanager
async def state_of(
    name: str, start: StartProxy, model: FakeModel, patch: pytest.MonkeyPatch, questions: list[str]
) -> AsyncIterator[Proxy]:
    """A proxy that is in this state for each of the questions."""
    proxy = await start(cache__ttl_hours=TTL_S / 3600, upstream__busy_retry_s=0)
    model.respond = numbered()
    if name in ("absent", "in flight"):
        async with under_way(proxy, model, questions if name == "in flight" else []):
            yield proxy
        return
    for question in questions:
        assert (await proxy.chat(question)).outcome == "MISS"
    await proxy.settled()
    gone_s = TTL_S + 25 * 3600
    later_s = AGE_S if "fresh" in name else gone_s if "gone" in name else TTL_S + LATE_S
    patch.setattr(proxy.services.backends.first.answers, "_now_ms", lambda: clock.now_ms() + later_s * 1000)
    if "failing" in name:
        model.respond = raw(b'{"error": {"message": "busy"}}', status=503)
    if "away" in name:
        model.loading = True
        await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    yield proxy


@asynccontextmanager
async def under_way(proxy: Proxy, model: FakeModel, questions: list[str]) -> AsyncIterator[None]:
    respond, model.respond = model.respond, held(numbered())
    leaders = [asyncio.create_task(proxy.chat(question)) for question in questions]
    await eventually(lambda: model.started == len(questions))
    model.respond = respond
    yield
    await asyncio.gather(*leaders)


async def asked(proxy: Proxy, model: FakeModel, question: str, directive: str) -> Result:
    headers = {} if directive == "(none)" else {"Cache-Control": directive}
    # Loading is told on every path, and a request counts that was sent.
    before = len(model.generations)
    answer = await proxy.chat(question, headers=headers)
    shown = _NUMBER.sub(r"ttl=\1N", answer.headers["Cache-Status"])
    return Result(answer.status, answer.outcome, shown, asked=len(model.generations) > before)


async def one_by_one(ask: Ask, questions: dict[str, str]) -> dict[str, Result]:
    return {directive: await ask(question, directive) for directive, question in questions.items()}


async def joining(ask: Ask, questions: dict[str, str], proxy: Proxy, model: FakeModel) -> dict[str, Result]:
    # Who joins is answered when the leader is: all others first.
    joins = {
        d: q for d, q in questions.items() if RESULTS[TABLE[d][list(STATES).index("in flight")]].outcome == "JOINED"
    }
    results = await one_by_one(ask, {d: q for d, q in questions.items() if d not in joins})
    before = len(model.generations)
    tasks = {d: asyncio.create_task(ask(q, d)) for d, q in joins.items()}
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == len(joins))
    model.release.set()
    results |= {d: await task for d, task in tasks.items()}
    assert len(model.generations) == before
    return results


@pytest.mark.parametrize("state", STATES)
async def test_every_directive_comes_to_what_the_table_says(
    state: str, start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = {directive: f"question {number}?" for number, directive in enumerate(TABLE)}
    column = list(STATES).index(state)
    expected: dict[str, Any] = {directive: RESULTS[cells[column]] for directive, cells in TABLE.items()}
    async with state_of(state, start, model, monkeypatch, list(questions.values())) as proxy:

        async def ask(question: str, directive: str) -> Result:
            return await asked(proxy, model, question, directive)

        one = joining(ask, questions, proxy, model) if state == "in flight" else one_by_one(ask, questions)
        assert await one == expected


def test_the_page_shows_the_table_that_is_tested() -> None:
    text = semantics.PAGE.read_text()
    assert semantics.page(text) == text, "run: make docs"


def test_every_result_is_of_some_use() -> None:
    assert {cell for cells in TABLE.values() for cell in cells} == set(RESULTS)
    assert {len(cells) for cells in TABLE.values()} == {len(STATES)}
