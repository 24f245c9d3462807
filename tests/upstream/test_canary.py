"""Readings of one model are taken for one model, and those of another are not."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from proxy.upstream import canary
from proxy.upstream.adapter import Loading, Locked, Probe, Silent, Unidentified, Unreachable
from proxy.upstream.canary import (
    MAX_IDENTITIES,
    MAX_VECTORS,
    TOLERANCE,
    Heard,
    Known,
    Recognised,
    Recogniser,
    Refused,
    Vector,
    alike,
    ask_llamacpp,
    known_from,
    vector_in,
)
from proxy.upstream.client import Upstream, client_session
from tests.fake_model import FakeModel, completion_body, fake_model

A = Vector(((99, -1.85), (286, -2.73), (471, -3.11), (30, -3.61), (301, -3.67), (92, -3.68), (569, -3.71), (7, -3.9)))
B = Vector(tuple((token, logprob - 0.1) for token, logprob in A.logprobs))
STATIC = b"s" * 32

logprobs = st.floats(-30, 0)
vocabularies = st.dictionaries(st.integers(0, 50_000), logprobs, min_size=8, max_size=40)
vectors = st.dictionaries(st.integers(0, 50_000), logprobs, min_size=1, max_size=8).map(
    lambda found: Vector(tuple(found.items()))
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def off_by(vector: Vector, *differences: float) -> Vector:
    """The first logprobs changed by these."""
    padded = [*differences, *[0.0] * (len(vector.logprobs) - len(differences))]
    return Vector(tuple((token, value + by) for (token, value), by in zip(vector.logprobs, padded, strict=True)))


def top(vocabulary: dict[int, float]) -> Vector:
    return Vector(tuple(sorted(vocabulary.items(), key=lambda item: -item[1])[:8]))


@settings(deadline=None)
@given(vocabularies, st.data())
def test_whatever_noise_within_the_tolerance_does_to_the_list_it_is_the_same_model(
    vocabulary: dict[int, float], data: st.DataObject
) -> None:
    noise = st.floats(-0.99 * TOLERANCE, 0.99 * TOLERANCE)
    first, second = top(vocabulary), top({token: value + data.draw(noise) for token, value in vocabulary.items()})
    assume(2 * len(dict(first.logprobs).keys() & dict(second.logprobs).keys()) >= 8)
    assert alike(first, second)


@settings(deadline=None)
@given(vectors, vectors)
def test_being_alike_is_mutual(one: Vector, other: Vector) -> None:
    assert alike(one, one)
    assert alike(one, other) == alike(other, one)


@settings(deadline=None)
@given(vocabularies, st.integers(0, 7), st.floats(1.01 * TOLERANCE, 5), st.booleans())
def test_one_token_that_is_off_by_more_is_another_model(
    vocabulary: dict[int, float], at: int, by: float, likelier: bool
) -> None:
    one = top(vocabulary)
    token = one.logprobs[at][0]
    other = Vector(tuple((t, value + (by if likelier else -by) * (t == token)) for t, value in one.logprobs))
    assert not alike(one, other)


def test_near_ties_at_the_end_of_the_list_may_change_places() -> None:
    another_last = Vector((*A.logprobs[:-1], (8, -3.895)))
    assert alike(A, another_last)
    assert alike(A, Vector((*A.logprobs[:4], *reversed(A.logprobs[4:]))))


def test_a_likely_token_that_the_other_does_not_list_is_another_model() -> None:
    without_the_first = Vector((*A.logprobs[1:], (8, -3.9)))
    assert not alike(A, without_the_first)
    assert not alike(A, Vector((*A.logprobs[:-1], (8, -3.85))))


def test_flat_lists_of_different_tokens_tell_nothing_and_are_not_alike() -> None:
    one, other = (Vector(tuple((start + i, -10.8) for i in range(8))) for start in (0, 5))
    assert not alike(one, other)


def test_a_model_that_comes_back_is_the_one_it_was() -> None:
    known = Known().used(STATIC, A).used(STATIC, B)
    assert known.match(STATIC, off_by(A, 0.01)) == A
    assert known.match(STATIC, off_by(B, 0.01)) == B
    assert known.match(b"another", A) is None


def test_between_two_that_are_close_the_one_used_last_is_kept_and_else_the_nearest() -> None:
    close, third = off_by(A, 0.03), off_by(A, 1.0)
    between = off_by(A, 0.018)
    assert known_match(between, close, A) == A
    assert known_match(between, A, close) == close
    assert known_match(between, A, close, third) == close
    assert known_match(off_by(A, 0.012), close, A, third) == A


def known_match(reading: Vector, *used: Vector) -> Vector | None:
    known = Known()
    for vector in used:
        known = known.used(STATIC, vector)
    return known.match(STATIC, reading)


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.binary(max_size=32), st.lists(vectors, min_size=1), max_size=12))
def test_what_is_kept_is_read_again_and_bounded(used: dict[bytes, list[Vector]]) -> None:
    known = Known()
    for static, mine in used.items():
        for vector in mine:
            known = known.used(static, vector)
    assert known_from(known.text()) == known
    assert len(known.vectors) <= MAX_IDENTITIES
    assert all(0 < len(mine) <= MAX_VECTORS for mine in known.vectors.values())
    for static in list(used)[-MAX_IDENTITIES:]:
        assert known.of(static)[-1] == used[static][-1]


@settings(deadline=None, max_examples=30)
@given(anything)
def test_what_is_no_vector_is_none(told: Any) -> None:
    assert known_from(json.dumps(told)) == Known()
    assert vector_in(told) is None
    assert vector_in({"completion_probabilities": [{"top_logprobs": told}]}) is None


@pytest.mark.parametrize(
    "text", [None, "", "{", '{"known": [["zz", []]]}', '{"known": [["00", [[[1, "x"]]]]]}', "[" * 9999]
)
def test_a_damaged_text_is_of_nothing_known(text: str | None) -> None:
    assert known_from(text) == Known()


@pytest.mark.parametrize("logprob", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_logprob_that_is_no_number_makes_no_vector(logprob: str) -> None:
    answer = '{"completion_probabilities": [{"top_logprobs": [{"id": 1, "logprob": %s}]}]}'
    assert vector_in(json.loads(answer % logprob)) is None


class Notebook:
    """A place for vectors that outlives those who write there."""

    def __init__(self, text: str | None = None) -> None:
        self.text = text
        self.writes = 0

    async def load(self) -> str | None:
        return self.text

    async def keep(self, text: str) -> None:
        self.text = text
        self.writes += 1


class Asked:
    """A server that gives these answers, the last of them for ever, and how it was asked."""

    def __init__(
        self, *answers: Heard, notebook: Notebook | None = None, idle: Callable[[], bool] = lambda: True
    ) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.doubts = 0
        self._recogniser = Recogniser(notebook, idle)

    async def _ask(self, _probe: Probe) -> Heard:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _doubt(self) -> None:
        self.doubts += 1

    async def find(self, *answers: Heard) -> Any:
        self.answers = list(answers) or self.answers
        self.asked = self.doubts = 0
        async with unused_probe() as probe:
            return await self._recogniser.recognise(self._ask, probe, STATIC, self._doubt)


@asynccontextmanager
async def unused_probe() -> AsyncIterator[Probe]:
    async with client_session(connect_timeout_s=1, read_timeout_s=1) as session:
        yield Probe(Upstream("http://127.0.0.1:9", session, lambda: None), {}, 1)


async def test_the_first_answer_is_what_later_ones_are_compared_with() -> None:
    server = Asked(A)
    first = await server.find()
    assert (server.asked, server.doubts) == (1, 0)
    assert first == await server.find(off_by(A, 0.019, -0.019))
    assert first == await server.find(A)
    assert (server.asked, server.doubts) == (1, 0)


async def test_an_answer_that_differs_is_believed_when_it_comes_three_times() -> None:
    server = Asked(A)
    first = await server.find()
    assert await server.find(B, A) == first
    assert (server.asked, server.doubts) == (2, 1)
    second = await server.find(B)
    assert (server.asked, server.doubts) == (3, 2)
    assert isinstance(second, Recognised)
    assert second != first
    assert await server.find(A) == first
    assert server.asked == 1


async def test_answers_that_differ_each_time_tell_nothing() -> None:
    server = Asked(A)
    await server.find()
    found = await server.find(B, off_by(B, 0.5), off_by(B, 0.9))
    assert isinstance(found, Unidentified)
    assert "canary_s" in found.why


async def test_what_was_learned_outlives_the_process() -> None:
    notebook = Notebook()
    first = await Asked(A, notebook=notebook).find()
    assert await Asked(off_by(A, 0.015), notebook=notebook).find() == first
    assert notebook.writes == 1
    second = await Asked(B, notebook=notebook).find()
    assert await Asked(off_by(A, 0.015), notebook=notebook).find() == first
    assert await Asked(off_by(B, 0.015), notebook=notebook).find() == second


async def test_what_another_process_learned_meanwhile_is_known_too() -> None:
    notebook = Notebook()
    mine = Asked(A, notebook=notebook)
    await mine.find()
    other = await Asked(B, notebook=notebook).find()
    assert await mine.find(off_by(B, 0.015)) == other
    assert mine.asked == 1


async def test_a_server_that_computes_alike_is_recognised_though_everything_was_forgotten() -> None:
    assert await Asked(A).find() == await Asked(A, notebook=Notebook("damaged")).find()


async def test_one_that_cannot_be_asked_is_what_it_shows_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Asked(Refused("HTTP 501"))
    assert await server.find() == Recognised(STATIC)
    assert await server.find() == Recognised(STATIC)
    assert server.asked == 1
    assert [record.message for record in caplog.records] == [
        "the upstream tells no logprobs (HTTP 501): a model swapped under its name goes unnoticed"
    ]


async def test_one_that_could_be_asked_before_is_asked_again_before_it_counts_as_unable() -> None:
    server = Asked(A)
    first = await server.find()
    assert await server.find(Refused("HTTP 404"), A) == first
    assert await server.find(Refused("HTTP 404")) == Recognised(STATIC)
    assert server.asked == 3
    assert isinstance(await server.find(Refused("HTTP 404"), B, B), Unidentified)
    assert isinstance(await server.find(B, B, Refused("HTTP 404")), Unidentified)


@pytest.mark.parametrize("passing", [Unidentified("HTTP 500"), Silent(), Loading(), Unreachable(), Locked()])
async def test_a_passing_trouble_is_not_an_answer(passing: Heard) -> None:
    server = Asked(A)
    first = await server.find()
    assert await server.find(passing) == passing
    assert server.asked == 1
    assert await server.find(A) == first


async def test_it_is_asked_again_only_once_it_is_idle() -> None:
    busy = iter([True, True, False, False])
    moments: list[int] = []

    def idle() -> bool:
        moments.append(server.asked)
        return not next(busy)

    server = Asked(A, idle=idle)
    await server.find()
    await server.find(B)
    assert server.asked == 3
    assert moments == [1, 1, 1, 2]


async def test_one_that_is_never_idle_is_asked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "PATIENCE_S", 0.2)
    server = Asked(A, idle=lambda: False)
    first = await server.find()
    assert await server.find(B) != first


@asynccontextmanager
async def probing(model: FakeModel) -> AsyncIterator[Probe]:
    async with client_session(connect_timeout_s=1, read_timeout_s=1) as session:
        yield Probe(Upstream(model.url, session, lambda: None), {}, 1)


async def test_the_question_is_one_token_after_fixed_ones_and_leaves_nothing(model: FakeModel) -> None:
    model.vector = list(A.logprobs)
    async with probing(model) as probe:
        assert await ask_llamacpp(probe) == A
    (asked,) = (seen.json for seen in model.seen)
    assert len(asked["prompt"]) == 16
    expected = {"n_predict": 1, "temperature": 0, "n_probs": 8, "cache_prompt": False}
    assert {name: asked[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, Refused("HTTP 400")),
        (401, Locked()),
        (403, Refused("HTTP 403")),
        (404, Refused("HTTP 404")),
        (501, Refused("HTTP 501")),
        (503, Loading()),
    ],
)
async def test_what_a_status_says(model: FakeModel, status: int, expected: Heard) -> None:
    model.vector, model.completion_status = [(1, -1.0)], status
    async with probing(model) as probe:
        assert await ask_llamacpp(probe) == expected


@pytest.mark.parametrize("status", [408, 429, 500, 502, 504])
async def test_a_passing_status_says_nothing(model: FakeModel, status: int) -> None:
    model.vector, model.completion_status = [(1, -1.0)], status
    async with probing(model) as probe:
        found = await ask_llamacpp(probe)
    assert isinstance(found, Unidentified)
    assert f"HTTP {status}" in found.why


async def test_an_answer_without_logprobs_is_a_refusal(model: FakeModel) -> None:
    from aiohttp import web

    async def bare(_request: web.Request) -> web.StreamResponse:
        return web.json_response({**completion_body(A.logprobs), "completion_probabilities": []})

    model.extra = bare
    async with probing(model) as probe:
        assert await ask_llamacpp(probe) == Refused("its answer holds no logprobs")


async def test_no_answer_in_time_is_silence(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp import web

    async def never(_request: web.Request) -> web.StreamResponse | None:
        await model.release.wait()
        return None

    monkeypatch.setattr(canary, "LIMIT_S", 0.05)
    model.extra = never
    async with probing(model) as probe:
        assert await ask_llamacpp(probe) == Silent()
    model.release.set()


async def test_no_connection_is_unreachable() -> None:
    async with fake_model() as model:
        pass
    async with probing(model) as probe:
        assert await ask_llamacpp(probe) == Unreachable()
