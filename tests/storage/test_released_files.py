"""Files that released versions wrote are opened by this one. Never write one of them anew: add one for each schema."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.base import Candidate, Delete, Put, Sketched, Unsketched
from storage.listing import Which
from storage.sqlite import open_sqlite
from storage.sqlite_file import prepare
from tests.storage.engines import NOW, entry, key, near, room, sketch
from tests.storage.files import query

DATA = Path(__file__).parent / "data"

V1 = [
    entry(1),
    entry(2, words="zwölf Wörter 🦙", namespace=b"n" * 32, model="", prompt_tokens=None, usage_known=False),
    entry(3, answer=bytes(range(256)) * 40, completion_tokens=12, cost_ms=0),
]

V2 = [
    near(1, fingerprint=b"second"),
    near(2, words="zwölf Wörter 🦙", space=b"t" * 32),
    near(3),
    entry(4, words="exact only"),
]
"""The first two have a sketch with the keys 5 and -(2**63)."""


V3 = [
    near(1, topic=-5, grace_ms=1000),
    near(2, words="zwölf Wörter 🦙", topic=2**62),
    entry(3, sealed=True, answer=bytes(range(256)), cost_ms=5),
]


@pytest.fixture
def v3(tmp_path: Path) -> Path:
    return Path(shutil.copy(DATA / "v3.db", tmp_path / "nearhit.db"))


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    return Path(shutil.copy(DATA / "v1.db", tmp_path / "nearhit.db"))


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    return Path(shutil.copy(DATA / "v2.db", tmp_path / "nearhit.db"))


async def test_a_file_of_the_first_release_is_read_and_written(v1: Path) -> None:
    async with open_sqlite(v1, suspect=True) as store:
        assert await store.problems() == []
        assert [await store.get(key(number), NOW) for number in (1, 2, 3)] == V1
        assert await store.fact("http://127.0.0.1:8080", "fingerprint") == "first"
        await store.write([Put(entry(4))])
        assert (await store.totals()).entries == 4
        assert await store.problems() == []


def test_its_hits_are_kept(v1: Path) -> None:
    prepare(v1)
    assert query(v1, "SELECT hits FROM entry ORDER BY key") == [(0,), (3,), (0,)]


async def test_entries_of_the_first_release_are_never_near(v1: Path) -> None:
    async with open_sqlite(v1) as store:
        assert [found.near for found in await store.find(bytes(4), 10)] == [False] * 3
        assert await store.unsketched(1, 10) == []
        await store.write([Sketched(key(2), sketch(1)), Put(near(4), sketch(1))])
        found = await store.candidates(b"s" * 32, [1], NOW, per_key=9, limit=9)
        assert [candidate.key for candidate in found] == [key(4)]
        assert await store.problems() == []


async def test_a_file_of_the_second_schema_is_read_and_written(v2: Path) -> None:
    async with open_sqlite(v2, suspect=True) as store:
        assert await store.problems() == []
        assert await store.find(bytes(4), 10) == V2
        assert await store.schemes() == {-7: "a scheme"}
        assert await store.vetoed([b"a pair"])
        found = await store.candidates(b"t" * 32, [5, 6, -(2**63)], NOW, per_key=9, limit=9)
        assert found == [Candidate(key(2), "zwölf Wörter 🦙", "zwolf worter", 2)]
        assert await store.unsketched(-7, 10) == [Unsketched(key(3), b"s" * 32, "words 3")]
        await store.write([Put(near(2), sketch(5, scheme=-7)), Sketched(key(3), sketch(5)), Delete(key(1))])
        found = await store.candidates(b"s" * 32, [5, -(2**63)], NOW, per_key=9, limit=9)
        assert [(candidate.key, candidate.shared) for candidate in found] == [(key(2), 1), (key(3), 1)]
        assert await store.problems() == []


async def test_a_file_of_the_third_schema_is_read_and_written(v3: Path) -> None:
    async with open_sqlite(v3, suspect=True) as store:
        assert await store.problems() == []
        page = await store.select(Which(), 0, 10, answers=True)
        assert [listed.entry for listed in page.listed] == V3
        assert [listed.hits for listed in page.listed] == [0, 7, 0]
        # The cheapest goes first, the one that was asked for again last.
        assert [await store.trim(room(limit), 10) for limit in (2, 1)] == [1, 1]
        assert [found.key for found in await store.find(bytes(4), 10)] == [key(2)]
        assert await store.problems() == []


async def test_entries_of_earlier_schemas_are_worth_what_their_hits_saved(v1: Path) -> None:
    async with open_sqlite(v1) as store:
        assert await store.trim(room(1), 10) == 2
        assert [found.key for found in await store.find(bytes(4), 10)] == [key(2)]


def test_opening_a_sound_file_writes_nothing(v3: Path) -> None:
    before = v3.read_bytes()
    prepare(v3, suspect=True)
    prepare(v3)
    assert v3.read_bytes() == before
