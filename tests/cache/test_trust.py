"""What is kept of the answers of servers that do not tell the truth, and what becomes of calls that nobody waits for.

The cache with a real store, the real near tier and a real server behind it; only the way to the server is this file's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from proxy.cache import directives, volatile
from proxy.cache.answers import Answers
from proxy.cache.asking import Asking, Fetching, NearTerms, Refused, Replay, Terms
from proxy.cache.dialects import CHAT, COMPLETIONS
from proxy.cache.dialects.call import Call, read_call
from proxy.cache.dialects.dialect import Dialect
from proxy.cache.flight import Flight, Interrupted
from proxy.cache.hot import HotTier
from proxy.cache.near import matcher
from proxy.cache.near.tier import NearTier
from proxy.cache.policy import Bypass, Lifetimes
from proxy.cache.ports import Incoming
from proxy.cache.served import Served
from proxy.cache.trust import ORDINARY, UNTRACKED, Ending, Trust
from proxy.upstream.client import Outgoing, Upstream, client_session
from proxy.web.metrics import Metrics
from storage.sqlite import open_sqlite
from storage.write_behind import write_behind
from tests.conftest import eventually
from tests.fake_model import FakeModel, Respond, chat_body, chat_events, error, held, raw, reply, sse, streamed

ASKED = "How do I reset the router in the living room?"
ALIKE = "hey, how can I reset the router in the living room? thanks!"
WORDS = Trust(tells_length=False, unit="words", default_limit=512)
TOKENS = Trust(tells_length=False, unit="tokens", default_limit=512)
NOW_MS = 1_800_000_000_000


@dataclass(frozen=True)
class Known:
    """A model that is what it was."""

    fingerprint: bytes = b"f"
    epoch: int = 1
    trusted: bool = True
    confirmed: bool = True
    away: bool = False
    looked: bool = True


@dataclass
class Identities:
    """Says so at once, or once it is let."""

    current: Known = field(default_factory=Known)
    free: asyncio.Event = field(default_factory=asyncio.Event)

    async def confirm(self) -> Known:
        await self.free.wait()
        return self.current


@dataclass
class Lane:
    """One call at a time, and what the port's documentation says of the tail of each."""

    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    leaks: bool = False
    came: int = 0
    endings: list[tuple[Ending, bool]] = field(default_factory=list)
    """Each with whether the lane was still held."""


class Ride:
    """A call that waits for the lane."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.sent = False
        self.departed = 0.0
        self.tainted = False

    def wanted(self, *, wanted: bool) -> None:
        """See `Sending`."""

    def ended(self, ending: Ending) -> None:
        self.lane.endings.append((ending, self.lane.turn.locked()))
        if ending is Ending.WHOLE:
            self.lane.leaks = False

    def begin(self) -> None:
        self.sent, self.tainted, self.lane.leaks = True, self.lane.leaks, True


@dataclass
class World:
    """The cache in front of a model server. `outcome` is what a client would see in `X-Cache`."""

    answers: Answers
    upstream: Upstream
    metrics: Metrics
    identities: Identities
    lane: Lane

    async def ask(self, words: str = ASKED, *, trust: Trust = ORDINARY, **options: Any) -> tuple[str, dict[str, Any]]:
        """Ask and read to the end: outcome and the answer as it is kept."""
        dialect, call, asking = self.prepared(words, trust=trust, **options)
        recalled = self.answers.recall(call, directives.NONE, b"", self.identities.current, trust)
        reply = recalled or await self.answers.respond(dialect, call, asking)
        if isinstance(reply, Replay):
            return "HIT" if reply.near is None else "NEAR", json.loads(reply.ready.entry.answer)
        if isinstance(reply, Bypass):
            return f"BYPASS {reply}", {}
        assert not isinstance(reply, Refused)
        await self.follow(reply)
        await self.settled()
        return f"MISS {reply.miss}", {}

    async def depart(self, words: str = ASKED, **options: Any) -> Flight:
        """Ask, and leave it at that."""
        dialect, call, asking = self.prepared(words, **options)
        reply = await self.answers.respond(dialect, call, asking)
        assert isinstance(reply, Fetching)
        return reply.flight

    async def follow(self, reply: Fetching) -> bytes:
        with reply.flight.reader() as reader:
            return b"".join([chunk async for chunk in reader.chunks()])

    async def settled(self) -> None:
        await eventually(lambda: not self.answers.in_flight)

    def not_stored(self) -> dict[str, int]:
        told: dict[str, int] = self.metrics.summary()["not_stored"]
        return told

    def prepared(
        self,
        words: str,
        *,
        trust: Trust = ORDINARY,
        drain: bool = False,
        queued: bool = False,
        dialect: Dialect = CHAT,
        messages: list[dict[str, Any]] | None = None,
        **fields: Any,
    ) -> tuple[Dialect, Call, Asking]:
        asked = {"prompt": words} if dialect is COMPLETIONS else {"messages": messages or [_said("user", words)]}
        body = json.dumps({"temperature": 0, **asked, **fields}).encode()
        call = read_call(dialect, "", {}, body)
        assert isinstance(call, Call)
        ride = Ride(self.lane) if queued else None
        asking = Asking(
            directives=directives.NONE,
            near=NearTerms(0.85, shadow=False),
            ttl_ms=None,
            namespace=b"",
            may_read=True,
            may_lead=True,
            may_store=True,
            repeat=body,
            identities=self.identities,
            fetch=lambda: self.fetch(dialect, body, ride),
            usage_from_timings=False,
            drain=drain,
            trust=trust,
            sending=ride or UNTRACKED,
        )
        return dialect, call, asking

    @asynccontextmanager
    async def fetch(self, dialect: Dialect, body: bytes, ride: Ride | None) -> AsyncIterator[Incoming]:
        outgoing = Outgoing("POST", dialect.paths[0], {"Content-Type": "application/json"}, body)
        async with AsyncExitStack() as stack:
            if ride is not None:
                ride.lane.came += 1
                await stack.enter_async_context(ride.lane.turn)
                ride.begin()
            yield await stack.enter_async_context(self.upstream.send(outgoing))


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.fixture
async def world(tmp_path: Path, model: FakeModel) -> AsyncIterator[World]:
    async with _world(tmp_path, model) as made:
        yield made


@asynccontextmanager
async def _world(tmp_path: Path, model: FakeModel, **changes: Any) -> AsyncIterator[World]:
    terms = Terms(
        lifetimes=Lifetimes(ttl_ms=3_600_000, volatile_ttl_ms=0, max_ttl_ms=3_600_000),
        sampled_bypass=False,
        retry_window_ms=0,
        max_answer_bytes=1 << 20,
        lookup_timeout_s=5.0,
    )
    metrics = Metrics()
    await asyncio.to_thread(volatile.load)
    async with (
        open_sqlite(tmp_path / "cache.db") as store,
        write_behind(store, metrics.storage_failed, flush_s=0.01, max_pending_bytes=1 << 20) as buffer,
        client_session(connect_timeout_s=5.0, read_timeout_s=0) as session,
    ):
        terms = replace(terms, **changes)
        answers = Answers(model.url, buffer, HotTier(1 << 20), terms, metrics, lambda: NOW_MS, Served())
        answers.near = NearTier(buffer, await asyncio.to_thread(matcher.load))
        identities = Identities()
        identities.free.set()
        made = World(answers, Upstream(model.url, session, lambda: None), metrics, identities, Lane())
        try:
            yield made
        finally:
            await answers.close()


def counting(count: int, text: str = "Hold the button.", finish: str = "stop") -> Respond:
    """Answer whole or as a stream, with usage."""
    usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": count + 3}
    return raw(json.dumps(chat_body(text, usage=usage, finish_reason=finish)).encode())


@pytest.mark.parametrize(
    ("trust", "count", "fields", "other_words"),
    [
        (ORDINARY, 512, {}, "NEAR"),
        (TOKENS, 511, {}, "NEAR"),
        (TOKENS, 512, {}, "MISS absent"),
        (TOKENS, 512, {"max_tokens": 0}, "MISS absent"),
        (TOKENS, 512, {"max_tokens": -1}, "MISS absent"),
        (TOKENS, 9, {"max_tokens": 10}, "NEAR"),
        # Cut where the call says: whoever says the same gets the same.
        (TOKENS, 10, {"max_tokens": 10}, "NEAR"),
        # Beyond what the call says: the server has not read it, and where it was cut nobody knows.
        (TOKENS, 11, {"max_tokens": 10}, "MISS absent"),
        (TOKENS, 512, {"max_completion_tokens": 2000}, "MISS absent"),
        (TOKENS, 10, {"max_completion_tokens": 10}, "MISS absent"),
        (WORDS, 255, {}, "NEAR"),
        (WORDS, 256, {}, "MISS absent"),
        (WORDS, 5, {"max_tokens": 10}, "NEAR"),
    ],
)
async def test_an_answer_that_was_cut_answers_no_other_words_whatever_it_says(
    world: World, model: FakeModel, trust: Trust, count: int, fields: dict[str, Any], other_words: str
) -> None:
    model.respond = counting(count)
    assert (await world.ask(trust=trust, **fields))[0] == "MISS absent"
    outcome, body = await world.ask(trust=trust, **fields)
    assert (outcome, body["choices"][0]["finish_reason"]) == ("HIT", "stop")
    assert body["usage"]["completion_tokens"] == count
    assert (await world.ask(ALIKE, trust=trust, **fields))[0] == other_words


@pytest.mark.parametrize(("pieces", "other_words"), [(511, "NEAR"), (512, "MISS absent")])
async def test_of_a_stream_its_pieces_count(world: World, model: FakeModel, pieces: int, other_words: str) -> None:
    model.respond = reply(*["ab "] * pieces)
    assert (await world.ask(trust=WORDS, stream=True))[0] == "MISS absent"
    assert (await world.ask(trust=WORDS, stream=True))[0] == "HIT"
    assert (await world.ask(ALIKE, trust=WORDS, stream=True))[0] == other_words


@pytest.mark.parametrize(("fields", "other_words"), [({}, "MISS absent"), ({"max_tokens": 10}, "NEAR")])
async def test_a_server_that_tells_a_length_now_and_then_is_believed(
    world: World, model: FakeModel, fields: dict[str, Any], other_words: str
) -> None:
    model.respond = counting(3, finish="length")
    await world.ask(trust=TOKENS, **fields)
    assert (await world.ask(ALIKE, trust=TOKENS, **fields))[0] == other_words


async def test_a_server_without_sampling_answers_anew_when_asked_again(tmp_path: Path, model: FakeModel) -> None:
    async with _world(tmp_path, model, retry_window_ms=60_000) as world:
        chancy = Trust(honours_sampling=False)
        assert (await world.ask(trust=chancy))[0] == "MISS absent"
        assert (await world.ask(trust=chancy))[0] == "MISS retry"
        assert (await world.ask(trust=ORDINARY))[0] == "HIT"


async def test_where_sampled_calls_pass_by_all_calls_to_such_a_server_do(tmp_path: Path, model: FakeModel) -> None:
    async with _world(tmp_path, model, sampled_bypass=True) as world:
        assert (await world.ask(trust=ORDINARY))[0] == "MISS absent"
        assert (await world.ask(trust=Trust(honours_sampling=False)))[0] == "BYPASS sampled"


async def test_a_server_of_answers_that_depend_on_others_is_not_cached(world: World) -> None:
    assert (await world.ask(trust=ORDINARY))[0] == "MISS absent"
    assert (await world.ask(trust=Trust(cached=False)))[0] == "BYPASS not-cached-here"
    assert (await world.ask(trust=Trust(cached=False), dialect=COMPLETIONS))[0] == "BYPASS not-cached-here"


LATER: list[list[dict[str, Any]]] = [
    [_said("user", "hi"), _said("assistant", "Hello."), _said("user", ASKED)],
    [_said("system", "Be brief."), _said("assistant", "Hello."), _said("user", ASKED)],
    [_said("user", ASKED), {"role": "assistant", "content": None, "tool_calls": []}, _said("tool", "12")],
    [_said("user", ASKED), _said("assistant", "Hold")],
]
FIRST: list[list[dict[str, Any]]] = [
    [_said("user", ASKED)],
    [_said("system", "Be brief."), _said("user", "Context."), _said("user", ASKED)],
    [_said("developer", "You are the assistant."), _said("user", ASKED)],
]


@pytest.mark.parametrize("messages", LATER)
async def test_later_turns_are_not_cached_where_the_server_may_not_show_them_to_the_model(
    world: World, messages: list[dict[str, Any]]
) -> None:
    forgetful = Trust(multi_turn=False)
    assert (await world.ask(messages=messages))[0] == "MISS absent"
    assert (await world.ask(messages=messages, trust=forgetful))[0] == "BYPASS multi-turn"
    assert (await world.ask(messages=messages))[0] == "HIT"


@pytest.mark.parametrize("messages", FIRST)
async def test_first_turns_are(world: World, messages: list[dict[str, Any]]) -> None:
    forgetful = Trust(multi_turn=False)
    assert (await world.ask(messages=messages, trust=forgetful))[0] == "MISS absent"
    assert (await world.ask(messages=messages, trust=forgetful))[0] == "HIT"


async def test_raw_prompts_have_no_turns(world: World, model: FakeModel) -> None:
    choice = {"text": "Hold the button.", "index": 0, "finish_reason": "stop"}
    model.respond = raw(json.dumps({"object": "text_completion", "choices": [choice]}).encode())
    prompt = "User: hi\nAssistant: Hello.\nUser: bye\nAssistant:"
    for outcome in ("MISS absent", "HIT"):
        assert (await world.ask(prompt, trust=Trust(multi_turn=False), dialect=COMPLETIONS))[0] == outcome


@pytest.mark.parametrize(
    ("respond", "fields", "ending", "next_is_kept"),
    [
        (counting(9), {"max_tokens": 10}, Ending.WHOLE, True),
        (counting(10), {"max_tokens": 10}, Ending.CUT, False),
        (counting(3, finish="length"), {}, Ending.CUT, False),
        (reply("a"), {"stream": True}, Ending.WHOLE, True),
        (reply("a", "b"), {"stream": True, "max_tokens": 2}, Ending.CUT, False),
        (streamed(sse(*chat_events("a"), done=False)), {"stream": True}, Ending.UNKNOWN, False),
        (streamed(sse(*chat_events("a"), done=False), hang_up=True), {"stream": True}, Ending.UNKNOWN, False),
        (counting(9, text=""), {}, Ending.UNKNOWN, False),
        (raw(error(500, "no", "server_error").body, status=500), {}, Ending.UNKNOWN, False),  # type: ignore[arg-type]
    ],
)
async def test_what_comes_after_an_answer_that_was_cut_is_not_kept(
    world: World, model: FakeModel, respond: Respond, fields: dict[str, Any], ending: Ending, next_is_kept: bool
) -> None:
    model.respond = respond
    dialect, call, asking = world.prepared("first", trust=TOKENS, queued=True, **fields)
    reply_ = await world.answers.respond(dialect, call, asking)
    assert isinstance(reply_, Fetching)
    await asyncio.gather(world.follow(reply_), return_exceptions=True)
    await world.settled()
    # Before another call could have its turn.
    assert world.lane.endings == [(ending, True)]
    model.respond = counting(3)
    tainted = {**world.not_stored(), **({} if next_is_kept else {"tainted": 1})}
    assert (await world.ask("second", trust=TOKENS, queued=True))[0] == "MISS absent"
    assert world.not_stored() == tainted
    assert (await world.ask("second", trust=TOKENS))[0] == ("HIT" if next_is_kept else "MISS absent")
    # The one in between was whole.
    assert (await world.ask("third", trust=TOKENS, queued=True))[0] == "MISS absent"
    assert (await world.ask("third", trust=TOKENS, queued=True))[0] == "HIT"


async def test_an_answer_given_up_ends_unknown_while_its_turn_lasts(world: World, model: FakeModel) -> None:
    model.respond = streamed(sse(*chat_events("a")[:2], done=False), sse(), hold_after=1)
    flight = await world.depart(stream=True, queued=True)
    with flight.reader():
        await flight.head()
    await world.settled()
    assert world.lane.endings == [(Ending.UNKNOWN, True)]
    await eventually(lambda: model.gone == 1)


async def test_an_answer_left_at_its_end_mark_ends_whole(
    world: World, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.cache import flight as flights

    monkeypatch.setattr(flights, "TAIL_S", 0.01)
    model.respond = streamed(sse(*chat_events("a")), b"", hold_after=1)
    flight = await world.depart(stream=True, queued=True)
    with flight.reader() as reader:
        async for chunk in reader.chunks():
            if b"[DONE]" in chunk:
                break
    await world.settled()
    assert world.lane.endings == [(Ending.WHOLE, True)]
    assert (await world.ask(stream=True))[0] == "HIT"


async def test_keeping_an_answer_takes_as_long_as_it_takes_though_its_reader_hung_up(
    world: World, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy.cache import flight as flights

    monkeypatch.setattr(flights, "TAIL_S", 0.2)
    world.identities.free.clear()
    model.respond = streamed(sse(*chat_events("a")), b"", hold_after=1)
    flight = await world.depart(stream=True)
    with flight.reader() as reader:
        async for chunk in reader.chunks():
            if b"[DONE]" in chunk:
                break
    # Set later, so due later than what ends a body that nobody reads.
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(flights.TAIL_S, passed.set)
    model.release.set()
    await passed.wait()
    await asyncio.sleep(0)
    world.identities.free.set()
    await world.settled()
    assert (world.not_stored(), (await world.ask(stream=True))[0]) == ({}, "HIT")


async def test_no_ending_is_told_of_what_never_began(world: World, model: FakeModel) -> None:
    async def hang_up(model: FakeModel, request: Any, asked: Any) -> Any:
        request.transport.abort()
        raise ConnectionResetError

    model.respond = hang_up
    flight = await world.depart(queued=True)
    with flight.reader(), pytest.raises(Exception, match=r"."):
        await flight.head()
    await world.settled()
    assert world.lane.endings == []
    # Whatever the server had begun with may still come.
    model.respond = counting(3)
    await world.ask(queued=True)
    assert world.not_stored() == {"upstream-gone": 1, "tainted": 1}


@pytest.mark.parametrize("drain", [False, True])
async def test_a_call_that_nobody_waits_for_any_more_does_not_get_its_turn(
    world: World, model: FakeModel, drain: bool
) -> None:
    model.respond = held(counting(3))
    first = asyncio.create_task(world.ask("first", queued=True, drain=drain))
    await eventually(lambda: model.started == 1)
    second = await world.depart("second", queued=True, drain=drain)
    with second.reader():
        await eventually(lambda: world.lane.came == 2)
    assert not second.joinable
    with pytest.raises(Interrupted):
        await second.head()
    model.release.set()
    assert (await first)[0] == "MISS absent"
    await world.settled()
    assert len(model.generations) == 1
    assert world.not_stored() == {"client-gone": 1}
    # Nobody fetched anything for it: it counts for no time upstream.
    assert world.metrics.value("nearhit_upstream_seconds_count") == 1
    assert (await world.ask("second", queued=True))[0] == "MISS absent"


async def test_a_queued_call_stays_for_those_who_still_wait(world: World, model: FakeModel) -> None:
    model.respond = held(counting(3))
    first = asyncio.create_task(world.ask("first", queued=True, drain=True))
    await eventually(lambda: model.started == 1)
    second = await world.depart("second", queued=True, drain=True)
    with second.reader() as stays:
        with second.reader():
            await eventually(lambda: world.lane.came == 2)
        model.release.set()
        assert b"Hold the button." in b"".join([chunk async for chunk in stays.chunks()])
    await first
    await world.settled()
    assert len(model.generations) == 2


async def test_a_call_that_was_sent_is_drained_and_kept(world: World, model: FakeModel) -> None:
    model.respond = held(counting(3))
    flight = await world.depart(queued=True, drain=True)
    with flight.reader():
        await eventually(lambda: model.started == 1)
    assert flight.joinable
    model.release.set()
    await world.settled()
    assert (model.finished, model.gone, world.lane.endings) == (1, 0, [(Ending.WHOLE, True)])
    assert (await world.ask())[0] == "HIT"


@pytest.mark.parametrize("sent", [False, True])
async def test_what_is_only_relayed_is_drained_likewise(world: World, model: FakeModel, sent: bool) -> None:
    model.respond = held(counting(3))
    ride = Ride(world.lane)
    if not sent:
        await world.lane.turn.acquire()
    flight = world.answers.relay(lambda: world.fetch(CHAT, b'{"messages": []}', ride), drain=True, sending=ride)
    with flight.reader():
        await eventually(lambda: (world.lane.came, model.started) == (1, sent))
    model.release.set()
    if not sent:
        world.lane.turn.release()
    await world.settled()
    assert (model.started, model.finished, model.gone) == ((1, 1, 0) if sent else (0, 0, 0))
    assert world.lane.endings == ([(Ending.UNKNOWN, True)] if sent else [])
