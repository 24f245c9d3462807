"""Attacks on what is stored: what is purged or another's is served to nobody, and no input breaks anything."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proxy.web import background, services
from storage.listing import Which
from storage.renewal import RenewableStore
from tests.conftest import Answer, Proxy, StartProxy, eventually
from tests.fake_model import FakeModel, chat_body, numbered
from tests.program.test_cli import PROGRAM, run, run_async
from tests.web.test_entries import ask, listed, put, stored
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near
from tests.web.test_transfer import bring, row, whole

ONLY = {"Cache-Control": "only-if-cached"}


async def evicted(start: StartProxy, **options: Any) -> tuple[Proxy, Answer]:
    """A proxy that still has in memory what had to leave its full store, and a hit on that."""
    proxy = await start(cache__max_entries=1, **options)
    await ask(proxy, ASKED)
    hit = await ask(proxy, ASKED)
    await listed(proxy)
    await ask(proxy, OTHER)
    (left,) = (await listed(proxy))["entries"]
    assert (hit.outcome, left["words"]) == ("HIT", OTHER)
    return proxy, hit


# What left the store for want of room, and is still in memory


async def test_a_purge_of_all_leaves_nothing_in_memory(start: StartProxy) -> None:
    proxy, _ = await evicted(start)
    await proxy.post("/-/purge", json={"all": True})
    assert [(await proxy.chat(words, headers=ONLY)).status for words in (ASKED, OTHER)] == [504, 504]


async def test_a_purge_that_finds_nothing_in_the_store_empties_the_memory(start: StartProxy) -> None:
    proxy, _ = await evicted(start)
    await proxy.post("/-/purge", json={"text": "living room"})
    assert [(await proxy.chat(words, headers=ONLY)).status for words in (ASKED, OTHER)] == [504, 200]


async def test_an_answer_that_is_served_can_be_called_wrong(start: StartProxy) -> None:
    proxy, hit = await evicted(start)
    shown = hit.headers["X-Nearhit-Entry"]
    answer = await proxy.post("/-/feedback", json={"id": shown, "verdict": "wrong"})
    assert (answer.status, answer.json.get("removed")) == (200, True)
    assert (await proxy.chat(ASKED, headers=ONLY)).status == 504
    assert (await proxy.chat(OTHER, headers=ONLY)).status == 200


async def test_an_answer_that_is_served_can_be_removed(start: StartProxy) -> None:
    proxy, hit = await evicted(start)
    answer = await proxy.send("DELETE", f"/-/entries/{hit.headers['X-Nearhit-Entry']}")
    assert (answer.status, answer.json.get("removed")) == (200, True)
    assert (await proxy.chat(ASKED, headers=ONLY)).status == 504


# Namespaces in the body


@pytest.mark.parametrize("name", [0, False, [], {}, 0.0])
async def test_a_namespace_that_is_no_text_is_not_the_shared_one(proxy: Proxy, name: Any) -> None:
    await ask(proxy, ASKED)
    answer = await ask(proxy, ASKED, cache={"namespace": name})
    assert answer.headers["Cache-Status"] == "nearhit; fwd=bypass; detail=not-understood"


@pytest.mark.parametrize("name", ["", None])
async def test_no_name_is_the_shared_namespace(proxy: Proxy, name: Any) -> None:
    await ask(proxy, ASKED)
    assert (await ask(proxy, ASKED, cache={"namespace": name})).outcome == "HIT"


async def test_rooms_of_alike_names_are_different_ones(start: StartProxy, model: FakeModel) -> None:
    model.respond = numbered()
    proxy = await with_near(start)
    names = ["a", "A", "a ", "\uff41", "\u00e1", "a\u0301", "\ud800", "\udc00", "\0", "within", "a" * 256]
    bodies = [await ask(proxy, ASKED, cache={"namespace": name}) for name in ["", *names]]
    assert [one.outcome for one in bodies] == ["MISS"] * len(bodies)
    for name, first in zip(["", *names], bodies, strict=True):
        for words, outcome in ((ASKED, "HIT"), (ALIKE, "NEAR")):
            again = await ask(proxy, words, cache={"namespace": name})
            assert (again.outcome, again.json["choices"]) == (outcome, first.json["choices"])


async def test_explaining_inside_a_room_shows_no_call_from_outside_it(start: StartProxy) -> None:
    proxy = await with_near(start)

    def asked(system: str, **more: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": ASKED}]
        return {"messages": messages, "temperature": 0, **more}

    await proxy.post("/v1/chat/completions", json=asked("The code is 4711."))
    await proxy.settled()
    inside = await proxy.post("/-/explain", json=asked("The code is 4712.", cache={"namespace": "a"}))
    outside = await proxy.post("/-/explain", json=asked("The code is 4712."))
    assert "4711" in outside.body.decode()
    assert "4711" not in inside.body.decode()
    await proxy.post("/v1/chat/completions", json=asked("The code is 4713.", cache={"namespace": "a"}))
    await proxy.settled()
    inside = await proxy.post("/-/explain", json=asked("The code is 4712.", cache={"namespace": "a"}))
    assert "4713" in inside.body.decode()


@pytest.mark.parametrize("field", [{}, {"store": True}, {"return_progress": True}])
async def test_the_cache_object_stays_here_also_where_the_cache_is_off(
    start: StartProxy, model: FakeModel, field: dict[str, Any]
) -> None:
    proxy = await start(cache__mode="off")
    answer = await ask(proxy, ASKED, cache={"ttl": 5}, **field)
    assert answer.outcome == "BYPASS"
    assert "cache" not in model.generations[0].json
    assert model.generations[0].json["messages"][0]["content"] == ASKED


# Files that claim too much


async def test_a_file_that_claims_endless_worth_does_not_spoil_the_order_of_what_goes(start: StartProxy) -> None:
    proxy = await start(cache__max_entries=4, cache__top_k=0)
    most = 2**53
    forged = [row(number, hits=most, cost_ms=most) for number in range(1, 7)]
    assert (await bring(proxy, whole(*forged))).status == 200
    await proxy.post("/-/purge", json={"all": True})
    cheap, dear = row(10, cost_ms=10), row(11, cost_ms=60_000)
    await bring(proxy, whole(dear))
    for number in range(20, 26):
        await bring(proxy, whole({**cheap, "key": number.to_bytes(32, "big").hex()}))
    assert 11 in [int(one["id"], 16) for one in (await listed(proxy))["entries"]]


@pytest.mark.parametrize("changes", [{"endpoint": "completions"}, {"endpoint": "responses"}, {"endpoint": ""}])
async def test_an_answer_in_another_form_than_its_endpoint_s_is_a_bad_line(
    proxy: Proxy, changes: dict[str, Any]
) -> None:
    answer = await bring(proxy, whole(row(1, **changes)))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_line")


async def test_sealed_answers_that_changed_places_are_misses(start: StartProxy, model: FakeModel) -> None:
    model.respond = numbered()
    proxy = await start(cache__store_words="digest")
    for words in (ASKED, OTHER):
        await ask(proxy, words)
    exported = (await proxy.send("GET", "/-/export")).body
    _, one, other, _ = [json.loads(line) for line in exported.splitlines()]
    one["answer"], other["answer"] = other["answer"], one["answer"]
    await proxy.post("/-/purge", json={"all": True})
    told = (await bring(proxy, whole(one, other))).json
    assert told["imported"] == 2
    assert [(await ask(proxy, words)).outcome for words in (ASKED, OTHER)] == ["MISS", "MISS"]
    assert [(await ask(proxy, words)).outcome for words in (ASKED, OTHER)] == ["HIT", "HIT"]


@pytest.mark.parametrize("query", ["?bda=skip", "?bad=skip&frist=2", "?%1b=1"])
async def test_an_import_with_a_field_that_it_does_not_know_stores_nothing(proxy: Proxy, query: str) -> None:
    answer = await bring(proxy, whole(row(1)), query)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_query")
    assert (await listed(proxy))["entries"] == []


# Long questions


async def test_a_list_does_not_take_long_questions_into_memory(proxy: Proxy) -> None:
    await put(proxy, *(stored(number, words="long " * 1_000_000) for number in range(1, 4)))
    page = await proxy.services.store.select(Which(), 0, 100)
    assert sum(len(one.entry.words or "") for one in page.listed) < 10_000
    assert [len(one["words"]) for one in (await listed(proxy))["entries"]] == [500] * 3
    exported = await proxy.services.store.select(Which(), 0, 100, answers=True)
    assert (len(exported.listed), exported.mark) == (1, exported.listed[0].mark)
    lines = (await proxy.send("GET", "/-/export")).body.splitlines()
    assert [len(json.loads(line)["words"]) for line in lines[1:-1]] == [5_000_000] * 3


# Terminals without Unicode


async def test_a_terminal_without_unicode_shows_the_rest(tmp_path: Path, proxy: Proxy) -> None:
    await put(
        proxy,
        stored(1, words="Größe \u2014 \u65e5\u672c?", near=True, answer=json.dumps(chat_body("\u65e5\u672c")).encode()),
    )
    for arguments in (("entries",), ("entries", "00000001"), ("purge", "--all", "--dry-run")):
        ran = await run_async(tmp_path, *arguments, "--url", proxy.url, PYTHONIOENCODING="ascii")
        assert (ran.code, ran.err) == (0, "")
        assert "\\u65e5" in ran.out


@pytest.mark.parametrize(
    "arguments", [("entries",), ("entries", "--json"), ("entries", "00000001"), ("stats", "--json"), ("export",)]
)
async def test_output_that_has_no_room_is_told_in_a_line(
    tmp_path: Path, proxy: Proxy, arguments: tuple[str, ...]
) -> None:
    await put(proxy, stored(1))
    full = ("sh", "-c", 'exec "$0" "$@" > /dev/full', str(PROGRAM))
    ran = await asyncio.to_thread(lambda: run(tmp_path, *arguments, "--url", proxy.url, program=full))
    assert (ran.code, ran.err.count("\n"), "No space left on device" in ran.err) == (1, 1, True)


# Damage that no check of SQLite's finds


def damaged(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "nearhit.db", timeout=10)) as connection, connection:
        connection.execute(statement)


def tasks() -> set[str]:
    names = {task.get_name() for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith("nearhit-")}


@pytest.mark.parametrize(
    "statement", ["DELETE FROM generation", "DELETE FROM ageing", "DELETE FROM migration", "DROP TABLE generation"]
)
async def test_rows_that_are_missing_end_no_task_and_keep_no_answer_from_anybody(
    start: StartProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    monkeypatch.setattr(services, "_WATCH_FILE_S", 0.1)
    monkeypatch.setattr(background, "_AGAIN_S", 0.1)
    proxy = await start()
    await ask(proxy, ASKED)
    await listed(proxy)
    before = tasks()
    looks = [0, 0]
    lost, replaced = RenewableStore.lost, RenewableStore.replaced_elsewhere

    async def looking(store: RenewableStore) -> bool:
        looks[0] += 1
        return await lost(store)

    async def following(store: RenewableStore) -> bool:
        looks[1] += 1
        return await replaced(store)

    monkeypatch.setattr(RenewableStore, "lost", looking)
    monkeypatch.setattr(RenewableStore, "replaced_elsewhere", following)
    await asyncio.to_thread(damaged, tmp_path, statement)
    first, second = looks

    def went_on() -> bool:
        # What cannot be opened any more is not looked at, but tried again.
        return looks[1] >= second + 3 and (looks[0] >= first + 3 or bool(proxy.services.store.trouble))

    await eventually(went_on)
    assert before <= tasks()
    assert (await proxy.chat(OTHER)).status == 200
