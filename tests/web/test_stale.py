"""An answer past its time is given where its server fails, or where its client takes it; and never otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.web import clock
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, error, held, numbered, raw
from tests.web.test_exact_tier import said
from tests.web.test_identity import props

HOUR_S = 3600


class Later:
    """The clock of a proxy's answers, which can be moved on."""

    def __init__(self, proxy: Proxy, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        answers = proxy.services.backends.first.answers
        patch.setattr(answers, "_now_ms", lambda: clock.now_ms() + round(self.seconds * 1000))


async def stored(start: StartProxy, model: FakeModel, patch: pytest.MonkeyPatch, **options: Any) -> tuple[Proxy, Later]:
    """A proxy that keeps answers for an hour, and has one that it got an hour and a minute ago."""
    proxy = await start(**{"cache__ttl_hours": 1, "upstream__busy_retry_s": 0, **options})
    model.respond = numbered()
    assert (await proxy.chat("x")).outcome == "MISS"
    await proxy.settled()
    later = Later(proxy, patch)
    later.seconds = HOUR_S + 60
    return proxy, later


def asking(directives: str) -> dict[str, str]:
    return {"Cache-Control": directives}


@pytest.mark.parametrize("status", [500, 502, 503, 504])
@pytest.mark.parametrize("form", [{}, {"stream": True}])
async def test_a_stale_answer_stands_in_for_a_server_that_fails(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, status: int, form: dict[str, Any]
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    model.respond = raw(b'{"error": {"message": "no"}}', status=status)
    answer = await proxy.chat("x", **form)
    assert (answer.status, answer.outcome, said(answer)) == (200, "STALE", "answer 1")
    assert answer.headers["Cache-Status"] == f"nearhit; fwd=stale; fwd-status={status}; detail=stale"
    assert int(answer.headers["Age"]) in range(HOUR_S + 60, HOUR_S + 120)
    assert proxy.services.metrics.value("nearhit_requests_total", {"endpoint": "chat", "outcome": "STALE"}) == 1
    assert (await proxy.chat("y", **form)).status == status


async def test_a_stale_answer_stands_in_for_a_server_that_hangs_up(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)

    async def hang_up(model: FakeModel, request: Any, asked: Any) -> Any:
        request.transport.abort()
        raise ConnectionResetError

    model.respond = hang_up
    answer = await proxy.chat("x")
    assert (answer.outcome, said(answer)) == ("STALE", "answer 1")
    assert answer.headers["Cache-Status"] == "nearhit; fwd=stale; detail=stale"


async def test_a_server_that_is_known_to_be_away_is_not_waited_for(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    before = model.started
    model.loading = True
    await eventually(lambda: proxy.services.backends.first.tracker.current.away)
    answer = await proxy.chat("x")
    assert (answer.outcome, said(answer), model.started) == ("STALE", "answer 1", before)
    assert answer.headers["Cache-Status"].startswith("nearhit; hit; ttl=-")
    assert answer.headers["Cache-Status"].endswith("; detail=stale")
    assert (await proxy.chat("x", headers=asking("stale-if-error=0"))).status == 503


async def test_a_server_that_is_back_is_asked(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    fresh = await proxy.chat("x")
    assert (fresh.outcome, said(fresh), fresh.headers["Cache-Status"]) == ("MISS", "answer 2", "nearhit; fwd=stale")
    await proxy.settled()
    assert (await proxy.chat("x")).outcome == "HIT"


async def test_a_queue_that_is_full_is_stood_in_for(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"upstream__max_concurrency": 1, "upstream__max_waiting": 0}
    proxy, _ = await stored(start, model, monkeypatch, **options)
    model.respond = held(numbered())
    other = asyncio.create_task(proxy.chat("something else"))
    await eventually(lambda: model.started == 2)
    answer = await proxy.chat("x")
    assert (answer.outcome, said(answer)) == ("STALE", "answer 1")
    assert (await proxy.chat("x", headers=asking("stale-if-error=0"))).status == 503
    model.release.set()
    await other


FORBIDDING = [
    "stale-if-error=0",
    "no-cache",
    "max-age=100",
    "max-age=100000000",
    "min-fresh=1",
    "max-stale=5",
    "no-store",
]


@pytest.mark.parametrize("directives", FORBIDDING)
async def test_a_client_can_forbid_it(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, directives: str
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    model.respond = raw(b"{}", status=500)
    assert (await proxy.chat("x", headers=asking(directives))).status == 500


@pytest.mark.parametrize(
    ("directives", "served"),
    [
        ("stale-if-error=120", True),
        ("stale-if-error=30", False),
        ("stale-if-error=999999999", True),
        ("max-age=100, stale-if-error=4000", True),
        ("max-age=100, stale-if-error=10", False),
    ],
)
async def test_a_client_can_say_how_stale_it_may_be(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, directives: str, served: bool
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    model.respond = raw(b"{}", status=500)
    answer = await proxy.chat("x", headers=asking(directives))
    assert (answer.outcome == "STALE", answer.status) == ((True, 200) if served else (False, 500))


async def test_a_fresh_answer_that_is_too_old_for_a_client_stands_in_where_that_client_says_so(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, later = await stored(start, model, monkeypatch)
    later.seconds = 600
    model.respond = raw(b"{}", status=500)
    assert (await proxy.chat("x", headers=asking("max-age=100"))).status == 500
    answer = await proxy.chat("x", headers=asking("max-age=100, stale-if-error=900"))
    assert (answer.outcome, answer.headers["Cache-Status"]) == (
        "STALE",
        "nearhit; fwd=request; fwd-status=500; detail=stale",
    )


async def test_beyond_its_grace_it_is_gone(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, later = await stored(start, model, monkeypatch, cache__stale_if_error_hours=0.5)
    model.respond = raw(b"{}", status=500)
    later.seconds = 1.49 * HOUR_S
    assert (await proxy.chat("x")).outcome == "STALE"
    later.seconds = 1.51 * HOUR_S
    assert (await proxy.chat("x")).status == 500
    assert (await proxy.chat("x", headers=asking("max-stale"))).status == 500


async def test_it_can_be_switched_off(start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, _ = await stored(start, model, monkeypatch, cache__stale_if_error_hours=0)
    model.respond = raw(b"{}", status=500)
    assert (await proxy.chat("x")).status == 500


@pytest.mark.parametrize(
    ("directives", "served"), [("max-stale", True), ("max-stale=120", True), ("max-stale=30", False)]
)
async def test_a_client_may_take_what_is_stale_while_all_is_well(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, directives: str, served: bool
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)
    answer = await proxy.chat("x", headers=asking(directives))
    assert (answer.outcome, said(answer)) == (("STALE", "answer 1") if served else ("MISS", "answer 2"))
    assert len(model.generations) == (1 if served else 2)


async def test_what_is_about_now_never_stands_in(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, later = await stored(start, model, monkeypatch, cache__volatile_ttl_s=60)
    question = "What is the weather like today?"
    assert (await proxy.chat(question)).outcome == "MISS"
    await proxy.settled()
    assert (await proxy.chat(question)).outcome == "HIT"
    later.seconds += 61
    model.respond = raw(b"{}", status=500)
    assert (await proxy.chat(question)).status == 500


async def test_other_words_are_not_stood_in_for(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, later = await stored(start, model, monkeypatch)
    await eventually(lambda: proxy.services.near is not None)
    asked, alike = "How do I reset the router in the hall?", "hey, how do I reset the router in the hall? thanks!"
    await proxy.chat(asked)
    await proxy.settled()
    assert (await proxy.chat(alike)).outcome == "NEAR"
    later.seconds += HOUR_S + 60
    model.respond = raw(b"{}", status=500)
    assert ((await proxy.chat(asked)).outcome, (await proxy.chat(alike)).status) == ("STALE", 500)
    assert (await proxy.chat(alike, headers=asking("max-stale"))).status == 500


async def test_followers_of_a_failure_get_it_too_and_those_who_forbid_it_the_error(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = await stored(start, model, monkeypatch)

    async def fail(model: FakeModel, request: Any, asked: Any) -> Any:
        return error(500, "no", "server_error")

    model.respond = held(fail)
    tasks = [asyncio.create_task(proxy.chat("x", stream=number % 2 == 1)) for number in range(4)]
    strict = asyncio.create_task(proxy.chat("x", headers=asking("stale-if-error=0")))
    await eventually(lambda: proxy.services.metrics.value("nearhit_joined_total") == 4)
    model.release.set()
    assert {a.outcome for a in await asyncio.gather(*tasks)} == {"STALE"}
    assert ((await strict).status, model.started) == (500, 2)


async def refreshed(proxy: Proxy, number: int) -> Answer:
    answer = await proxy.chat("x")
    while said(answer) != f"answer {number}":
        await asyncio.sleep(0.01)
        answer = await proxy.chat("x")
    return answer


async def test_while_a_new_one_is_fetched_the_stale_one_is_given_at_once(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, later = await stored(start, model, monkeypatch, cache__stale_while_revalidate_s=300)
    model.respond = held(numbered())
    for _ in range(3):
        answer = await proxy.chat("x")
        assert (answer.outcome, said(answer)) == ("STALE", "answer 1")
        assert answer.headers["Cache-Status"].startswith("nearhit; hit; ttl=-")
    await eventually(lambda: model.started == 2)
    model.release.set()
    assert (await refreshed(proxy, 2)).outcome == "HIT"
    assert model.started == 2
    later.seconds += HOUR_S + 301
    assert (await proxy.chat("x")).outcome == "MISS"


async def test_who_speaks_of_age_is_not_given_a_stale_one_meanwhile(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, _ = await stored(start, model, monkeypatch, cache__stale_while_revalidate_s=300)
    assert (await proxy.chat("x", headers=asking("max-age=100000"))).outcome == "MISS"


async def test_a_swapped_model_has_no_stale_answers(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.props = props()
    proxy, _ = await stored(start, model, monkeypatch, upstream__kind="llamacpp", upstream__canary_s=0)
    fingerprint = proxy.services.backends.first.tracker.current.fingerprint
    model.props = props("run-2", "/b.gguf")
    tracker = proxy.services.backends.first.tracker
    await eventually(lambda: tracker.current.confirmed and tracker.current.fingerprint != fingerprint)
    model.respond = raw(b"{}", status=500)
    assert (await proxy.chat("x")).status == 500
