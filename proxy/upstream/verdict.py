"""Whether an upstream takes a credential: it is shown to every path whose answers are kept.

Servers, and the gateways before them, may check keys on some of their paths alone. So one path that refuses the
credential decides, and "it takes anybody" is said only of a server all of whose paths took it. An empty body comes
first: it costs nothing, and most servers check keys before they look at it. Only where it tells nothing, one
well-formed question of a token or so decides for that path, in its turn of the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from proxy.upstream.adapter import Capabilities, Probe, Reply, model_ids
from proxy.upstream.lane import LaneBusy

_CHAT: Mapping[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
# OpenAI refuses fewer than 16 here, and keeps the answer unless it is told not to.
_RESPONSE: Mapping[str, Any] = {"input": "hi", "max_output_tokens": 16, "store": False}
_EMBEDDINGS = "/v1/embeddings"
_QUESTIONS: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/messages": _CHAT,
    _EMBEDDINGS: {"input": "hi"},
    "/v1/responses": _RESPONSE,
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/chat/completions": _CHAT,
    "/messages": _CHAT,
    "/responses": _RESPONSE,
}
"""The least that can be asked, by path."""
PATHS: Sequence[str] = tuple(_QUESTIONS)
"""Every path whose answers are kept."""
TURN_S = 5.0
"""How long a question of nearhit's own may wait for its turn and its answer."""

_NOT_NOW = (0, 408, 429, 502, 503, 504)
_ABSENT = (404, 405, 501)
_ABOUT_THE_BODY = (400, 422)
_ANSWERS = ("choices", "data", "output", "content")
"""What an answer has, one of them on each path."""
_NO_SUCH_PATH = "unexpected endpoint or method"
"""How LM Studio says it, with a 200: https://github.com/lmstudio-ai/lmstudio-bug-tracker/issues/618."""


class Verdict(StrEnum):
    """What showing a credential told. The values are kept in the database."""

    ACCEPTED = "accepted-on-every-path"
    """What versions before asked of one path alone was kept as `accepted`: it must not be taken for this."""
    PARTLY = "accepted-in-part"
    """Accepted and nowhere refused, but a path refuses every question of ours for another reason."""
    REFUSED_UNREAD = "refused-unread"
    """Refused although the body was empty: that path checks the credential before the body."""
    REFUSED = "refused"
    UNCLEAR = "unclear"


Turn = Callable[[], AbstractAsyncContextManager[object]]
"""A place among the calls that the upstream works on."""


class _Word(Enum):
    """What one path says."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    ABSENT = "absent"
    OTHER = "other"
    """An answer that tells nothing of the credential."""
    UNASKED = "unasked"
    """It would tell if it were asked properly, and nobody knows which model to name."""
    NONE = "none"
    """No answer, none of the model server's own, or one that sends us elsewhere, as to a page to log in."""


@dataclass(frozen=True, slots=True)
class Told:
    """What showing it everywhere came to; `paths` is what each one says by itself, as far as that was found out.

    `absent` are those that the server says it does not have; `unasked` are those that a question may still tell of.
    `heard`: no path was silent or sent us elsewhere.
    """

    verdict: Verdict
    paths: dict[str, Verdict]
    absent: frozenset[str] = frozenset()
    unasked: frozenset[str] = frozenset()
    heard: bool = True


@dataclass(frozen=True, slots=True)
class Trial:
    """One credential, `probe`'s, to be shown to an upstream. `turn` is a place in its queue.

    `model` is the one to name in questions, as a call did that was answered: empty where that named none, None where
    there was no call. Then a question names the only one that is listed. Which of several is loaded nobody knows, and
    the wrong one would take its place; so with several, one path alone is asked, unless one `guesses`.
    """

    probe: Probe
    capabilities: Capabilities
    turn: Turn = nullcontext
    model: str | None = None
    guesses: bool = False

    async def everywhere(self) -> Told:
        """Show it on all paths. The first refusal decides. Paths that the server does not have do not count."""
        if self.capabilities.open_to_all:
            return await self._at_a_gateway()
        words: dict[str, _Word] = {}
        for path in PATHS:
            reply = await self.probe.post(path, {})
            words[path] = self._to_nothing(reply)
            if words[path] is _Word.REFUSED:
                return Told(Verdict.REFUSED_UNREAD, {**_told(words), path: Verdict.REFUSED_UNREAD})
            if reply is None or reply.status == 0:
                break
        if _Word.NONE in words.values():
            return Told(Verdict.UNCLEAR, _told(words), _these(words, _Word.ABSENT), frozenset(PATHS), heard=False)
        verdict = await self._well_formed(words)
        unasked = frozenset(PATHS) if verdict is Verdict.UNCLEAR else _these(words, _Word.UNASKED)
        heard = _Word.NONE not in words.values()
        return Told(verdict, _told(words), _these(words, _Word.ABSENT), unasked, heard)

    async def anywhere(self) -> Verdict:
        """Show it on the first path that the server has."""
        for path in PATHS:
            verdict = await self.at(path)
            if verdict is not None:
                return verdict
        return Verdict.UNCLEAR

    async def at(self, path: str, *, unread: bool = False) -> Verdict | None:
        """Show it on one path; None where the server has no such path.

        `unread`: this path is known to refuse invalid credentials before it reads a body. So whoever hears anything
        else, even that there is no such path, has passed.
        """
        if self.capabilities.open_to_all:
            return _verdict(_at_gateway(await self.probe.get(path)))
        reply = await self.probe.post(path, {})
        word = self._to_nothing(reply)
        if unread and (word is _Word.ABSENT or (reply is not None and reply.status in _ABOUT_THE_BODY)):
            return Verdict.ACCEPTED
        if word is _Word.REFUSED:
            return Verdict.REFUSED_UNREAD
        # Where a call was answered there is such a path: what is missing was the model.
        if word is _Word.OTHER or (word is _Word.ABSENT and self.model is not None):
            word = await self._question(path, await self._models() if self.model is None else ())
        return _verdict(word)

    async def _at_a_gateway(self) -> Told:
        """Servers without keys take all but what a gateway before them refuses."""
        for path in PATHS:
            verdict = await self.at(path) or Verdict.UNCLEAR
            if verdict is not Verdict.ACCEPTED:
                told: dict[str, Verdict] = {path: verdict} if verdict is Verdict.REFUSED else {}
                return Told(verdict, told, unasked=frozenset(PATHS), heard=verdict is not Verdict.UNCLEAR)
        return Told(Verdict.ACCEPTED, dict.fromkeys(PATHS, Verdict.ACCEPTED))

    def _to_nothing(self, reply: Reply | None) -> _Word:
        """What a path says to an empty body."""
        word = _word(reply)
        if word is _Word.OTHER and reply is not None and self.capabilities.key_before_body:
            # llama.cpp complains of a missing field with a 500 on some paths; a gateway's 500 is a page.
            complains = isinstance(reply.json, dict) and "error" in reply.json
            if reply.status in _ABOUT_THE_BODY or (reply.status == 500 and complains):
                return _Word.ACCEPTED
        return word

    async def _well_formed(self, words: dict[str, _Word]) -> Verdict:
        """Ask properly where an empty body told nothing; `words` is what that came to, and is brought up to date."""
        asked = [path for path, word in words.items() if word is _Word.OTHER]
        models = await self._models() if asked else ()
        for path in asked:
            words[path] = await self._question(path, models, guesses=path == asked[0])
            if words[path] in (_Word.REFUSED, _Word.NONE):
                return _verdict(words[path]) or Verdict.UNCLEAR
        if _Word.ACCEPTED not in words.values():
            return Verdict.UNCLEAR
        return Verdict.PARTLY if {_Word.OTHER, _Word.UNASKED} & {*words.values()} else Verdict.ACCEPTED

    async def _question(self, path: str, models: Sequence[str], *, guesses: bool = False) -> _Word:
        model = self._model_for(path, models, guesses=guesses or self.guesses)
        if model is None:
            return _Word.UNASKED
        question = {**({"model": model} if model else {}), **_QUESTIONS[path]}
        try:
            # It makes the model work: not beside a call that may be all it can do.
            async with asyncio.timeout(TURN_S), self.turn():
                reply = await self.probe.post(path, question)
        except (TimeoutError, LaneBusy):
            return _Word.NONE
        # That there is no such model may be how it says that this model is for others.
        return _Word.OTHER if reply is not None and reply.status == 404 else _word(reply)

    def _model_for(self, path: str, models: Sequence[str], *, guesses: bool) -> str | None:
        if self.model is not None:
            return self.model
        if len(models) < 2 or guesses:
            return _likely(path, models)
        return None

    async def _models(self) -> Sequence[str]:
        listing = await self.probe.get("/v1/models")
        return model_ids(listing.json) if listing is not None else ()


def _word(reply: Reply | None) -> _Word:
    if reply is None or reply.status in _NOT_NOW or 300 <= reply.status < 400:
        return _Word.NONE
    if reply.status in (401, 403):
        return _Word.REFUSED
    if reply.status in _ABSENT:
        return _Word.ABSENT
    return _success(reply.json) if 200 <= reply.status < 300 else _Word.OTHER


def _success(said: Any) -> _Word:
    """What a 2xx says: errors and pages to log in come with it, too."""
    if not isinstance(said, dict):
        return _Word.OTHER
    error = said.get("error")
    if isinstance(error, str) and error.lower().startswith(_NO_SUCH_PATH):
        return _Word.ABSENT
    return _Word.ACCEPTED if not error and any(name in said for name in _ANSWERS) else _Word.OTHER


def _at_gateway(reply: Reply | None) -> _Word:
    """What a GET on a path for POST says of a gateway before a server without keys; it makes no model work."""
    word = _word(reply)
    if word in (_Word.REFUSED, _Word.NONE):
        return word
    is_page = reply is not None and 200 <= reply.status < 300 and reply.json is None
    return _Word.OTHER if is_page else _Word.ACCEPTED


def _verdict(word: _Word) -> Verdict | None:
    """What the word of one path comes to, by itself."""
    match word:
        case _Word.ACCEPTED:
            return Verdict.ACCEPTED
        case _Word.REFUSED:
            return Verdict.REFUSED
        case _Word.OTHER | _Word.UNASKED | _Word.NONE:
            return Verdict.UNCLEAR
        case _Word.ABSENT:
            return None


def _told(words: Mapping[str, _Word]) -> dict[str, Verdict]:
    """The paths that told something of the credential."""
    verdicts = {path: _verdict(word) for path, word in words.items()}
    return {path: verdict for path, verdict in verdicts.items() if verdict not in (None, Verdict.UNCLEAR)}


def _these(words: Mapping[str, _Word], wanted: _Word) -> frozenset[str]:
    return frozenset(path for path, word in words.items() if word is wanted)


def _likely(path: str, models: Sequence[str]) -> str:
    """A listed model that can probably answer there; a wrong guess is never taken for an acceptance."""
    fitting = [model for model in models if ("embed" in model.lower()) == (path == _EMBEDDINGS)]
    return next(iter(fitting or models), "default")
