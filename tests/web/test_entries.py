"""`/-/entries`: what is stored, page by page and one by one, and one taken out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from proxy import __version__
from proxy.cache import holdings
from storage.base import Entry, Put, StorageBusy, StorageFull
from tests.conftest import Answer, Proxy, StartProxy
from tests.fake_model import USAGE, FakeModel
from tests.storage.engines import entry
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near
from tests.web.test_sharing import MINE, keyed

FAR_MS = 9_000_000_000_000
"""An expiry that no test lives to see."""
DAY_MS = 86_400_000
BODY = json.dumps({"choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"}]}).encode()


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def stored(number: int, **fields: Any) -> Entry:
    """An entry as nearhit would store it, its number in its key's first bytes, so that short ids tell them apart."""
    own = {"key": number.to_bytes(4, "big") + bytes(28), "endpoint": "chat", "fingerprint": b"f" * 32, "answer": BODY}
    return replace(entry(number), **{**own, "stored_ms": now_ms(), "expires_ms": FAR_MS, **fields})


async def put(proxy: Proxy, *entries: Entry) -> None:
    await proxy.services.store.write([Put(one) for one in entries])


async def listed(proxy: Proxy, **query: Any) -> dict[str, Any]:
    answer = await proxy.send("GET", "/-/entries", params=query)
    assert answer.status == 200, answer.body
    told: dict[str, Any] = answer.json
    assert (told["version"], told["complete"]) == (__version__, told["next"] is None)
    return told


async def numbers(proxy: Proxy, **query: Any) -> list[int]:
    """The numbers of the entries listed."""
    return [int(one["id"][:8], 16) for one in (await listed(proxy, **query))["entries"]]


async def ask(proxy: Proxy, words: str, **more: Any) -> Answer:
    """A call, and its answer stored."""
    answer = await proxy.chat(words, **more)
    await proxy.settled()
    return answer


async def show(proxy: Proxy, shown: str, method: str = "GET") -> Answer:
    return await proxy.send(method, f"/-/entries/{shown}")


# The list


async def test_an_answer_that_was_just_given_is_listed_with_what_is_known_of_it(start: StartProxy) -> None:
    proxy = await start(cache__flush_s=60)
    await ask(proxy, ASKED, model="tiny")
    hit = await ask(proxy, ASKED, model="tiny")
    (one,) = (await listed(proxy))["entries"]
    assert one["id"].startswith(hit.headers["X-Nearhit-Entry"])
    assert len(one["id"]) == 64
    expected = {"model": "tiny", "endpoint": "chat", "namespace": "", "words": ASKED, "near": True, "sealed": False}
    assert {name: one[name] for name in expected} == expected
    assert (one["prompt_tokens"], one["completion_tokens"]) == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert one["cost_ms"] == int(hit.headers["X-Nearhit-Saved-Ms"])
    assert one["hits"] == 1
    assert 0 <= one["age_s"] < 60
    assert 71 * 3600 < one["ttl_s"] <= 72 * 3600
    for name in ("stored", "used"):
        assert abs(datetime.fromisoformat(one[name]).timestamp() * 1000 - now_ms()) < 60_000
    assert one["answer_bytes"] > len("Hello there.")


async def test_an_empty_store_has_an_empty_list(proxy: Proxy) -> None:
    assert await listed(proxy) == {"version": __version__, "entries": [], "next": None, "complete": True}


async def test_the_newest_comes_first_unless_the_oldest_is_asked_for(proxy: Proxy) -> None:
    await put(proxy, *(stored(number) for number in (1, 2, 3)))
    assert await numbers(proxy) == await numbers(proxy, order="newest") == [3, 2, 1]
    assert await numbers(proxy, order="oldest") == [1, 2, 3]


async def test_an_entry_that_was_never_used_has_no_time_of_use(proxy: Proxy) -> None:
    await put(proxy, stored(1))
    (one,) = (await listed(proxy))["entries"]
    assert (one["hits"], one["used"]) == (0, None)


async def test_an_expired_entry_is_listed_with_the_time_since(proxy: Proxy) -> None:
    await put(proxy, stored(1, stored_ms=now_ms() - 20_000_000, expires_ms=now_ms() - 10_000_000))
    (one,) = (await listed(proxy))["entries"]
    assert -10_060 <= one["ttl_s"] <= -10_000
    assert 20_000 <= one["age_s"] <= 20_060


async def test_times_that_no_calendar_has_do_not_hide_the_others(proxy: Proxy) -> None:
    await put(proxy, stored(1, stored_ms=1 << 60, expires_ms=1 << 61), stored(2))
    entries = (await listed(proxy))["entries"]
    assert [one["stored"] is None for one in entries] == [False, True]


@pytest.mark.parametrize("order", ["newest", "oldest"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_show_every_entry_once(proxy: Proxy, order: str, limit: int) -> None:
    await put(proxy, *(stored(number) for number in range(1, 8)))
    seen: list[int] = []
    query: dict[str, Any] = {"order": order, "limit": limit}
    while True:
        told = await listed(proxy, **query)
        assert len(told["entries"]) <= limit
        seen += [int(one["id"][:8], 16) for one in told["entries"]]
        if told["complete"]:
            break
        query["after"] = told["next"]
    assert seen == (list(range(1, 8)) if order == "oldest" else list(range(7, 0, -1)))


async def test_a_mark_of_an_entry_is_a_place_to_go_on_from(proxy: Proxy) -> None:
    await put(proxy, *(stored(number) for number in (1, 2, 3)))
    marks = [one["mark"] for one in (await listed(proxy))["entries"]]
    assert await numbers(proxy, after=marks[1]) == [1]
    assert await numbers(proxy, after=marks[1], order="oldest") == [3]


async def test_fifty_are_listed_unless_more_are_asked_for(proxy: Proxy) -> None:
    await put(proxy, *(stored(number) for number in range(1, 61)))
    assert (len(await numbers(proxy)), len(await numbers(proxy, limit=1000))) == (50, 60)


async def test_long_words_are_cut_in_the_list_and_whole_in_the_entry(proxy: Proxy) -> None:
    words = "word " * 1000
    await put(proxy, stored(1, words=words, near=True))
    (one,) = (await listed(proxy))["entries"]
    assert words.startswith(one["words"])
    assert len(one["words"]) == 500
    assert (await show(proxy, one["id"])).json["words"] == words


# Conditions


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"model": "large"}, [2]),
        ({"model": "LARGE"}, []),
        ({"model": ""}, [4]),
        ({"endpoint": "completions"}, [3]),
        ({"namespace": (b"n" * 32).hex()}, [3]),
        ({"namespace": (b"n" * 32).hex().upper()}, [3]),
        ({"namespace": ""}, [4, 2, 1]),
        ({"fingerprint": (b"g" * 32).hex()}, [4]),
        ({"text": "LAMP"}, [2, 1]),
        ({"text": "%"}, []),
        ({"text": 'say "Ünder"'}, [3]),
        ({"text": "ÜNDER"}, [3]),
        ({"text": "secret"}, []),
        ({"id": "00000002"}, [2]),
        ({"id": "000000030"}, [3]),
        ({"id": "00000001" + "0" * 56}, [1]),
        ({"older_s": "86400"}, [4, 3]),
        ({"older_s": "86400.5", "newer_s": "200000"}, [4, 3]),
        ({"newer_s": "86399"}, [2, 1]),
        ({"model": "small", "text": "lamp"}, [1]),
        ({"model": "large", "endpoint": "completions"}, []),
    ],
)
async def test_conditions_are_all_met(proxy: Proxy, query: dict[str, str], expected: list[int]) -> None:
    spoken = json.dumps({"said": 'Say "ünder" it.'}, ensure_ascii=False).encode()
    yesterday = now_ms() - DAY_MS - 1000
    await put(
        proxy,
        stored(1, words="Dim the lamp.", near=True),
        stored(2, model="large", words="A Lamp?", near=True),
        stored(3, endpoint="completions", namespace=b"n" * 32, answer=spoken, stored_ms=yesterday),
        stored(4, model="", fingerprint=b"g" * 32, answer=b"secret", sealed=True, stored_ms=yesterday),
    )
    assert await numbers(proxy, **query) == expected


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("limit=1.5", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("after=0", "after"),
        ("after=x", "after"),
        ("after=9223372036854775808", "after"),
        ("order=random", "order"),
        ("endpoint=", "endpoint"),
        ("endpoint=rerank", "endpoint"),
        ("namespace=abc", "namespace"),
        ("namespace=shared", "namespace"),
        ("fingerprint=abcdef0123456789", "fingerprint"),
        ("fingerprint=", "fingerprint"),
        ("id=", "id"),
        ("id=1234567", "id"),
        ("id=1234567g", "id"),
        ("id=" + "0" * 65, "id"),
        ("text=", "text"),
        ("text=" + "x" * 1001, "text"),
        ("older_s=-1", "older_s"),
        ("older_s=2h", "older_s"),
        ("older_s=nan", "older_s"),
        ("older_s=1e400", "older_s"),
        ("newer_s=99999999999", "newer_s"),
        ("older_s=60&newer_s=60", "older_s"),
        ("modle=tiny", "modle"),
        ("model=tiny&model=large", "model"),
        ("dry_run=true", "dry_run"),
        ("%1b%5b31m=x", r"\x1b[31m"),
    ],
)
async def test_a_bad_condition_is_refused_by_its_name(proxy: Proxy, query: str, field: str) -> None:
    answer = await proxy.send("GET", f"/-/entries?{query}")
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_selection")
    assert answer.json["error"]["type"] == "invalid_request_error"
    message = answer.json["error"]["message"]
    assert message.startswith(f"{field}: ")
    assert message.isprintable()


@pytest.mark.parametrize("query", ["text=%ff%fe", "model=%ed%a0%80", "text=%00", "text='%20OR%201=1--"])
async def test_odd_texts_are_only_texts(proxy: Proxy, query: str) -> None:
    await put(proxy, stored(1, words="Dim the lamp.", near=True))
    answer = await proxy.send("GET", f"/-/entries?{query}")
    assert answer.status in (200, 400)
    assert answer.json.get("entries", []) == []


# Large stores


async def many(proxy: Proxy, count: int, first: Sequence[Entry] = ()) -> None:
    await put(proxy, *first)
    for begin in range(10, 10 + count, 1000):
        await put(proxy, *(stored(number) for number in range(begin, min(begin + 1000, 10 + count))))


async def test_what_is_rare_is_found_behind_thousands_of_others(start: StartProxy) -> None:
    proxy = await start()
    await many(proxy, 5000, [stored(1, model="rare", words="Needle", near=True)])
    assert await numbers(proxy, model="rare") == await numbers(proxy, text="needle") == [1]


async def test_a_long_search_comes_in_parts(start: StartProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdings, "_LOOK_S", 0)
    proxy = await start()
    await many(proxy, 5000, [stored(1, model="rare")])
    told = await listed(proxy, model="rare")
    assert (told["entries"], told["complete"]) == ([], False)
    parts = 1
    while not told["complete"]:
        told = await listed(proxy, model="rare", after=told["next"])
        parts += 1
    assert [one["model"] for one in told["entries"]] == ["rare"]
    assert parts <= 5


async def test_a_search_for_what_is_nowhere_does_not_hold_up_hits(start: StartProxy) -> None:
    proxy = await start(cache__hot_bytes=0)
    await ask(proxy, ASKED)
    await many(proxy, 3000)
    searching = asyncio.create_task(listed(proxy, text="occurs nowhere"))
    served = 0
    while not searching.done():
        assert (await proxy.chat(ASKED)).outcome == "HIT"
        served += 1
    assert (await searching)["entries"] == []
    assert served >= 2


# One entry


async def test_an_entry_is_shown_with_its_answer(start: StartProxy) -> None:
    proxy = await start()
    first = await ask(proxy, ASKED)
    hit = await ask(proxy, ASKED)
    told = (await show(proxy, hit.headers["X-Nearhit-Entry"])).json
    assert told["version"] == __version__
    assert told["id"].startswith(hit.headers["X-Nearhit-Entry"])
    assert told["answer"]["choices"] == first.json["choices"]
    assert (told["words"], told["hits"], told["upstream"]) == (ASKED, 1, proxy.services.backends.first.upstream.origin)
    identity = proxy.services.backends.first.tracker.current
    assert told["fingerprint"] == (identity.fingerprint or b"").hex()
    assert len(told["space"]) == 64
    assert "answer_note" not in told


async def test_an_entry_that_was_not_written_yet_is_shown(start: StartProxy) -> None:
    proxy = await start(cache__flush_s=60)
    await ask(proxy, ASKED)
    hit = await ask(proxy, ASKED)
    assert (await show(proxy, hit.headers["X-Nearhit-Entry"])).json["words"] == ASKED


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"sealed": True, "answer": b"\x00\x01"}, "the answer is sealed"),
        ({"answer": b"\xff"}, "the answer cannot be read"),
        ({"answer": b"[" * 100_000}, "the answer cannot be read"),
    ],
)
async def test_an_answer_that_cannot_be_shown_is_told_as_such(proxy: Proxy, fields: dict[str, Any], note: str) -> None:
    await put(proxy, stored(1, **fields))
    answer = await show(proxy, "00000001")
    assert (answer.status, answer.json["answer"]) == (200, None)
    assert answer.json["answer_note"].startswith(note)


@pytest.mark.parametrize("shown", ["00000001", "000000010", "00000001" + "0" * 56])
async def test_the_first_digits_of_an_id_will_do(proxy: Proxy, shown: str) -> None:
    await put(proxy, stored(1), stored(2), stored(0xABCDEF01))
    assert (await show(proxy, shown)).json["id"] == "00000001" + "0" * 56
    assert (await show(proxy, "ABCDEF01")).json["id"].startswith("abcdef01")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    ("shown", "status"),
    [
        ("abc", 400),
        ("not-an-id", 400),
        ("%2e%2e%2f", 400),
        ("%00%1b", 400),
        ("0" * 65, 400),
        ("ffffffff", 404),
        ("00000007", 409),
    ],
)
async def test_an_id_of_none_or_several_changes_nothing(proxy: Proxy, method: str, shown: str, status: int) -> None:
    await put(proxy, stored(7), stored(7, key=b"\0\0\0\7" + b"\1" * 28))
    answer = await show(proxy, shown, method)
    assert (answer.status, answer.json["error"]["code"]) == (status, "entry_not_found")
    assert await numbers(proxy) == [7, 7]


# Taking one out


async def test_a_removed_entry_is_asked_anew(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await ask(proxy, ASKED)
    await ask(proxy, OTHER)
    shown = (await ask(proxy, ASKED)).headers["X-Nearhit-Entry"]
    answer = await show(proxy, shown[:16], "DELETE")
    assert (answer.status, answer.json["removed"], answer.json["id"][:32]) == (200, True, shown)
    assert (await show(proxy, shown)).status == 404
    only = {"Cache-Control": "only-if-cached"}
    assert [(await proxy.chat(words, headers=only)).status for words in (ASKED, ALIKE, OTHER)] == [504, 504, 200]
    assert proxy.services.metrics.value("nearhit_evicted_total", {"reason": "purged"}) == 1
    assert (await ask(proxy, ASKED)).outcome == "MISS"
    assert (await ask(proxy, ALIKE)).outcome == "NEAR"
    assert await proxy.services.store.problems() == []


async def test_the_pair_of_a_removed_entry_may_match_again(start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, ASKED)
    shown = (await ask(proxy, ALIKE)).headers["X-Nearhit-Entry"]
    assert (await show(proxy, shown, "DELETE")).status == 200
    assert [(await ask(proxy, words)).outcome for words in (ASKED, ALIKE)] == ["MISS", "NEAR"]


async def test_an_entry_that_was_not_written_yet_goes_too(start: StartProxy) -> None:
    proxy = await start(cache__flush_s=60)
    await ask(proxy, ASKED)
    shown = (await ask(proxy, ASKED)).headers["X-Nearhit-Entry"]
    assert (await show(proxy, shown, "DELETE")).status == 200
    assert (await ask(proxy, ASKED)).outcome == "MISS"


async def test_another_process_stops_serving_it_from_memory(start: StartProxy) -> None:
    first, second = await start(), await start()
    await ask(first, ASKED)
    shown = (await ask(first, ASKED)).headers["X-Nearhit-Entry"]
    await listed(first)
    only = {"Cache-Control": "only-if-cached"}
    async with asyncio.timeout(60):
        while (await second.chat(ASKED, headers=only)).status != 200:
            await asyncio.sleep(0.01)
    assert (await show(first, shown, "DELETE")).status == 200
    async with asyncio.timeout(60):
        while (await second.chat(ASKED, headers=only)).status != 504:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("error", [StorageFull("no space"), StorageBusy("locked")])
async def test_an_entry_that_could_not_be_removed_is_not_told_as_removed(
    start: StartProxy, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    proxy = await start()
    await ask(proxy, ASKED)
    shown = (await ask(proxy, ASKED)).headers["X-Nearhit-Entry"]
    await listed(proxy)
    store: Any = proxy.services.store

    async def failing(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store.current, "write", failing)
        answer = await show(proxy, shown, "DELETE")
    assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")
    assert (await ask(proxy, ASKED)).outcome == "HIT"
    assert proxy.services.metrics.value("nearhit_evicted_total", {"reason": "purged"}) == 0
    assert (await show(proxy, shown, "DELETE")).status == 200


@pytest.mark.parametrize(("path", "operation"), [("/-/entries", "select"), ("/-/entries/00000001", "find")])
async def test_a_store_that_does_not_answer_is_told(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, path: str, operation: str
) -> None:
    store: Any = proxy.services.store

    async def failing(*_: Any, **__: Any) -> None:
        raise StorageBusy("locked")

    monkeypatch.setattr(store.current, operation, failing)
    answer = await proxy.send("GET", path)
    assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")


# Who may look


ROUTES = [
    ("GET", "/-/entries"),
    ("GET", "/-/entries/00000001"),
    ("DELETE", "/-/entries/00000001"),
    ("POST", "/-/purge"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_where_callers_have_answers_of_their_own_a_token_is_needed(
    start: StartProxy, model: FakeModel, method: str, path: str
) -> None:
    model.extra = keyed("mine")
    proxy = await start(upstream__api_key="mine")
    await put(proxy, stored(1))
    body = {"json": {"all": True, "dry_run": True}} if method == "POST" else {}
    for headers in ({}, MINE, {"X-Nearhit-Admin": "guessed"}):
        answer = await proxy.send(method, path, headers=headers, **body)
        assert (answer.status, answer.json["error"]["code"]) == (403, "admin_refused")
    admin = {"X-Nearhit-Admin": proxy.services.local_token}
    assert (await proxy.send(method, path, headers=admin, **body)).status == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_pages_of_other_sites_are_refused(proxy: Proxy, model: FakeModel, method: str, path: str) -> None:
    await put(proxy, stored(1))
    answer = await proxy.send(method, path, headers={"Origin": "http://evil.example"})
    assert answer.status == 403
    assert await numbers(proxy) == [1]
    assert not [seen for seen in model.seen if seen.target.startswith("/-")]


async def test_other_methods_are_unknown_routes(proxy: Proxy, model: FakeModel) -> None:
    for method, path in (("POST", "/-/entries"), ("PUT", "/-/entries/00000001"), ("GET", "/-/purge")):
        assert (await proxy.send(method, path)).status == 404
    assert not [seen for seen in model.seen if seen.target.startswith("/-")]


async def test_looking_is_no_request_for_an_answer(proxy: Proxy, model: FakeModel) -> None:
    await ask(proxy, ASKED)
    before = (await proxy.stats())["requests"]
    await listed(proxy)
    assert (await proxy.stats())["requests"] == before
    assert len(model.generations) == 1
