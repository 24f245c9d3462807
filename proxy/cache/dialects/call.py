"""A request to a cacheable endpoint, read once: what it asks, what identifies it, what is compared. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.cache.controls import FIELD, Controls, own_field, read_controls
from proxy.cache.length import NO_LIMITS, Limits, is_limited, limits_of
from proxy.cache.policy import Bypass
from proxy.cache.strict_json import Json as Json
from proxy.cache.strict_json import finite, refuse_constant
from proxy.cache.volatile import is_volatile

KEY_VERSION = 1
"""Part of every digest: moves when the same call would get another digest than before."""

BEHAVIOUR_HEADERS = ("anthropic-beta", "anthropic-version", "openai-beta")
"""Request headers that choose how a server answers."""

IGNORED_FIELDS = frozenset(
    {"stream", "stream_options", "user", "metadata", "id_slot", "cache_prompt", "sse_ping_interval"}
)
"""Body fields that cannot change the answer. Every other field counts, known or not."""

OF_THE_CALL: Mapping[str, Json] = {"metadata": {}, "user": None}
"""What servers repeat of a call though the key leaves it out, with what says nothing of another asker."""

_STRUCTURE = (b"[", b"{", b",", b":")
_MAX_STRUCTURE = 500_000
"""Values beyond which parsing would hold up everybody else; the marks in texts are counted along."""

_LLAMA_RANDOM_SEED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class NotCacheable:
    """The request goes upstream as it is."""

    reason: Bypass


@dataclass(frozen=True, slots=True)
class Call:
    """One parsed request to a cacheable endpoint.

    `digest` (32 bytes) covers endpoint, query, behaviour headers and every body field but `IGNORED_FIELDS`;
    `space_digest` the same except `words`, the text that a near look-up may compare (None: exact look-up only).
    `sampled` says that asking again would give another answer, `volatile` that the answer depends on the time,
    `limited` that the call itself states how long the answer may be, `limits` how long, `later_turn` that answers were
    given before in its conversation, `left_to_store` that it leaves to the server whether it keeps the answer.
    `system` is a digest of the system prompt, empty where there is none; `echoed` one of what a server repeats of the
    call in its answer though it changes nothing; `controls` are the call's own wishes, None where its body has none.
    """

    endpoint: str
    digest: bytes
    space_digest: bytes
    words: str | None
    model: str
    stream: bool
    include_usage: bool
    sampled: bool
    volatile: bool
    limited: bool
    system: bytes = b""
    controls: Controls | None = None
    limits: Limits = NO_LIMITS
    later_turn: bool = False
    left_to_store: bool = False
    echoed: bytes = b""

    @property
    def needs_usage(self) -> bool:
        """Whether the asker expects token counts: always without a stream, on request with one."""
        return self.include_usage or not self.stream


@dataclass(frozen=True, slots=True)
class Reading:
    """What a dialect finds in a body.

    `texts` are the compared words as they came, in their parts, `without_words` the body with these parts empty: the
    two together are the body again. Without `words`, both are empty. `timely_text` may speak of time. `system` is what
    the messages before the first of the user or assistant say; `later_turn` says that there is one of the assistant,
    `left_to_store` that servers which can keep answers do so unless told otherwise, `by_form` that a stream and a whole
    answer say different things. `echoed` is what servers repeat in their answers, and no key holds.
    """

    words: str | None
    texts: Sequence[str]
    without_words: Mapping[str, Json]
    timely_text: str
    system: Sequence[Json] = ()
    later_turn: bool = False
    left_to_store: bool = False
    by_form: bool = False
    echoed: Sequence[Json] = ()


class Readable(Protocol):
    """The part of a dialect that reads requests; see `proxy.cache.dialects.dialect`."""

    @property
    def endpoint(self) -> str:
        """The label in metrics and headers."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The request paths that speak this dialect."""
        ...

    @property
    def id_prefix(self) -> str:
        """What answer ids begin with."""
        ...

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        """Find the compared words, or say why the body is not understood."""
        ...


_canonical_text = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode


def _canonical(value: Json) -> bytes:
    return _canonical_text(value).encode("ascii")


class _DuplicateKeys(ValueError):
    pass


def read_call(dialect: Readable, query: str, headers: Mapping[str, str], body: bytes) -> Call | NotCacheable:
    """Parse one request. Whatever is not plainly understood is left to the upstream to judge."""
    if sum(map(body.count, _STRUCTURE)) > _MAX_STRUCTURE:
        return NotCacheable(Bypass.TOO_COMPLEX)
    try:
        decoded = _decode(body.decode("utf-8"))
    except _DuplicateKeys:
        return NotCacheable(Bypass.DUPLICATE_KEYS)
    except (ValueError, RecursionError):
        return NotCacheable(Bypass.NOT_JSON)
    if not isinstance(decoded, dict):
        return NotCacheable(Bypass.NOT_UNDERSTOOD)
    refusal = _refusal(decoded)
    if refusal is not None:
        return NotCacheable(refusal)
    reading = dialect.read(decoded)
    if isinstance(reading, NotCacheable):
        return reading
    return _call(dialect, query, headers, decoded, reading)


def _call(
    dialect: Readable, query: str, headers: Mapping[str, str], body: dict[str, Json], reading: Reading
) -> Call | NotCacheable:
    context = [KEY_VERSION, dialect.endpoint, query, *behaviour(headers)]
    if reading.by_form and body.get("stream") is True:
        context.append("stream")
    try:
        shell = _canonical([context, counted(body if reading.words is None else reading.without_words)])
        texts = _canonical(reading.texts)
        system = hashlib.sha256(_canonical(reading.system)).digest() if reading.system else b""
        echoed = hashlib.sha256(_canonical(reading.echoed)).digest() if any(reading.echoed) else b""
    except RecursionError:
        return NotCacheable(Bypass.NOT_JSON)
    model = body.get("model")
    return Call(
        endpoint=dialect.endpoint,
        digest=hashlib.sha256(b"%d\n%b\n%b" % (len(shell), shell, texts)).digest(),
        space_digest=hashlib.sha256(shell).digest(),
        words=reading.words,
        model=model if isinstance(model, str) and storable(model) else "",
        stream=body.get("stream") is True,
        include_usage=(body.get("stream_options") or {}).get("include_usage") is True,
        sampled=_is_sampled(body),
        volatile=is_volatile(reading.timely_text),
        limited=is_limited(body),
        system=system,
        controls=read_controls(body[FIELD]) if own_field(body) else None,
        limits=limits_of(body),
        later_turn=reading.later_turn,
        left_to_store=reading.left_to_store,
        echoed=echoed,
    )


_UNSAID: Sequence[str | None] = [None] * len(BEHAVIOUR_HEADERS)


def behaviour(headers: Mapping[str, str]) -> Sequence[str | None]:
    """The values of `BEHAVIOUR_HEADERS`, repeated ones included."""
    shown = [name if name in headers else None for name in BEHAVIOUR_HEADERS]
    if shown == _UNSAID:
        return _UNSAID
    # A plain dictionary has no repeated names.
    values = getattr(headers, "getall", None)
    return [name and ("\n".join(values(name)) if values else headers[name]) for name in shown]


def storable(text: str) -> bool:
    """Whether the text is valid Unicode: JSON can spell lone surrogates, databases and headers cannot."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


_BOUND = {
    "store": Bypass.STORE_TRUE,
    "previous_response_id": Bypass.PREVIOUS_RESPONSE,
    "conversation": Bypass.CONVERSATION,
    "background": Bypass.BACKGROUND,
}
"""Fields by which a call leaves something at the server, or goes on from what was left there."""


def _refusal(body: Mapping[str, Json]) -> Bypass | None:
    options = body.get("stream_options")
    if not isinstance(body.get("stream", False), bool | None) or not isinstance(options, dict | None):
        return Bypass.NOT_UNDERSTOOD
    if own_field(body) and read_controls(body[FIELD]) is None:
        return Bypass.NOT_UNDERSTOOD
    if body.get("return_progress"):
        return Bypass.RETURN_PROGRESS
    bound = next((reason for name, reason in _BOUND.items() if body.get(name)), None)
    if bound is not None:
        return bound
    known = {"include_usage", "include_obfuscation"}
    if any(value for name, value in (options or {}).items() if name not in known):
        return Bypass.STREAM_OPTIONS
    return None


def _is_sampled(body: Mapping[str, Json]) -> bool:
    temperature, seed = body.get("temperature"), body.get("seed")
    if isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature <= 0:
        return False
    seeded = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < _LLAMA_RANDOM_SEED
    return not seeded


def counted(body: Mapping[str, Json]) -> dict[str, Json]:
    """The fields of a body that are part of the key."""
    kept = {name: value for name, value in body.items() if name not in IGNORED_FIELDS}
    if kept.get("store") is False:
        del kept["store"]
    if own_field(kept):
        del kept[FIELD]
    return kept


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _DuplicateKeys
    return result


# Made once: `json.loads` with hooks makes a decoder for each call.
_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=refuse_constant, parse_float=finite).decode
