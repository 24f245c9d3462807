"""A listing shows every entry that is meant, once, and no other, whatever happens between its pages."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.base import Delete, Entry, Put, Used
from storage.listing import Listed, Which
from storage.sqlite_file import create_schema
from storage.sqlite_listing import scan
from storage.store import Store
from tests.storage.engines import NOW, OpenStore, entry, key

encode = msgspec.json.Encoder().encode


def said(text: str) -> bytes:
    """An answer as it is stored."""
    return encode({"choices": [{"message": {"content": text}}], "model": "m"})


PIECES = st.sampled_from(
    [
        "cat",
        "CAT",
        "Straße",
        "STRASSE",
        "İ",
        "ǅ",
        "ß",
        "né",
        "NE\u0301",
        "🦙",
        "漢",
        '"',
        "\\",
        "\\n",
        "\n",
        "n",
        "\t",
        "/",
    ]
)
TEXT = st.lists(PIECES, max_size=4).map("".join)
NEEDLE = st.lists(PIECES, min_size=1, max_size=2).map("".join)


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    count = draw(st.integers(0, 12))
    pick: Callable[[Sequence[Any]], Any] = lambda of: draw(st.sampled_from(of))  # noqa: E731
    return [
        entry(
            number,
            key=pick([b"\xab", b"\xac", b"\x0b"]) + number.to_bytes(31, "big"),
            model=pick(["small", "large"]),
            endpoint=pick(["/v1/chat/completions", "/v1/completions"]),
            namespace=pick([b"", b"n" * 8]),
            fingerprint=pick([b"", b"f"]),
            stored_ms=NOW + draw(st.integers(0, 4)),
            sealed=draw(st.booleans()),
            words=draw(st.none() | TEXT),
            answer=said(draw(TEXT)),
        )
        for number in range(count)
    ]


WHICH = st.builds(
    Which,
    model=st.none() | st.sampled_from(["small", "none"]),
    endpoint=st.none() | st.just("/v1/completions"),
    namespace=st.none() | st.sampled_from([b"", b"n" * 8]),
    fingerprint=st.none() | st.sampled_from([b"", b"f"]),
    stored_before_ms=st.none() | st.integers(NOW, NOW + 5),
    stored_after_ms=st.none() | st.integers(NOW - 1, NOW + 4),
    text=st.none() | NEEDLE,
    key_prefix=st.none() | st.sampled_from(["", "a", "ab", "ac0", "0b", "f"]),
    sealed=st.none() | st.booleans(),
)


def is_meant(which: Which, one: Entry) -> bool:
    """What `Which` says, in plain Python."""
    content = "" if one.sealed else json.loads(one.answer)["choices"][0]["message"]["content"]
    texts = [(one.words or "").casefold(), content.casefold(), "" if one.sealed else "m"]
    return all(
        [
            which.model in (None, one.model),
            which.endpoint in (None, one.endpoint),
            which.namespace in (None, one.namespace),
            which.fingerprint in (None, one.fingerprint),
            which.stored_before_ms is None or one.stored_ms < which.stored_before_ms,
            which.stored_after_ms is None or one.stored_ms > which.stored_after_ms,
            which.text is None or any(which.text.casefold() in text for text in texts),
            which.key_prefix is None or one.key.hex().startswith(which.key_prefix),
            which.sealed in (None, one.sealed),
        ]
    )


async def walk(store: Store, which: Which, limit: int, **how: bool) -> list[Listed]:
    """All pages."""
    found: list[Listed] = []
    mark: int | None = 0
    while mark is not None:
        page = await store.select(which, mark, limit, **how)
        assert len(page.listed) <= limit
        found += page.listed
        mark = page.mark
    return found


async def emptied(store: Store) -> None:
    listed = await walk(store, Which(), 500)
    await store.write([Delete(one.entry.key) for one in listed])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=entries(), which=WHICH, limit=st.integers(1, 5), newest_first=st.booleans(), answers=st.booleans())
async def test_it_agrees_with_a_plain_filter(
    store: Store, stored: list[Entry], which: Which, limit: int, newest_first: bool, answers: bool
) -> None:
    await emptied(store)
    for one in stored:
        await store.write([Put(one)])
    found = await walk(store, which, limit, newest_first=newest_first, answers=answers)
    expected = [one for one in stored if is_meant(which, one)]
    if newest_first:
        expected.reverse()
    assert [one.entry for one in found] == [one if answers else replace(one, answer=b"") for one in expected]
    assert [one.size for one in found] == [len(one.answer) for one in expected]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    limit=st.integers(1, 7),
    newest_first=st.booleans(),
    between=st.lists(st.tuples(st.sampled_from(["add", "remove", "replace"]), st.integers(0, 39)), max_size=20),
)
async def test_what_stays_is_shown_once_whatever_comes_and_goes(
    store: Store, limit: int, newest_first: bool, between: list[tuple[str, int]]
) -> None:
    await emptied(store)
    await store.write([Put(entry(number, model="a" if number % 3 else "b")) for number in range(40)])
    stays = {key(number) for number in range(40) if number % 3}
    events = list(between)
    found: list[bytes] = []
    mark: int | None = 0
    while mark is not None:
        page = await store.select(Which(model="a"), mark, limit, newest_first=newest_first)
        found += [one.entry.key for one in page.listed]
        mark = page.mark
        if events:
            what, number = events.pop()
            if what == "add":
                await store.write([Put(entry(number + 100, model="a"))])
            else:
                stays.discard(key(number))
                await store.write([Delete(key(number)) if what == "remove" else Put(entry(number, model="a"))])
    assert {one: found.count(one) for one in stays} == dict.fromkeys(stays, 1)


@pytest.mark.parametrize("newest_first", [False, True])
async def test_pages_stay_small_and_miss_nothing_in_a_large_store(store: Store, newest_first: bool) -> None:
    for start in range(0, 5000, 500):
        await store.write([Put(entry(n, model="rare" if n % 997 == 0 else "m")) for n in range(start, start + 500)])
    found = await walk(store, Which(model="rare"), 2, newest_first=newest_first)
    numbers = [int.from_bytes(one.entry.key, "big") for one in found]
    assert sorted(numbers) == [0, 997, 1994, 2991, 3988, 4985]
    assert numbers == sorted(numbers, reverse=newest_first)
    # One look does not go through all of them.
    first = await store.select(Which(model="none"), 0, 10, newest_first=newest_first)
    assert first.listed == ()
    assert first.mark is not None


async def test_what_is_known_besides_is_shown(store: Store) -> None:
    await store.write([Put(entry(1), hits=3), Used(key(1), 2, NOW + 5)])
    (listed,) = (await store.select(Which(), 0, 10)).listed
    assert (listed.hits, listed.used_ms, listed.size) == (5, NOW + 5, len(entry(1).answer))


async def test_an_expired_entry_is_shown(store: Store) -> None:
    await store.write([Put(entry(1, expires_ms=NOW, stored_ms=NOW - 1))])
    assert len((await store.select(Which(), 0, 10)).listed) == 1


@pytest.mark.parametrize("text", [None, "xx"])
async def test_a_page_with_answers_is_bounded_in_bytes(store: Store, text: str | None) -> None:
    large = said("x" * 3_000_000)
    await store.write([Put(entry(number, answer=large)) for number in range(7)])
    pages = []
    mark: int | None = 0
    while mark is not None:
        page = await store.select(Which(text=text), mark, 100, answers=True)
        pages.append(page.listed)
        mark = page.mark
    assert max(sum(one.size for one in page) for page in pages) <= 8 * 1024 * 1024
    assert [one.entry.answer for page in pages for one in page] == [large] * 7


async def test_an_answer_larger_than_a_page_is_shown_alone(store: Store) -> None:
    large = said("x" * 9_000_000)
    await store.write([Put(entry(1)), Put(entry(2, answer=large)), Put(entry(3))])
    found = await walk(store, Which(), 10, answers=True)
    assert [one.size for one in found] == [len(entry(1).answer), len(large), len(entry(3).answer)]


@pytest.mark.parametrize(
    ("needle", "content", "found"),
    [
        ("cat", "A CAT", True),
        ("straße", "STRASSE", True),
        ("ΣΊΣΥΦΟΣ", "σίσυφος", True),
        ("🦙", "a 🦙!", True),
        ('say "no"', 'Say "No"', True),
        ("C:\\new", "c:\\NEW", True),
        ("two\nlines", "two\nlines", True),
        ("\x01\x1f", "\x01\x1f", True),
        # An escape is no letter: these are a line that begins with "ever", and a tab.
        ("never", "say\never", False),
        ("tall", "a\tall", False),
        ("\\n", "a\nb", False),
        # What every answer has as its form is not its text.
        ("choices", "yes", False),
        ("content", "yes", False),
        ("%", "yes", False),
        ("_es", "yes", False),
    ],
)
async def test_text_is_found_as_it_was_said(store: Store, needle: str, content: str, found: bool) -> None:
    await store.write([Put(entry(1, answer=said(content)))])
    assert len((await store.select(Which(text=needle), 0, 10)).listed) == found


async def test_the_text_of_a_sealed_answer_is_not_looked_at(store: Store) -> None:
    await store.write([Put(entry(1, answer=said("secret"), sealed=True)), Put(entry(2, words="Secret", sealed=True))])
    assert [one.entry.key for one in (await store.select(Which(text="SECRET"), 0, 10)).listed] == [key(2)]


@pytest.mark.parametrize("answer", [b"", b"\xff\xfe cat", b"[" * 100_000 + b" cat", b'"cat"', b"cat", b'{"cat'])
async def test_an_answer_of_any_form_is_searched(store: Store, answer: bytes) -> None:
    await store.write([Put(entry(1, answer=answer))])
    assert len((await store.select(Which(text="CAT"), 0, 10)).listed) == (b"cat" in answer)


async def test_while_others_write_no_page_has_what_was_not_asked_for(open_store: OpenStore) -> None:
    """The place of a removed entry may be given to another one at any moment."""
    async with open_store() as store:
        await store.write([Put(entry(number, model="m")) for number in range(50)])
        stop = asyncio.Event()

        async def churn() -> None:
            number = 50
            while not stop.is_set():
                await store.write([Delete(key(number - 1))])
                number += 1
                await store.write([Put(entry(number - 1, model="other" if number % 2 else "m"))])

        task = asyncio.create_task(churn())
        for _ in range(60):
            page = await store.select(Which(model="m"), 0, 100, newest_first=True)
            assert {one.entry.model for one in page.listed} == {"m"}
        stop.set()
        await task


async def test_when_entries_were_stored_is_told(store: Store) -> None:
    await store.write([Put(entry(number, stored_ms=NOW + number)) for number in range(1200)])
    asked = [key(number) for number in range(0, 2400, 2)]
    assert await store.stored(asked) == {key(number): NOW + number for number in range(0, 1200, 2)}
    assert await store.stored([]) == {}


@pytest.mark.parametrize(("newest_first", "beyond"), [(False, ">"), (True, "<")])
def test_a_scan_goes_along_the_primary_key(newest_first: bool, beyond: str) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        create_schema(connection)
        query = scan("e.model = 'm' AND e.sealed = 0 AND e.stored_ms > 5", newest_first=newest_first)
        plan = connection.execute(f"EXPLAIN QUERY PLAN {query}", {"mark": 1, "scanned": 5}).fetchall()
    assert [row[3] for row in plan] == [f"SEARCH e USING INTEGER PRIMARY KEY (rowid{beyond}?)"]
