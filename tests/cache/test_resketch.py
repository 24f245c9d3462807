"""Entries without a sketch of today's scheme get one in the background, so that other words find them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.cache import resketch
from proxy.cache.near.matcher import Matcher, load
from proxy.cache.near.tier import Nearest, NearTier
from proxy.cache.resketch import Resketcher
from storage.base import Change, Delete, Put, Sketched, StorageBusy, StorageError, StorageFull, Unsketched
from storage.sqlite import open_sqlite
from storage.store import Store
from storage.write_behind import WriteBehind
from tests.conftest import Proxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel
from tests.storage.engines import FOREVER, NOW, near, sketch
from tests.web.test_near import ALIKE, ASKED

SPACE = b"s" * 32
TYPO = "How do I reset the ruoter in the living room?"


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return load()


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    async with open_sqlite(None) as opened:
        yield opened
        assert await opened.problems() == []


class Failures(list[tuple[str, StorageError]]):
    """What was reported."""

    def __call__(self, operation: str, error: StorageError) -> None:
        self.append((operation, error))


def resketcher(store: resketch.Sketches, matcher: Matcher, failures: Failures | None = None) -> Resketcher:
    return Resketcher(store, matcher, now_ms=lambda: NOW, failed=failures if failures is not None else Failures())


@asynccontextmanager
async def in_background(work: Resketcher) -> AsyncIterator[None]:
    task = asyncio.create_task(work.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def found(store: Store, matcher: Matcher, words: str = TYPO) -> Nearest:
    buffer = WriteBehind(store, Failures(), flush_s=FOREVER, max_pending_bytes=1_000_000)
    return await NearTier(buffer, matcher).find(SPACE, b"", words, threshold=0.6, now_ms=NOW)


async def caught_up(store: Store, matcher: Matcher) -> None:
    async with asyncio.timeout(60):
        while await store.unsketched(matcher.scheme, 1):
            await asyncio.sleep(0.005)


# Entries without a sketch


async def test_an_entry_without_a_sketch_becomes_findable(store: Store, matcher: Matcher) -> None:
    await store.write([Put(near(1, words=ASKED))])
    assert (await found(store, matcher)).judged == ()
    assert await resketcher(store, matcher).step() == 1
    for words, rule in ((ALIKE, "equal"), (TYPO, "typo")):
        nearest = await found(store, matcher, words)
        assert nearest.found is not None
        assert (nearest.found.candidate.words, nearest.found.verdict.rule) == (ASKED, rule)


async def test_what_is_made_is_what_a_new_entry_gets(store: Store, matcher: Matcher) -> None:
    await store.write([Put(near(1, words=ASKED))])
    await resketcher(store, matcher).step()
    made = matcher.sketch(matcher.prepare(ASKED), SPACE)
    (candidate,) = await store.candidates(SPACE, made.keys, NOW, per_key=8, limit=8)
    assert (candidate.skeleton, candidate.shared) == (made.skeleton, len(set(made.keys)))


async def test_all_are_made_a_few_at_a_time(store: Store, matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resketch, "_PAUSE_S", 0.0)
    await store.write([Put(near(number, words=f"How do I reset router number {number}?")) for number in range(100)])
    sizes: list[int] = []
    work = resketcher(store, matcher)
    while size := await work.step():
        sizes.append(size)
    assert sum(sizes) == 100
    assert max(sizes) < 100
    assert await store.unsketched(matcher.scheme, 1) == []


async def test_entries_that_serve_no_other_words_are_left_alone(store: Store, matcher: Matcher) -> None:
    await store.write([Put(near(1, near=False)), Put(near(2, words=None))])
    assert await resketcher(store, matcher).step() == 0


@pytest.mark.parametrize("words", [" ", "?", "\x00", "🤷", "a" * 5000, "one two " * 1000, "\u202e", "你好吗"])
async def test_any_words_are_done_with_at_once(store: Store, matcher: Matcher, words: str) -> None:
    await store.write([Put(near(1, words=words))])
    work = resketcher(store, matcher)
    assert [await work.step(), await work.step()] == [1, 0]


# Another scheme


async def test_sketches_of_another_scheme_match_nothing_until_they_are_made_anew(
    store: Store, matcher: Matcher
) -> None:
    older = sketch(1, 2, 3, scheme=matcher.scheme ^ 1, skeleton=matcher.prepare(ASKED).skeleton)
    await store.write([Put(near(1, words=ASKED), older), Put(near(2, words="something else"))])
    await store.write([Sketched(near(2).key, sketch(4, 5, scheme=-7))])
    assert (await found(store, matcher)).judged == ()
    async with in_background(resketcher(store, matcher)):
        await caught_up(store, matcher)
    nearest = await found(store, matcher)
    assert nearest.found is not None
    assert nearest.found.candidate.words == ASKED
    # The older keys are gone.
    assert await store.candidates(SPACE, (1, 2, 3, 4, 5), NOW, per_key=8, limit=8) == []


async def test_the_scheme_is_described_for_people(store: Store, matcher: Matcher) -> None:
    await store.record_scheme(-7, "an older one", NOW)
    async with in_background(resketcher(store, matcher)):
        async with asyncio.timeout(60):
            while matcher.scheme not in await store.schemes():
                await asyncio.sleep(0.005)
    assert await store.schemes() == {-7: "an older one", matcher.scheme: matcher.description}


# When storage fails


class Failing:
    """A real store that fails where and as often as told."""

    def __init__(self, store: Store, operation: str, errors: Sequence[StorageError]) -> None:
        self._store = store
        self._operation = operation
        self._errors = list(errors)

    def _pass(self, operation: str) -> None:
        if operation == self._operation and self._errors:
            raise self._errors.pop(0)

    async def unsketched(self, scheme: int, limit: int) -> list[Unsketched]:
        self._pass("unsketched")
        return await self._store.unsketched(scheme, limit)

    async def leads(self) -> bool:
        return await self._store.leads()

    async def record_scheme(self, scheme: int, description: str, now_ms: int) -> None:
        self._pass("record_scheme")
        await self._store.record_scheme(scheme, description, now_ms)

    async def write(self, changes: Sequence[Change]) -> int:
        self._pass("write")
        return await self._store.write(changes)


@pytest.mark.parametrize("operation", ["unsketched", "record_scheme", "write"])
async def test_errors_are_reported_and_tried_again(
    store: Store, matcher: Matcher, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setattr(resketch, "_RETRY_S", 0.0)
    await store.write([Put(near(1, words=ASKED))])
    errors = [StorageBusy("locked"), StorageFull("no space")]
    failures = Failures()
    async with in_background(resketcher(Failing(store, operation, errors), matcher, failures)):
        await caught_up(store, matcher)
        assert failures == [("sketch", error) for error in errors]
    assert (await found(store, matcher)).found is not None


async def test_an_entry_that_goes_meanwhile_is_no_error(store: Store, matcher: Matcher) -> None:
    class Evicting(Failing):
        async def write(self, changes: Sequence[Change]) -> int:
            await self._store.write([Delete(near(1).key)])
            return await super().write(changes)

    await store.write([Put(near(1, words=ASKED))])
    work = resketcher(Evicting(store, "", []), matcher)
    assert [await work.step(), await work.step()] == [1, 0]
    assert (await store.totals()).entries == 0


# In a running nearhit


async def ask(proxy: Proxy, words: str) -> str:
    answer = await proxy.chat(words)
    await proxy.settled()
    return answer.outcome


async def sketched(proxy: Proxy) -> None:
    await eventually(lambda: proxy.services.near is not None)
    tier = proxy.services.near
    assert tier is not None
    await caught_up(proxy.services.store, tier.matcher)


async def test_what_the_exact_tier_alone_has_stored_is_found_later(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, cache__mode="exact")) as proxy:
        assert [await ask(proxy, ASKED), await ask(proxy, ALIKE)] == ["MISS", "MISS"]
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await sketched(proxy)
        assert await ask(proxy, TYPO) == "NEAR"
        assert matchers_scheme(proxy) in await proxy.services.store.schemes()


async def test_a_file_of_another_version_is_sketched_anew(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert await ask(proxy, ASKED) == "MISS"
    async with open_sqlite(tmp_path / "nearhit.db") as file:
        (entry,) = await file.unsketched(0, 8)
        await file.write([Sketched(entry.key, sketch(1, 2, 3, scheme=0, skeleton="of old"))])
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await sketched(proxy)
        assert await ask(proxy, TYPO) == "NEAR"
        assert await proxy.services.store.problems() == []


def matchers_scheme(proxy: Proxy) -> int:
    assert proxy.services.near is not None
    return proxy.services.near.matcher.scheme
