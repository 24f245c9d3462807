"""With `cache.store_words: digest`, whoever gets at the files reads neither questions nor answers."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from storage.base import StorageBusy
from storage.listing import Which
from storage.sqlite_store import SqliteStore
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, reply

QUESTION = "Where did I bury the treasure of Captain Flint?"
SECRET = "Under the third palm tree of Spyglass Island."


def everything_at_rest(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def ask(proxy: Proxy, model: FakeModel) -> list[str]:
    model.respond = reply(SECRET)
    outcomes = []
    for _ in range(2):
        outcomes.append((await proxy.chat(QUESTION)).outcome)
        await proxy.settled()
    await proxy.services.buffer.flush()
    return outcomes


async def test_nothing_can_be_read_at_rest(start: StartProxy, model: FakeModel, tmp_path: Path) -> None:
    proxy = await start(cache__store_words="digest")
    assert await ask(proxy, model) == ["MISS", "HIT"]
    stored = await asyncio.to_thread(everything_at_rest, tmp_path)
    for text in (QUESTION, SECRET, "treasure", "Spyglass"):
        assert text.encode() not in stored
        assert text.lower().encode() not in stored


async def test_answers_are_there_after_a_restart(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__store_words="digest")
    async with running_proxy(settings) as proxy:
        first = await ask(proxy, model)
    async with running_proxy(settings) as proxy:
        answer = await proxy.chat(QUESTION)
        streamed = await proxy.chat(QUESTION, stream=True)
    assert (first, answer.outcome, streamed.outcome) == (["MISS", "HIT"], "HIT", "HIT")
    assert answer.json["choices"][0]["message"]["content"] == SECRET


async def test_other_words_are_not_compared(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__store_words="digest")
    await ask(proxy, model)
    assert (await proxy.chat(f"please {QUESTION}")).outcome == "MISS"
    assert (await proxy.stats())["near"]["state"] == "off"


async def test_what_was_readable_before_goes(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await ask(proxy, model)
    assert SECRET.encode() in await asyncio.to_thread(everything_at_rest, tmp_path)
    async with running_proxy(settings_for(tmp_path, model.url, cache__store_words="digest")) as proxy:
        async with asyncio.timeout(20):
            while (await proxy.services.store.select(Which(sealed=False), 0, 1)).listed:
                await asyncio.sleep(0.02)
        assert (await proxy.chat(QUESTION)).outcome == "MISS"
        await proxy.settled()
    stored = await asyncio.to_thread(everything_at_rest, tmp_path)
    assert SECRET.encode() not in stored
    assert b"treasure" not in stored


async def test_traces_are_wiped_though_it_was_interrupted(
    tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await ask(proxy, model)
    wiped: list[str] = []

    async def interrupted(_: SqliteStore) -> None:
        wiped.append("interrupted")
        raise StorageBusy("stopped in the middle")

    rewrite = SqliteStore.rewrite
    private = settings_for(tmp_path, model.url, cache__store_words="digest")
    monkeypatch.setattr(SqliteStore, "rewrite", interrupted)
    async with running_proxy(private):
        await eventually(lambda: bool(wiped))

    async def whole(store: SqliteStore) -> None:
        await rewrite(store)
        wiped.append("whole")

    monkeypatch.setattr(SqliteStore, "rewrite", whole)
    async with running_proxy(private):
        await eventually(lambda: wiped[-1] == "whole")
    async with running_proxy(private) as proxy:
        assert await ask(proxy, model) == ["MISS", "HIT"]
    assert wiped == ["interrupted", "whole"]


async def test_back_to_full_both_kinds_are_served(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, cache__store_words="digest")) as proxy:
        await ask(proxy, model)
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert (await proxy.chat(QUESTION)).outcome == "HIT"
        await proxy.chat("another one")
        await proxy.settled()
        assert (await proxy.chat("another one")).outcome == "HIT"


async def test_a_damaged_answer_is_a_miss(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__store_words="digest")
    async with running_proxy(settings) as proxy:
        await ask(proxy, model)
    for damage in ("zeroblob(40)", "x'00'", "CAST(answer || x'00' AS BLOB)"):
        await asyncio.to_thread(damage_answers, tmp_path / "nearhit.db", damage)
        async with running_proxy(settings) as proxy:
            assert await ask(proxy, model) == ["MISS", "HIT"]


def damage_answers(path: Path, value: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE body SET answer = {value}")


async def test_files_are_for_their_owner_only(proxy: Proxy, model: FakeModel, tmp_path: Path) -> None:
    await ask(proxy, model)
    modes = await asyncio.to_thread(
        lambda: {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()}
    )
    assert set(modes.values()) == {0o600}, modes


async def test_with_secure_delete_nothing_stays_of_what_was_removed(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, cache__secure_delete=True)) as proxy:
        for number in range(30):
            await proxy.chat(f"{QUESTION} {number}", max_tokens=number + 1)
            await ask(proxy, model)
        await proxy.settled()
        answer = await proxy.post("/-/purge", json={"all": True})
        assert answer.status == 200, answer.body
        await proxy.services.store.give_back(1 << 30)
        assert SECRET.encode() not in await asyncio.to_thread(everything_at_rest, tmp_path)
