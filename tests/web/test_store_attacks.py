"""What is purged, hidden or another's is served to nobody, whatever way somebody asks."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.base import Entry, Which
from tests.conftest import Answer, Proxy, StartProxy, running_proxy, settings_for
from tests.fake_model import FakeModel, numbered, reply
from tests.web.test_entries import ask, listed, put, stored
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near
from tests.web.test_sharing import MINE, keyed
from tests.web.test_sharing import OTHER as THEIRS

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
