"""Files that released versions wrote are opened by this one. Never write one of them anew: add one for each schema."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from storage.base import Put
from storage.sqlite import open_sqlite
from storage.sqlite_file import prepare
from tests.storage.engines import NOW, entry, key
from tests.storage.files import query

DATA = Path(__file__).parent / "data"

V1 = [
    entry(1),
    entry(2, words="zwölf Wörter 🦙", namespace=b"n" * 32, model="", prompt_tokens=None, usage_known=False),
    entry(3, answer=bytes(range(256)) * 40, completion_tokens=12, cost_ms=0),
]


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    return Path(shutil.copy(DATA / "v1.db", tmp_path / "nearhit.db"))


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


def test_opening_a_sound_file_writes_nothing(v1: Path) -> None:
    before = v1.read_bytes()
    prepare(v1, suspect=True)
    prepare(v1)
    assert v1.read_bytes() == before
