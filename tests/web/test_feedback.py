"""`/-/feedback`: an answer that was called wrong goes, and its pair of questions never matches again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.base import Put, StorageBusy, StorageFull
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, raw
from tests.storage.engines import entry
from tests.web.test_explain import COMPLETION, asking, explained, written
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near
from tests.web.test_sharing import MINE, keyed
from tests.web.test_sharing import OTHER as THEIRS

TYPO = "How do I reset the ruoter in the living room?"
FAR_MS = 9_000_000_000_000
"""An expiry that no test lives to see."""


async def say(proxy: Proxy, shown: Any, headers: dict[str, str] | None = None, verdict: Any = "wrong") -> Answer:
    return await proxy.post("/-/feedback", json={"id": shown, "verdict": verdict}, headers=headers)


async def ask(proxy: Proxy, words: str, **more: Any) -> Answer:
    """A call, and its answer stored."""
    answer = await proxy.chat(words, **more)
    await proxy.settled()
    return answer


async def near_hit(proxy: Proxy, stored: str = ASKED, asked: str = ALIKE) -> str:
    """The id of the entry for `stored`, which was just served for `asked`."""
    assert (await ask(proxy, stored)).outcome == "MISS"
    answer = await ask(proxy, asked)
    assert answer.outcome == "NEAR"
    return str(answer.headers["X-Nearhit-Entry"])


def counted(proxy: Proxy) -> float:
    return proxy.services.metrics.value("nearhit_wrong_hits_total", {"source": "feedback"})


@asynccontextmanager
async def one_run(data: Path, model: FakeModel) -> AsyncIterator[Proxy]:
    """A proxy on this data directory, with the near tier loaded."""
    async with running_proxy(settings_for(data, model.url)) as proxy:
        await eventually(lambda: proxy.services.near is not None)
        yield proxy


# The pair


@pytest.mark.parametrize("asked", [ALIKE, TYPO])
@pytest.mark.parametrize("stored_first", [True, False])
async def test_a_wrong_near_hit_goes_and_its_pair_never_matches_again(
    start: StartProxy, asked: str, stored_first: bool
) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy, ASKED, asked)
    answer = await say(proxy, shown)
    assert (answer.status, answer.json["id"], answer.json["removed"]) == (200, shown, True)
    assert answer.json["pairs_never_again"] >= 1
    first, second = (ASKED, asked) if stored_first else (asked, ASKED)
    assert (await ask(proxy, first)).outcome == "MISS"
    refused = await ask(proxy, second)
    assert (refused.outcome, refused.headers["X-Nearhit-Rule"]) == ("MISS", "vetoed")
    # Each has an answer of its own from now on.
    assert [(await ask(proxy, words)).outcome for words in (first, second)] == ["HIT", "HIT"]


@pytest.mark.parametrize(
    "variant",
    [
        "How do I reset the ruoter in the living room",
        "how do I reset the  ruoter in the living room ?",
        "Please, how do I reset the ruoter in the living room? Thanks!",
        "HOW DO I RESET THE RUOTER IN THE LIVING ROOM?",
        "How can I reset the ruoter in the living room?",
    ],
)
@pytest.mark.parametrize("stored_first", [True, False])
async def test_light_variants_of_the_spelling_are_the_same_pair(
    start: StartProxy, variant: str, stored_first: bool
) -> None:
    proxy = await with_near(start)
    assert (await say(proxy, await near_hit(proxy, ASKED, TYPO))).status == 200
    first, second = (ASKED, variant) if stored_first else (variant, ASKED)
    assert (await ask(proxy, first)).outcome == "MISS"
    assert (await ask(proxy, second)).outcome == "MISS"


async def test_only_what_was_called_wrong_stops_matching(start: StartProxy) -> None:
    proxy = await with_near(start)
    assert (await say(proxy, await near_hit(proxy, ASKED, TYPO))).status == 200
    assert (await ask(proxy, ASKED)).outcome == "MISS"
    assert (await ask(proxy, ALIKE)).outcome == "NEAR"
    assert (await ask(proxy, OTHER)).outcome == "MISS"
    assert (await ask(proxy, "hey, how can I reset the router in the dining room?")).outcome == "NEAR"


async def test_all_that_an_entry_was_served_for_stops_matching_it(start: StartProxy) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy, ASKED, TYPO)
    another = "How do I reset the router in the lving room?"
    assert (await ask(proxy, another)).outcome == "NEAR"
    assert (await say(proxy, shown)).json["pairs_never_again"] >= 2
    assert (await ask(proxy, ASKED)).outcome == "MISS"
    for words in (TYPO, another):
        # Asking in earnest would store another entry that the second may match.
        told = await explained(proxy, asking(words))
        assert (told["outcome"], told["near"]["candidates"][0]["rule"]) == ("MISS", "vetoed")


@pytest.mark.parametrize("stored_first", [True, False])
async def test_a_pair_called_wrong_stays_so_after_a_restart(
    tmp_path: Path, model: FakeModel, stored_first: bool
) -> None:
    async with one_run(tmp_path, model) as proxy:
        assert (await say(proxy, await near_hit(proxy, ASKED, TYPO))).status == 200
    first, second = (ASKED, TYPO) if stored_first else (TYPO, ASKED)
    async with one_run(tmp_path, model) as proxy:
        assert (await ask(proxy, first)).outcome == "MISS"
    async with one_run(tmp_path, model) as proxy:
        assert (await ask(proxy, second)).outcome == "MISS"
        assert (await ask(proxy, first)).outcome == "HIT"


@pytest.mark.parametrize("stored_first", [True, False])
async def test_feedback_after_a_restart_still_ends_the_pair(
    tmp_path: Path, model: FakeModel, stored_first: bool
) -> None:
    async with one_run(tmp_path, model) as proxy:
        shown = await near_hit(proxy, ASKED, TYPO)
    async with one_run(tmp_path, model) as proxy:
        answer = await say(proxy, shown)
        assert (answer.status, answer.json["pairs_never_again"]) == (200, 1)
        first, second = (ASKED, TYPO) if stored_first else (TYPO, ASKED)
        assert (await ask(proxy, first)).outcome == "MISS"
        assert (await ask(proxy, second)).outcome == "MISS"


async def test_explain_tells_that_a_pair_was_called_wrong(start: StartProxy) -> None:
    proxy = await with_near(start)
    await say(proxy, await near_hit(proxy))
    await ask(proxy, ASKED)
    told = await explained(proxy, asking(ALIKE))
    assert told["outcome"] == "MISS"
    assert [(one["same"], one["rule"]) for one in told["near"]["candidates"]] == [(False, "vetoed")]


# The entry


async def test_an_exact_hit_that_was_wrong_is_asked_anew(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await ask(proxy, ASKED)
    shown = (await ask(proxy, ASKED)).headers["X-Nearhit-Entry"]
    assert (await say(proxy, shown)).status == 200
    assert (await ask(proxy, ASKED)).outcome == "MISS"
    assert len(model.generations) == 2
    assert (await ask(proxy, ASKED)).outcome == "HIT"


async def test_an_entry_of_the_exact_tier_alone_goes_too(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__mode="exact")
    model.respond = raw(json.dumps(COMPLETION).encode())
    outcomes = []
    for _ in range(3):
        answer = await proxy.post("/v1/completions", json={"prompt": "x", "temperature": 0})
        await proxy.settled()
        outcomes.append(answer.outcome)
        if answer.outcome == "HIT":
            told = await say(proxy, answer.headers["X-Nearhit-Entry"])
            assert (told.status, told.json["pairs_never_again"]) == (200, 0)
    assert outcomes == ["MISS", "HIT", "MISS"]


async def test_an_entry_that_was_not_written_yet_goes_too(start: StartProxy) -> None:
    proxy = await with_near(start, cache__flush_s=60)
    shown = await near_hit(proxy)
    assert (await proxy.stats())["cache.size"] == 0
    assert (await say(proxy, shown)).status == 200
    assert (await ask(proxy, ASKED)).outcome == "MISS"
    assert (await ask(proxy, ALIKE)).outcome == "MISS"


async def test_other_entries_stay(start: StartProxy) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    await ask(proxy, OTHER)
    assert (await say(proxy, shown)).status == 200
    assert (await ask(proxy, OTHER)).outcome == "HIT"
    assert (await proxy.stats())["cache.size"] == 1
    assert await proxy.services.store.problems() == []


# Counted once


async def test_a_wrong_hit_is_counted_once(start: StartProxy) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    assert (await proxy.stats())["cache.wrong_hits"] == 0
    assert (await say(proxy, shown)).status == 200
    again = await say(proxy, shown)
    assert (again.status, again.json["error"]["code"]) == (404, "entry_not_found")
    assert (await say(proxy, "xyz")).status == 400
    assert (counted(proxy), (await proxy.stats())["cache.wrong_hits"]) == (1, 1)
    assert b'nearhit_wrong_hits_total{source="feedback"} 1.0' in (await proxy.send("GET", "/metrics")).body
    # The new answer to the same question may be wrong as well.
    await ask(proxy, ASKED)
    assert (await say(proxy, shown)).status == 200
    assert (await proxy.stats())["cache.wrong_hits"] == 2


async def test_feedback_is_no_request_to_a_cacheable_endpoint(start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    before = (await proxy.stats())["requests"]
    await say(proxy, shown)
    assert (await proxy.stats())["requests"] == before
    assert not [seen for seen in model.seen if seen.target.startswith("/-")]


# Ids


@pytest.mark.parametrize("digits", [8, 10, 16, 30, 32])
async def test_the_first_digits_of_an_id_will_do(start: StartProxy, digits: int) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    answer = await say(proxy, shown[:digits])
    assert (answer.status, answer.json["id"]) == (200, shown)
    assert (await ask(proxy, ASKED)).outcome == "MISS"


@pytest.mark.parametrize("digits", [9, 31])
async def test_an_odd_number_of_digits_will_do(start: StartProxy, digits: int) -> None:
    proxy = await with_near(start)
    assert (await say(proxy, (await near_hit(proxy))[:digits])).status == 200


async def test_upper_case_digits_will_do(start: StartProxy) -> None:
    proxy = await with_near(start)
    assert (await say(proxy, (await near_hit(proxy)).upper())).status == 200


async def test_an_id_that_several_entries_share_removes_none(start: StartProxy) -> None:
    proxy = await with_near(start)
    keys = [b"\xab\xcd\xef\x01" + bytes([number]) * 28 for number in (1, 2)]
    entries = [entry(key=key, namespace=b"", expires_ms=FAR_MS) for key in keys]
    await proxy.services.store.write([Put(one) for one in entries])
    answer = await say(proxy, "abcdef01")
    assert (answer.status, answer.json["error"]["code"]) == (409, "entry_not_found")
    assert "give more of it" in answer.json["error"]["message"]
    assert (await proxy.stats())["cache.size"] == 2
    assert (await say(proxy, "abcdef0102")).status == 200
    assert (await say(proxy, "abcdef01")).json["id"] == keys[0][:16].hex()
    assert counted(proxy) == 2


@pytest.mark.parametrize("shown", ["", "abc", "abcdef", "not an id", "0x123456", "é" * 8, "00" * 33, "ab" * 3])
async def test_what_is_no_id_is_refused(start: StartProxy, shown: str) -> None:
    proxy = await with_near(start)
    await near_hit(proxy)
    answer = await say(proxy, shown)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "X-Nearhit-Entry" in answer.json["error"]["message"]


@pytest.mark.parametrize("shown", ["00000000", "00" * 16, "00" * 32])
async def test_an_unknown_id_is_not_found(start: StartProxy, shown: str) -> None:
    proxy = await with_near(start)
    await near_hit(proxy)
    assert (await say(proxy, shown)).status == 404
    assert (await ask(proxy, ASKED)).outcome == "HIT"
    assert counted(proxy) == 0


@pytest.mark.parametrize("verdict", ["right", "WRONG", "", None, True, ["wrong"], {}])
async def test_an_unknown_verdict_is_refused_and_removes_nothing(start: StartProxy, verdict: Any) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    answer = await say(proxy, shown, verdict=verdict)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_feedback")
    assert (await ask(proxy, ALIKE)).outcome == "NEAR"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "not_json"),
        (b"{", "not_json"),
        (b"[]", "not_json"),
        (b'"wrong"', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"{}", "bad_feedback"),
        (b'{"verdict": "wrong"}', "bad_feedback"),
        (b'{"id": 12345678, "verdict": "wrong"}', "bad_feedback"),
        (b'{"id": ["12345678"], "verdict": "wrong"}', "bad_feedback"),
        (b'{"id": null, "verdict": "wrong"}', "bad_feedback"),
    ],
)
async def test_a_body_that_is_no_feedback_is_refused(proxy: Proxy, body: bytes, code: str) -> None:
    answer = await proxy.post("/-/feedback", data=body)
    assert (answer.status, answer.json["error"]["code"]) == (400, code)
    assert set(answer.json["error"]) == {"message", "type", "code"}


async def test_an_id_of_lone_surrogates_is_no_id(proxy: Proxy) -> None:
    answer = await proxy.post("/-/feedback", data=b'{"id": "\\ud83d\\ud83d\\ud83d\\ud83d", "verdict": "wrong"}')
    assert answer.status == 400


# Whose entry


async def test_a_client_cannot_remove_anothers_entry(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine", "other")
    proxy = await with_near(start, upstream__api_key="mine")
    await ask(proxy, ASKED, headers=MINE)
    shown = (await ask(proxy, ALIKE, headers=MINE)).headers["X-Nearhit-Entry"]
    for headers, status in ((THEIRS, 404), ({}, 403), ({"Authorization": "Bearer stolen"}, 403)):
        assert (await say(proxy, shown, headers)).status == status
        assert (await ask(proxy, ASKED, headers=MINE)).outcome == "HIT"
    assert counted(proxy) == 0
    assert (await say(proxy, shown, MINE)).status == 200
    assert (await ask(proxy, ASKED, headers=MINE)).outcome == "MISS"


async def test_a_pair_called_wrong_by_one_client_matches_for_another(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine", "other")
    proxy = await with_near(start, upstream__api_key="mine")
    for headers in (MINE, THEIRS):
        await ask(proxy, ASKED, headers=headers)
    shown = (await ask(proxy, ALIKE, headers=MINE)).headers["X-Nearhit-Entry"]
    assert (await say(proxy, shown, MINE)).status == 200
    assert (await ask(proxy, ALIKE, headers=THEIRS)).outcome == "NEAR"


async def test_an_id_that_only_anothers_entry_shares_is_not_ambiguous(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine", "other")
    proxy = await with_near(start, upstream__api_key="mine")
    await ask(proxy, ASKED, headers=MINE)
    shown = (await ask(proxy, ASKED, headers=MINE)).headers["X-Nearhit-Entry"]
    twin = bytes.fromhex(shown[:8]) + b"\x00" * 28
    await proxy.services.store.write([Put(entry(key=twin, namespace=b"another", expires_ms=FAR_MS))])
    admin = {"X-Nearhit-Admin": proxy.services.local_token}
    assert (await say(proxy, shown[:8], admin)).status == 409
    assert (await say(proxy, shown[:8], MINE)).json["id"] == shown


async def test_an_admin_removes_anybodys_entry(start: StartProxy, model: FakeModel) -> None:
    model.extra = keyed("mine")
    proxy = await with_near(start, upstream__api_key="mine")
    await ask(proxy, ASKED, headers=MINE)
    shown = (await ask(proxy, ASKED, headers=MINE)).headers["X-Nearhit-Entry"]
    assert (await say(proxy, shown, {"X-Nearhit-Admin": proxy.services.local_token})).status == 200
    assert (await ask(proxy, ASKED, headers=MINE)).outcome == "MISS"


@pytest.mark.parametrize("sharing", ["auto", "per-credential"])
async def test_a_wrong_answer_of_a_room_is_named_with_its_room(
    start: StartProxy, model: FakeModel, sharing: str
) -> None:
    model.extra = keyed("mine")
    proxy = await start(sharing=sharing, upstream__api_key="mine")
    room: dict[str, Any] = {"cache": {"namespace": "room"}}
    for fields in ({}, room):
        await ask(proxy, ASKED, headers=MINE, **fields)
    shown = (await ask(proxy, ASKED, headers=MINE, **room)).headers["X-Nearhit-Entry"]
    wrong = {"id": shown, "verdict": "wrong"}
    others: list[dict[str, Any]] = [{}, {"cache": {"namespace": "another"}}, {"cache": {}}]
    for other in others:
        assert (await proxy.post("/-/feedback", json={**wrong, **other}, headers=MINE)).status == 404
    assert (await ask(proxy, ASKED, headers=MINE, **room)).outcome == "HIT"
    assert (await proxy.post("/-/feedback", json={**wrong, **room}, headers=MINE)).status == 200
    assert (await ask(proxy, ASKED, headers=MINE, **room)).outcome == "MISS"
    assert (await ask(proxy, ASKED, headers=MINE)).outcome == "HIT"


@pytest.mark.parametrize("controls", [{"namespace": 7}, {"ttl": "long"}])
async def test_a_cache_object_that_is_none_is_refused(proxy: Proxy, controls: Any) -> None:
    answer = await proxy.post("/-/feedback", json={"id": "ab" * 32, "verdict": "wrong", "cache": controls})
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_feedback")


# When storage fails


@pytest.mark.parametrize("operation", ["veto", "find"])
@pytest.mark.parametrize("error", [StorageFull("no space"), StorageBusy("locked")])
async def test_what_cannot_be_written_down_removes_nothing(
    start: StartProxy, monkeypatch: pytest.MonkeyPatch, operation: str, error: Exception
) -> None:
    proxy = await with_near(start)
    shown = await near_hit(proxy)
    store: Any = proxy.services.store

    async def failing(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store.current, operation, failing)
        answer = await say(proxy, shown)
        assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")
    assert counted(proxy) == 0
    assert (await ask(proxy, ASKED)).outcome == "HIT"
    assert (await ask(proxy, ALIKE)).outcome == "NEAR"
    assert (await say(proxy, shown)).status == 200
    assert (await ask(proxy, ASKED)).outcome == "MISS"


@pytest.mark.parametrize("near", [True, False])
async def test_an_entry_that_could_not_be_removed_is_not_told_as_removed(
    start: StartProxy, model: FakeModel, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    proxy = await with_near(start, cache__flush_s=0.01)
    path, body = "/v1/chat/completions", asking()
    if not near:
        model.respond = raw(json.dumps(COMPLETION).encode())
        path, body = "/v1/completions", {"prompt": "x", "temperature": 0}
    await proxy.post(path, json=body)
    await proxy.settled()
    shown = (await proxy.post(path, json=body)).headers["X-Nearhit-Entry"]
    await written(proxy, 1)
    store: Any = proxy.services.store

    async def full(*_: Any) -> None:
        raise StorageFull("no space")

    with monkeypatch.context() as patched:
        patched.setattr(store.current, "write", full)
        answer = await say(proxy, shown)
    again = await proxy.post(path, json=body)
    assert (answer.status, again.outcome) in ((200, "MISS"), (503, "HIT"), (503, "MISS"))
