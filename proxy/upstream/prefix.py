"""Prefix caches: what prompts begin with, and what a kind of server can do to have it computed already. Pure.

A *lead* is what a prompt begins with whatever its user says: the leading system messages and whatever else the chat
template renders with them. A *prefix* is the run of tokens that all prompts with this lead share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from proxy.upstream.adapter import Probe

Json = Any

RENDERED = (
    "tools",
    "tool_choice",
    "functions",
    "parallel_tool_calls",
    "response_format",
    "json_schema",
    "chat_template_kwargs",
    "reasoning_effort",
    "reasoning_format",
    "enable_thinking",
)
"""Fields besides the messages that chat templates render before the user's first word."""

_LEADING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Lead:
    """What a chat prompt begins with.

    `id` is 32 bytes, equal for equal leads. `body` holds the leading messages under `messages`, and the fields of
    `RENDERED` that the call has: a request body once a user's message is added. `chars` counts the messages' text.
    `continued`: the call goes on with a conversation in which the model has spoken; `model` is the one that it names.
    These two are no part of what makes leads equal.
    """

    id: bytes
    body: Mapping[str, Json]
    chars: int
    continued: bool = field(default=False, compare=False)
    model: str = field(default="", compare=False)

    def with_user(self, text: str) -> dict[str, Json]:
        """The body of a request with this lead in which the user says `text`."""
        return {**self.body, "messages": [*self.body["messages"], {"role": "user", "content": text}]}


def lead_of(body: Mapping[str, Json]) -> Lead | None:
    """The lead of a chat request; None where there is none, or where it is not all text, or names a LoRA of its own."""
    messages = body.get("messages")
    if not isinstance(messages, list) or body.get("lora"):
        return None
    leading: list[Json] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _LEADING:
            break
        leading.append(message)
    texts = [text for message in leading for text in _texts(message.get("content"))]
    rendered = {name: body[name] for name in RENDERED if body.get(name) is not None}
    if None in texts or not (texts or rendered.get("tools") or rendered.get("functions")):
        return None
    kept: dict[str, Json] = {"messages": leading, **rendered}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
    continued = any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages)
    model = body.get("model")
    chars = sum(len(text) for text in texts if text is not None)
    return Lead(digest, kept, chars, continued, model if isinstance(model, str) else "")


def lead_of_prompt(text: str) -> Lead:
    """The lead of chats whose only system message is `text`."""
    found = lead_of({"messages": [{"role": "system", "content": text}]})
    assert found is not None, "a message of one text has a lead"
    return found


def _texts(content: Json) -> Sequence[str | None]:
    """The texts of a message's content, None for each part that is none."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return [None]
    return [_text(part) for part in content]


def _text(part: Json) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


class Style(StrEnum):
    """How a kind of server can be given a prefix before it is asked for it."""

    FILE = "file"
    """Computed in a slot, saved to a file of the server's, restored into a slot (llama.cpp)."""
    NAMED = "named"
    """Computed and kept by the server under a name that calls mention (RockchipLlama)."""
    WARM = "warm"
    """Computed by a request that is thrown away; what stays is up to the server."""
    NONE = "none"
    """Nothing helps."""


class Hitch(StrEnum):
    """Why a prefix was not seeded."""

    TOO_SHORT = "too-short"
    """Computing it costs less than the trouble."""
    UNSUPPORTED = "unsupported"
    """This server cannot."""
    REFUSED = "refused"
    """It answered with an error."""
    BUSY = "busy"
    """It did not answer in time, or had no idle slot."""
    UNREACHABLE = "unreachable"
    """It does not answer at all, or is loading."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """A prefix that the server has computed.

    `tokens` of the prefix (0: unknown), `digest` of the token ids (empty: unknown). `file` is the name under which the
    server keeps it, empty where it keeps nothing that could be restored; `bytes` its size. `seconds` is what seeding
    took; `slot` where the prefix is now, None: unknown. `instance` is the run of the server that computed it, empty
    where runs cannot be told apart.
    """

    tokens: int
    digest: bytes
    file: str
    bytes: int
    seconds: float
    slot: int | None = None
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """A prefix that the server can restore: the name of its file or cache, and its tokens (0: unknown).

    `instance` is the run of the server that is known to be of the model that computed it, empty where runs cannot be
    told apart: what another run may restore silently spoils its answers.
    """

    file: str
    tokens: int
    instance: str = ""


class Readied(StrEnum):
    """What was done about a lead before its call was sent."""

    NOTHING = "nothing"
    """There was nothing to restore."""
    RESIDENT = "resident"
    """The server is believed to hold it."""
    RESTORED = "restored"
    """Its file was restored."""
    NAMED = "named"
    """The call mentions it."""
    REFUSED = "refused"
    """The server cannot use the file: it is of no use any more."""
    SKIPPED = "skipped"
    """No slot was idle, or the server did not answer in time."""


@dataclass(frozen=True, slots=True)
class Ready:
    """How a call is sent: `edits` are fields to set in its body; `slot` where its lead is believed to be."""

    how: Readied
    seconds: float = 0.0
    slot: int | None = None
    edits: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a reply told of reuse: prompt tokens found in the KV cache, and computed; None where it did not say."""

    cached: int | None = None
    computed: int | None = None


class Prefixing(Protocol):
    """What a kind of server can do about prefixes. One object for each upstream: it remembers what is where."""

    @property
    def style(self) -> Style:
        """How seeds are kept here, as far as is known by now."""
        ...

    @property
    def cancels(self) -> bool:
        """Whether hanging up on a seeding frees the server at once."""
        ...

    async def seed(self, probe: Probe, lead: Lead, file: str) -> Seeded | Hitch:
        """Have the lead's prefix computed, and kept under `file` where the server keeps anything.

        Cancelling the task hangs up.
        """
        ...

    async def ready(self, probe: Probe, lead: Lead | None, kept: Kept | None) -> Ready:
        """Prepare for a call with this lead (None: it has none), which is sent next; brief, and never raises."""
        ...

    async def landed(self, probe: Probe, lead: Lead | None, ready: Ready, evidence: Evidence) -> None:
        """Learn from the reply to a call for which `ready` was returned; after the client has it all."""
        ...

    async def forget(self, probe: Probe, kept: Kept) -> bool:
        """Have the server delete it; False where it could not, or nothing was there."""
        ...

    async def prove(self, probe: Probe, lead: Lead, kept: Kept) -> bool | None:
        """Whether a kept prefix saves time, by measuring; None where replies tell it by themselves."""
        ...

    def reset(self) -> None:
        """The server was restarted, or may have been: whatever was resident is gone."""
        ...
