"""Two nearhits on one database file: each input is asked of the server once, whichever of the two it comes to."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Answer, Proxy, eventually, running_proxy, settings_for
from tests.failures.serving import Nearhit
from tests.fake_model import FakeModel
from tests.web.test_clients import CLIENTS, OURS, by
from tests.web.test_embeddings import (
    PATH,
    Vectors,
    embedding,
    of,
    outlived,
    packed,
    status,
    told,
    value,
    vector_of,
    vectors,
)
from tests.web.test_two_leases import COLLAPSED, others_know, overtake, two_processes

__all__ = ["vectors"]

Pair = tuple[Proxy, Proxy]


pytestmark = pytest.mark.usefixtures("patient_leases")


@pytest.fixture
async def two(tmp_path: Path, model: FakeModel, vectors: Vectors) -> AsyncIterator[Pair]:
    async with pair(tmp_path, model) as both:
        vectors.held = True
        yield both


@asynccontextmanager
async def pair(folder: Path, model: FakeModel, **options: Any) -> AsyncIterator[Pair]:
    settings = settings_for(folder, model.url, **options)
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        await eventually(lambda: others_know(one) and others_know(other))
        yield one, other


def begun(proxy: Proxy, given: Any, **more: Any) -> asyncio.Task[Answer]:
    return asyncio.create_task(embedding(proxy)(given, settle=False, **more))


async def asked(proxy: Proxy, vectors: Vectors, given: Any, **more: Any) -> asyncio.Task[Answer]:
    """A batch of which something is asked of the server."""
    before = vectors.started
    task = begun(proxy, given, **more)
    await eventually(lambda: vectors.started == before + 1)
    return task


async def waits(proxy: Proxy, given: Any, **more: Any) -> asyncio.Task[Answer]:
    """A batch that has found who asks for its inputs."""
    before = proxy.services.in_flight
    task = begun(proxy, given, **more)
    await eventually(lambda: proxy.services.in_flight > before)
    return task


async def settled(two: Pair) -> None:
    for proxy in two:
        await proxy.settled()


# What is asked


async def test_equal_batches_at_two_make_one_request(two: Pair, vectors: Vectors) -> None:
    tasks = [begun(proxy, ["a", "b", "a"]) for _ in range(20) for proxy in two]
    # But for one at each, all wait for another of their own.
    await eventually(lambda: [value(proxy, "joined_total") for proxy in two] == [38, 38])
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert vectors.inputs == [["a", "b"]]
    assert all(told(answer) == of("a", "b", "a") for answer in answers)
    assert sorted(answer.outcome for answer in answers) == ["JOINED"] * 39 + ["MISS"]
    assert {status(answer) for answer in answers if answer.outcome == "JOINED"} == {COLLAPSED}
    await settled(two)
    assert {(await embedding(proxy)(["b", "a"])).outcome for proxy in two} == {"HIT"}


async def test_a_whole_batch_goes_and_comes_as_it_is(two: Pair, vectors: Vectors) -> None:
    vectors.held = False
    raw = b'{"input": ["a", "b"],  "model": "tiny"}'
    answer = await two[0].post(PATH, data=raw, headers={"Content-Type": "application/json"})
    assert vectors.raw == [raw]
    assert (answer.outcome, status(answer), answer.headers["X-Up"]) == ("MISS", "nearhit; fwd=miss", "yes")


async def test_what_the_other_asks_for_is_waited_for_and_the_rest_is_asked_at_once(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader = await asked(one, vectors, ["a", "b", "c"])
    follower = await asked(other, vectors, ["c", "d", "b", "e"])
    assert vectors.inputs == [["a", "b", "c"], ["d", "e"]]
    vectors.release.set()
    assert told(await leader) == of("a", "b", "c")
    answer = await follower
    assert told(answer) == of("c", "d", "b", "e")
    assert (answer.outcome, status(answer), answer.headers["X-Up"]) == ("MISS", "nearhit; fwd=miss", "yes")
    await settled(two)
    assert len(vectors.asked) == 2
    assert answer.json["usage"] == {"prompt_tokens": 8, "total_tokens": 8}


async def test_known_inputs_are_put_together_with_those_that_the_other_asked_for(two: Pair, vectors: Vectors) -> None:
    one, other = two
    vectors.held = False
    await embedding(other)(["known"])
    vectors.held = True
    leader = await asked(one, vectors, ["a"])
    follower = await waits(other, ["known", "a"])
    vectors.release.set()
    answer = await follower
    assert told(answer) == of("known", "a")
    assert (answer.outcome, status(answer)) == ("JOINED", "nearhit; fwd=partial; collapsed")
    assert answer.headers["X-Nearhit-Items"] == "1/2"
    assert vectors.inputs == [["known"], ["a"]]
    await leader


async def test_batches_that_want_each_others_inputs_do_not_wait_for_each_other(two: Pair, vectors: Vectors) -> None:
    one, other = two
    first = [await asked(one, vectors, ["a", "b"]), await asked(other, vectors, ["c", "b"])]
    # Each of the two has what the other lacks, and asks for one more.
    crossed = [await asked(one, vectors, ["c", "d"]), await asked(other, vectors, ["a", "e"])]
    joined = [await waits(one, ["c", "e"]), await waits(other, ["d", "a"])]
    assert vectors.inputs == [["a", "b"], ["c"], ["d"], ["e"]]
    vectors.release.set()
    answers = await asyncio.gather(*first, *crossed, *joined)
    wanted = (["a", "b"], ["c", "b"], ["c", "d"], ["a", "e"], ["c", "e"], ["d", "a"])
    assert [told(answer) for answer in answers] == [of(*texts) for texts in wanted]
    assert len(vectors.asked) == 4


async def test_many_overlapping_batches_at_two_ask_each_input_once(two: Pair, vectors: Vectors) -> None:
    chance = random.Random(11)
    texts = [f"text {number}" for number in range(40)]
    wanted = [chance.choices(texts, k=chance.randint(1, 12)) for _ in range(60)]
    tasks = [begun(chance.choice(two), given) for given in wanted]
    everything = {text for given in wanted for text in given}
    await eventually(lambda: sum(map(len, vectors.inputs)) == len(everything))
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert [told(answer) for answer in answers] == [of(*given) for given in wanted]
    await settled(two)
    once = [text for given in vectors.inputs for text in given]
    assert len(once) == len(set(once)) == len(everything)


async def test_batches_whose_clients_leave_leave_nothing_behind(two: Pair, vectors: Vectors) -> None:
    chance = random.Random(13)
    texts = [f"text {number}" for number in range(20)]
    wanted = [chance.choices(texts, k=chance.randint(1, 8)) for _ in range(40)]
    tasks = [begun(chance.choice(two), given) for given in wanted]
    await eventually(lambda: vectors.started > 0)
    for task in tasks[::2]:
        await asyncio.sleep(0.003)
        task.cancel()
    vectors.release.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    for given, answer in list(zip(wanted, answers, strict=True))[1::2]:
        assert isinstance(answer, Answer)
        assert told(answer) == of(*given)
    await settled(two)
    for proxy in two:
        # Nobody holds a lease any more, so that nobody waits.
        assert told(await embedding(proxy)(texts)) == of(*texts)


async def test_each_has_its_own_form(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader, follower = await asked(one, vectors, ["a"]), await waits(other, ["a"], encoding_format="base64")
    vectors.release.set()
    assert (told(await leader), told(await follower)) == (of("a"), [packed(vector_of("a"))])
    assert len(vectors.asked) == 1


async def test_what_waits_for_the_other_is_joined(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader = await asked(one, vectors, ["a"])
    followers = [await waits(other, ["a"]), begun(other, ["a"])]
    await eventually(lambda: value(other, "joined_total") == 1)
    vectors.release.set()
    assert [told(answer) for answer in await asyncio.gather(leader, *followers)] == [of("a")] * 3
    assert len(vectors.asked) == 1


async def test_everything_is_counted_once(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader, follower = await asked(one, vectors, ["a", "b"]), await asked(other, vectors, ["b", "c"])
    vectors.release.set()
    await asyncio.gather(leader, follower)
    await settled(two)
    assert [value(proxy, "stored_total") for proxy in two] == [2, 1]
    assert [value(proxy, "joined_total") for proxy in two] == [0, 1]
    assert [value(proxy, "misses_total", reason="absent") for proxy in two] == [2, 1]
    assert [value(proxy, "upstream_seconds_count") for proxy in two] == [1, 1]
    assert [(await proxy.stats())["not_stored"] for proxy in two] == [{}, {}]


async def test_a_stale_vector_is_renewed_by_one_of_two(two: Pair, vectors: Vectors) -> None:
    one, other = two
    vectors.held = False
    await outlived(embedding(one), "old")
    await one.services.buffer.flush()
    vectors.held = True
    leader, follower = await asked(one, vectors, ["old"]), await waits(other, ["old"])
    vectors.release.set()
    assert [answer.outcome for answer in await asyncio.gather(leader, follower)] == ["MISS", "JOINED"]
    assert vectors.inputs == [["old"]] * 2


async def test_in_the_background_too(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    async with pair(tmp_path, model, cache__stale_while_revalidate_s=600) as (one, other):
        await outlived(embedding(one), "old")
        await one.services.buffer.flush()
        # Until it has learned what the other stored.
        while (await embedding(other)(["old"], headers={"Cache-Control": "only-if-cached"})).status != 200:
            await asyncio.sleep(0.02)
        vectors.held = True
        assert (await asyncio.gather(await asked(one, vectors, ["old"])))[0].outcome == "STALE"
        assert (await begun(other, ["old"])).outcome == "STALE"
        vectors.release.set()
        await settled((one, other))
        assert vectors.inputs == [["old"]] * 2
        assert [(await embedding(proxy)(["old"])).outcome for proxy in (one, other)] == ["HIT", "HIT"]


# What does not come


async def test_what_the_other_did_not_keep_is_asked_for_alone(two: Pair, vectors: Vectors) -> None:
    one, other = two

    def empty(asked: dict[str, Any], answered: dict[str, Any]) -> dict[str, Any]:
        for text, item in zip(asked["input"], answered["data"], strict=True):
            if text == "zero":
                item["embedding"] = [0.0] * 3
        return answered

    vectors.change = empty
    leader, follower = await asked(one, vectors, ["a", "zero", "b"]), await waits(other, ["b", "zero", "a"])
    vectors.release.set()
    await leader
    answer = await follower
    assert told(answer) == [vector_of("b"), [0.0] * 3, vector_of("a")]
    assert (answer.outcome, vectors.inputs) == ("MISS", [["a", "zero", "b"], ["zero"]])
    assert value(other, "joined_total") == 2


async def test_a_failure_holds_nobody_up(two: Pair, vectors: Vectors) -> None:
    one, other = two
    vectors.status = 500
    leader, follower = await asked(one, vectors, ["a", "b"]), await waits(other, ["b", "a"])
    vectors.release.set()
    answers = await asyncio.gather(leader, follower)
    assert [(answer.status, answer.outcome) for answer in answers] == [(500, "MISS")] * 2
    # The next, too: they are told for a while, and ask side by side.
    vectors.release.clear()
    again = [await asked(one, vectors, ["a"]), await asked(other, vectors, ["a"])]
    vectors.release.set()
    assert {answer.status for answer in await asyncio.gather(*again)} == {500}


async def test_what_is_wrong_with_an_input_of_the_other_fails_no_batch_without_it(two: Pair, vectors: Vectors) -> None:
    one, other = two

    def picky(asked: dict[str, Any], answered: dict[str, Any]) -> Any:
        if "bad" in asked["input"]:
            raise web.HTTPBadRequest(text='{"error": "bad"}')
        return answered

    vectors.change = picky
    leader, follower = await asked(one, vectors, ["bad", "a"]), await asked(other, vectors, ["a", "b"])
    vectors.release.set()
    answers = await asyncio.gather(leader, follower)
    assert [answer.status for answer in answers] == [400, 200]
    assert told(answers[1]) == of("a", "b")


async def test_vectors_of_two_lengths_are_not_mixed(two: Pair, vectors: Vectors) -> None:
    one, other = two

    def longer(asked: dict[str, Any], answered: dict[str, Any]) -> dict[str, Any]:
        if "c" in asked["input"]:
            for item in answered["data"]:
                item["embedding"] = [*item["embedding"], 1.0]
        return answered

    vectors.change = longer
    leader, follower = await asked(one, vectors, ["a", "b"]), await asked(other, vectors, ["b", "c"])
    vectors.release.set()
    await leader
    assert {len(vector) for vector in told(await follower)} == {4}
    assert vectors.inputs == [["a", "b"], ["c"], ["b", "c"]]


async def test_who_leaves_hands_over_to_the_other(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader, follower = await asked(one, vectors, ["a", "b"]), await waits(other, ["b"])
    leader.cancel()
    await asyncio.gather(leader, return_exceptions=True)
    await eventually(lambda: (vectors.gone, vectors.started) == (1, 2))
    vectors.release.set()
    assert (told(await follower), vectors.inputs) == (of("b"), [["a", "b"], ["b"]])


async def test_who_leaves_while_it_waits_leaves_nothing(two: Pair, vectors: Vectors) -> None:
    one, other = two
    leader, follower = await asked(one, vectors, ["a", "b"]), await waits(other, ["b", "a"])
    follower.cancel()
    await asyncio.gather(follower, return_exceptions=True)
    await other.settled()
    vectors.release.set()
    assert told(await leader) == of("a", "b")
    assert (vectors.started, vectors.gone) == (1, 0)


async def test_who_has_waited_long_enough_asks_itself(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    async with pair(tmp_path, model, cache__join_timeout_s=0.2) as (one, other):
        vectors.held = True
        leader, follower = await asked(one, vectors, ["a"]), await asked(other, vectors, ["a"])
        vectors.release.set()
        assert [told(answer) for answer in await asyncio.gather(leader, follower)] == [of("a")] * 2


# Who does not take part


async def test_batches_that_want_an_answer_of_their_own_do_not_wait(two: Pair, vectors: Vectors) -> None:
    one, other = two
    tasks = [await asked(one, vectors, ["a", "b"])]
    own: list[dict[str, Any]] = [{"headers": {"Cache-Control": d}} for d in ("no-cache", "no-store", "max-age=0")]
    tasks += [await asked(other, vectors, ["a"], **more) for more in [*own, {"cache": {"ttl": 0}}]]
    refused = await embedding(other)(["a"], headers={"Cache-Control": "only-if-cached"}, settle=False)
    assert refused.status == 504
    vectors.release.set()
    answers = await asyncio.gather(*tasks)
    assert [told(answer)[0] for answer in answers] == of("a") * 5
    assert [answer.outcome for answer in answers] == ["MISS", "MISS", "BYPASS", "MISS", "MISS"]


async def test_callers_who_share_nothing_do_not_wait(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    async with pair(tmp_path, model, sharing="per-credential") as (one, other):
        vectors.held = True
        headers = [{"Authorization": f"Bearer {name}"} for name in ("a", "b")]
        tasks = [
            await asked(proxy, vectors, ["x"], headers=own) for proxy, own in zip((one, other), headers, strict=True)
        ]
        vectors.release.set()
        assert {answer.outcome for answer in await asyncio.gather(*tasks)} == {"MISS"}


async def test_what_is_not_stored_holds_nobody_up(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    async with pair(tmp_path, model, sharing="clients", clients=CLIENTS, upstream__api_key=OURS) as (one, other):
        vectors.held = True
        tasks = [await asked(one, vectors, ["a"], headers=by("reader"))]
        tasks.append(await asked(other, vectors, ["a"], headers=by("ann")))
        vectors.release.set()
        assert [told(answer) for answer in await asyncio.gather(*tasks)] == [of("a")] * 2


async def test_a_proxy_that_is_alone_makes_no_file(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as one:
        assert (await embedding(one)(["a"])).outcome == "MISS"
        assert not await asyncio.to_thread((tmp_path / "nearhit.db.leases").exists)


async def test_without_leases_each_asks_itself(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    settings = settings_for(tmp_path, model.url, cache__leases="off")
    vectors.held = True
    async with running_proxy(settings) as one, running_proxy(settings) as other:
        tasks = [await asked(proxy, vectors, ["a"]) for proxy in (one, other)]
        vectors.release.set()
        assert {answer.outcome for answer in await asyncio.gather(*tasks)} == {"MISS"}


# When leases fail


async def test_who_was_overtaken_does_not_store(two: Pair, vectors: Vectors, tmp_path: Path) -> None:
    one, other = two
    overtaken = await asked(one, vectors, ["a", "b"])
    await asyncio.to_thread(overtake, tmp_path / "nearhit.db.leases")
    overtaking = await asked(other, vectors, ["b", "c"])
    vectors.release.set()
    assert [told(answer) for answer in await asyncio.gather(overtaken, overtaking)] == [of("a", "b"), of("b", "c")]
    await settled(two)
    assert [(await proxy.stats())["not_stored"] for proxy in two] == [{"lease-lost": 1}, {}]
    assert [value(proxy, "stored_total") for proxy in two] == [0, 2]


async def test_a_spoilt_file_costs_nobody_an_answer(two: Pair, vectors: Vectors, tmp_path: Path) -> None:
    vectors.held = False
    await embedding(two[0])(["before"])
    await asyncio.to_thread((tmp_path / "nearhit.db.leases").write_bytes, b"nobody's database, though of some length")
    tasks = [begun(proxy, [f"{number}", "same"]) for number in range(4) for proxy in two]
    assert [told(answer) for answer in await asyncio.gather(*tasks)] == [
        of(f"{number}", "same") for number in range(4) for _ in two
    ]


async def test_a_store_that_fails_costs_nobody_an_answer(
    two: Pair, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    leader, follower = await asked(one, vectors, ["a", "b"]), await waits(other, ["b", "a"])

    async def fails(*arguments: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(other.services.buffer, "get_anew", fails)
    vectors.release.set()
    assert [told(answer) for answer in await asyncio.gather(leader, follower)] == [of("a", "b"), of("b", "a")]


# In processes of their own


async def embed_at(nearhit: Nearhit, session: aiohttp.ClientSession, given: list[str]) -> tuple[str, list[Any]]:
    async with session.post(nearhit.url + PATH, json={"input": given, "model": "tiny"}) as response:
        assert response.status == 200
        return response.headers["X-Cache"], [one["embedding"] for one in (await response.json())["data"]]


async def test_two_processes_ask_for_each_input_once(tmp_path: Path, model: FakeModel, vectors: Vectors) -> None:
    vectors.held = True
    wanted = [[f"text {number % 7}", f"text {number % 5}"] for number in range(20)]
    async with two_processes(tmp_path, model) as two, aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(embed_at(each, session, given)) for given in wanted for each in two]
        await eventually(lambda: sum(map(len, vectors.inputs)) >= 7)
        vectors.release.set()
        answers = await asyncio.gather(*tasks)
    assert [told for _, told in answers] == [of(*given) for given in wanted for _ in range(2)]
    once = [text for given in vectors.inputs for text in given]
    assert sorted(once) == [f"text {number}" for number in range(7)]


async def test_when_the_one_that_asks_is_killed_the_other_asks(
    tmp_path: Path, model: FakeModel, vectors: Vectors
) -> None:
    vectors.held = True
    async with two_processes(tmp_path, model) as (one, other), aiohttp.ClientSession() as session:
        leader = asyncio.create_task(embed_at(one, session, ["a", "b"]))
        await eventually(lambda: vectors.started == 1)
        followers = [asyncio.create_task(embed_at(other, session, ["b", "a", "c"])) for _ in range(5)]
        await eventually(lambda: vectors.started == 2)
        assert vectors.inputs == [["a", "b"], ["c"]]
        await one.stop(signal.SIGKILL)
        await asyncio.gather(leader, return_exceptions=True)
        await eventually(lambda: vectors.started == 3)
        assert sorted(vectors.inputs[2]) == ["a", "b"]
        vectors.release.set()
        assert [told for _, told in await asyncio.gather(*followers)] == [of("b", "a", "c")] * 5
    assert vectors.started == 3
