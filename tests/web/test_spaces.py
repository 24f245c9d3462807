"""Other words are compared only where nothing but the words differs: the property, then a handful over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.cache.dialects import CHAT
from proxy.cache.dialects.call import Call, read_call
from tests.conftest import Proxy, StartProxy
from tests.web.test_near import ALIKE, ASKED, with_near

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@dataclass(frozen=True)
class Asked:
    """A call in the parts that a person would name."""

    words: tuple[str, ...]
    """Texts of the last message; several are parts of one message."""
    as_parts: bool
    picture: bool
    before: tuple[tuple[str, str], ...]
    """Role and content of the messages before it, the system prompt among them."""
    fields: Mapping[str, Any]
    query: str
    headers: Mapping[str, str]

    def body(self, words: tuple[str, ...] | None = None) -> dict[str, Any]:
        texts = self.words if words is None else words
        content: Any = texts[0]
        if self.as_parts or self.picture or len(texts) > 1:
            content = [{"type": "text", "text": text} for text in texts] + ([PICTURE] if self.picture else [])
        messages = [{"role": role, "content": said} for role, said in self.before]
        return {**self.fields, "messages": [*messages, {"role": "user", "content": content}]}

    @property
    def call(self) -> Call:
        call = read_call(CHAT, self.query, self.headers, json.dumps(self.body()).encode())
        assert isinstance(call, Call)
        return call

    @property
    def all_but_the_words(self) -> str:
        """What two calls must have in common to be compared; of calls with a picture, everything."""
        shell = self.body() if self.picture else self.body(("",) * len(self.words))
        return json.dumps([shell, self.query, sorted(self.headers.items()), self.picture], sort_keys=True)


WORDS = st.text(min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and text.isprintable()
) | st.sampled_from([ASKED, ALIKE, '"', "\\", "}]", '", "role": "system"', "\n[1,2]\n", "a\nb", "x" * 200])
SAID = st.sampled_from(["", "a", "Be brief.", "Be brief!", "It is 10:41.", "It is 10:47.", ASKED])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "Tiny", "", 5, None]),
    "temperature": st.sampled_from([0, 0.0, 0.5, 1, None]),
    "seed": st.sampled_from([0, 1, -1, None]),
    "max_tokens": st.sampled_from([1, 9]),
    "tools": st.sampled_from([[], [{"type": "function", "function": {"name": "f"}}], [{"name": "g"}]]),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]),
    "unheard_of": st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=4,
    ),
}
CALLS = st.builds(
    Asked,
    words=st.lists(WORDS, min_size=1, max_size=3).map(tuple),
    as_parts=st.booleans(),
    picture=st.booleans(),
    before=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "developer"]), SAID), max_size=3).map(
        tuple
    ),
    fields=st.fixed_dictionaries({}, optional=VALUES),
    query=st.sampled_from(["", "a=1", "a=2", "api-version=1"]),
    headers=st.dictionaries(
        st.sampled_from(["openai-beta", "anthropic-beta", "anthropic-version"]), st.sampled_from(["x", "y"]), max_size=2
    ),
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Asked, Asked]:
    """Two calls that differ in a few of their parts, in none or in the words alone."""
    one, other = draw(CALLS), draw(CALLS)
    names = ("words", "as_parts", "picture", "before", "fields", "query", "headers")
    kept = draw(st.sets(st.sampled_from(names), min_size=4))
    return one, replace(other, **{name: getattr(one, name) for name in kept})


@given(pairs())
def test_calls_share_a_space_exactly_where_only_their_words_differ(pair: tuple[Asked, Asked]) -> None:
    one, other = pair
    same = one.all_but_the_words == other.all_but_the_words
    assert (one.call.space_digest == other.call.space_digest) is same


@given(pairs())
def test_calls_are_equal_exactly_where_nothing_differs(pair: tuple[Asked, Asked]) -> None:
    one, other = pair
    same = one.all_but_the_words == other.all_but_the_words and one.words == other.words
    assert (one.call.digest == other.call.digest) is same


@given(CALLS, st.lists(WORDS, min_size=1, max_size=3))
def test_other_words_never_change_the_space(asked: Asked, others: list[str]) -> None:
    assume(not asked.picture)
    words = tuple((others * 3)[: len(asked.words)])
    other = replace(asked, words=words)
    assert asked.call.space_digest == other.call.space_digest
    assert other.call.words == "\n".join(words)


@given(CALLS)
def test_a_call_with_a_picture_has_no_words_to_compare(asked: Asked) -> None:
    assert (asked.call.words is None) is asked.picture


@given(CALLS, st.sampled_from(list(VALUES)), st.data())
def test_one_field_more_or_another_value_is_another_space(asked: Asked, name: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[name])
    assume(
        name not in asked.fields or json.dumps(asked.fields[name], sort_keys=True) != json.dumps(value, sort_keys=True)
    )
    other = replace(asked, fields={**asked.fields, name: value})
    assert asked.call.space_digest != other.call.space_digest


@given(CALLS, st.sampled_from([{"stream": True}, {"user": "me"}, {"metadata": {"a": "b"}}, {"store": False}]))
def test_fields_that_cannot_change_the_answer_do_not_change_the_space(asked: Asked, more: dict[str, Any]) -> None:
    other = replace(asked, fields={**asked.fields, **more})
    assert asked.call.space_digest == other.call.space_digest


# Over HTTP


BRIEF = {"role": "system", "content": "Be brief."}
HISTORY = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PATH = "/v1/chat/completions"


async def near_after(proxy: Proxy, change: Mapping[str, Any]) -> str:
    """What becomes of other words in a call with this change, once the plain one was answered.

    `path`, `headers`, `before` and `content` (of the last message) are the request's; whatever else is of its body.
    """
    plain = {"model": "tiny", "temperature": 0}
    first = await proxy.post(PATH, json={**plain, "messages": [BRIEF, *HISTORY, {"role": "user", "content": ASKED}]})
    await proxy.settled()
    assert first.outcome == "MISS"
    last = {"role": "user", "content": change.get("content", ALIKE)}
    fields = {name: value for name, value in change.items() if name not in ("path", "headers", "before", "content")}
    body = {**plain, **fields, "messages": [*change.get("before", [BRIEF, *HISTORY]), last]}
    return (await proxy.post(change.get("path", PATH), json=body, headers=change.get("headers"))).outcome


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"user": "me"},
        {"stream": True},
        {"metadata": {"request": "7"}},
        {"store": False},
        {"path": "/chat/completions"},
        {"headers": {"X-Request-Id": "7", "User-Agent": "another"}},
    ],
)
async def test_other_words_alone_are_near(start: StartProxy, change: dict[str, Any]) -> None:
    assert await near_after(await with_near(start), change) == "NEAR"


@pytest.mark.parametrize(
    "change",
    [
        {"before": [{"role": "system", "content": "Be very brief."}, *HISTORY]},
        {"before": [{"role": "developer", "content": "Be brief."}, *HISTORY]},
        {"before": HISTORY},
        {"before": [BRIEF]},
        {"before": [BRIEF, *reversed(HISTORY)]},
        {"before": [*HISTORY, BRIEF]},
        {"before": [BRIEF, {"role": "user", "content": "hi!"}, HISTORY[1]]},
        {"content": [{"type": "text", "text": ALIKE}, PICTURE]},
        {"content": [{"type": "text", "text": ALIKE}]},
        {"temperature": 0.1},
        {"temperature": None},
        {"seed": 1},
        {"model": "tiny-2"},
        {"model": None},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"n": 2},
        {"logprobs": True},
        {"unheard_of": None},
        {"path": "/v1/chat/completions?api-version=2"},
        {"headers": {"OpenAI-Beta": "x"}},
        {"headers": {"Anthropic-Version": "2023-06-01"}},
    ],
)
async def test_anything_else_that_differs_is_another_question(start: StartProxy, change: dict[str, Any]) -> None:
    assert await near_after(await with_near(start), change) == "MISS"


async def test_who_asks_is_part_of_the_space(start: StartProxy) -> None:
    proxy = await with_near(start, sharing="per-credential")
    mine, other = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer other"}
    await proxy.chat(ASKED, headers=mine)
    await proxy.settled()
    assert (await proxy.chat(ALIKE, headers=other)).outcome == "MISS"
    assert (await proxy.chat(ALIKE, headers=mine)).outcome == "NEAR"
