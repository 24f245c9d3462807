"""`/v1/embeddings`: batches of inputs, each of which has a vector of its own. Exact look-up only. Pure.

An input is called an item; its vector is kept as the answer to a batch of this one item. A vector is kept as 32-bit
floats wherever that loses nothing, in the form that `encoding_format: base64` has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from msgspec import Raw

from proxy.cache.answer import Assembling, Gist, NotUnderstood, Pieces, Recorded, Wire, encoded, in_one
from proxy.cache.controls import FIELD
from proxy.cache.dialects.call import IGNORED_FIELDS, Call, Json, NotCacheable, Reading
from proxy.cache.dialects.laying import Part, lay_out
from proxy.cache.dialects.vectors import Form
from proxy.cache.policy import Bypass, Drop

_INPUT, _FORM = "input", "encoding_format"
_TIED = re.compile(r"chunk|dtype|endian|precision|quantiz|embedding_type|output_type", re.IGNORECASE)
"""In the names of fields that make a vector depend on its neighbours, or its numbers something else than floats."""
_APART = frozenset(
    {
        *IGNORED_FIELDS,
        _INPUT,
        _FORM,
        FIELD,
        "add_special_tokens",
        "dimensions",
        "embd_normalize",
        "input_type",
        "instruction",
        "model",
        "normalize",
        "normalized",
        "prompt_name",
        "store",
        "task",
        "task_type",
        "truncate",
        "truncate_prompt_tokens",
        "truncation",
    }
)
"""Fields that are known to say the same of each item, whatever items there are beside it."""

_canonical = json.JSONEncoder(ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Batch:
    """One request. `call` is all of it but its items and the form in which it wants their vectors.

    `items` are its different items, each as a call of its own; `firsts` are their first places in the request,
    `lengths` what they weigh against each other, `order` the item at each place.
    """

    call: Call
    items: tuple[Call, ...]
    firsts: tuple[int, ...]
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    form: Form


def batch_of(call: Call, body: bytes) -> Batch | NotCacheable:
    """The batch in a body that `call` was read from."""
    decoded = json.loads(body)
    items = _items(decoded[_INPUT])
    form = _form(decoded)
    if items is None or form is None:
        return NotCacheable(Bypass.NOT_UNDERSTOOD)
    try:
        texts = [_canonical(item).encode("ascii") for item in items]
    except RecursionError:
        return NotCacheable(Bypass.NOT_JSON)
    # Asking again gives the same vector, and no near look-up compares what stands for other words.
    shell = replace(call, words=None, sampled=False)
    digests = [hashlib.sha256(call.digest + text).digest() for text in texts]
    firsts: dict[bytes, int] = {}
    for place, digest in enumerate(digests):
        firsts.setdefault(digest, place)
    numbers = {digest: number for number, digest in enumerate(firsts)}
    return Batch(
        call=shell,
        items=tuple(replace(shell, digest=digest) for digest in firsts),
        firsts=tuple(firsts.values()),
        lengths=tuple(len(texts[place]) for place in firsts.values()),
        order=tuple(numbers[digest] for digest in digests),
        form=form,
    )


def reduced(body: bytes, places: Sequence[int]) -> bytes:
    """The request with the items at these places only, and all else as it came."""
    decoded = json.loads(body)
    decoded[_INPUT] = [decoded[_INPUT][place] for place in places]
    return json.dumps(decoded, separators=(",", ":")).encode("ascii")


def _form(body: Mapping[str, Json]) -> Form | None:
    form = body.get(_FORM)
    if form is None:
        return Form.FLOAT
    return Form(form) if isinstance(form, str) and form in set(Form) else None


def _items(value: Json) -> list[Json] | None:
    """The items, where it is plain how many there are; None leaves it to the upstream to judge."""
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list) or not value:
        return None
    if all(_is_token(item) for item in value):
        return [value]
    # Tokens among texts make one item of them all for some servers.
    return value if all(isinstance(item, str | list | dict) and item for item in value) else None


def _is_plain(name: str, value: Json, *, alone: bool) -> bool:
    """Whether a field leaves each item its own vector of floats; `alone` says that there is one item only."""
    if name == _INPUT or value is None or value is False:
        return True
    # A list may have something to say of each item in turn.
    return not isinstance(value, list) and _TIED.search(name) is None and (alone or name in _APART)


def _is_token(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def part_of(answer: bytes) -> Part:
    """The part that was stored as this answer.

    Raises:
        NotUnderstood: it is damaged.
    """
    laid = lay_out(answer, 1)
    if isinstance(laid, Drop):
        raise NotUnderstood(laid)
    return laid.part(0, laid.usage, None)


def assembled(
    parts: Sequence[Part], shell: Mapping[str, Json], form: Form, answer_id: str, created: int
) -> Iterator[bytes]:
    """An answer with these parts in their order, in pieces; `shell` are its other fields.

    `answer_id` and `created` (seconds since the epoch) take their places where it has such fields.

    Raises:
        NotUnderstood: a vector that this form cannot hold.
    """
    anew = {"id": answer_id, "created": created}
    fields = {name: anew.get(name, value) for name, value in shell.items()}
    usage = _summed(parts)
    head = encoded(fields if usage is None else {**fields, "usage": usage})[:-1]
    yield head + (b"," if len(head) > 1 else b"") + b'"data":['
    for place, part in enumerate(parts):
        vector = Raw(part.vector.encoded(form))
        yield (b"," if place else b"") + encoded({**part.fields, "index": place, "embedding": vector})
    yield b"]}"


def _summed(parts: Sequence[Part]) -> Mapping[str, Json] | None:
    """What all parts took together; None where one does not know."""
    usages = [part.usage for part in parts if part.usage is not None]
    if len(usages) != len(parts) or not usages:
        return None
    summed = dict.fromkeys(chain.from_iterable(usages))
    for name in summed:
        values = [usage.get(name) for usage in usages]
        told = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
        summed[name] = sum(told) if told else values[0]
    return summed


class _Embeddings:
    """See `Dialect`; an answer is here one to a single item."""

    endpoint = "embeddings"
    paths = ("/v1/embeddings",)
    id_prefix = "embd-"
    usage_on_request = False

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        items = _items(body.get(_INPUT))
        if items is None or _form(body) is None:
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        if not all(_is_plain(name, value, alone=len(items) == 1) for name, value in body.items()):
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        return Reading("", (), {name: body[name] for name in body if name not in (_INPUT, _FORM)}, "")

    def kept(self, body: Mapping[str, Json]) -> dict[str, Json]:
        recorded = _recorded(body)
        return dict(body) if isinstance(recorded, Drop) else recorded.body

    def judge(self, body: Mapping[str, Json]) -> Gist | Drop:
        recorded = _recorded(body)
        return recorded if isinstance(recorded, Drop) else recorded.gist

    def assembler(self) -> Assembling:
        return _NoStream()

    def whole(self, body: Mapping[str, Json]) -> Wire:
        part = part_of(encoded(body))
        return Wire(b"".join(assembled([part], part.shell, Form.BASE64, "", 0)))

    def stream(self, body: Mapping[str, Json], *, include_usage: bool, pieces: Pieces = in_one) -> Wire:
        # Servers that are asked for a stream of vectors give them whole.
        del include_usage, pieces
        return self.whole(body)


def _recorded(body: Mapping[str, Json]) -> Recorded | Drop:
    try:
        return part_of(encoded(body)).recorded
    except NotUnderstood:
        return Drop.NOT_UNDERSTOOD


class _NoStream:
    """There are no streams of vectors; see `Assembling`."""

    done = False
    spoke = False
    deltas = 0

    def feed(self, data: str) -> None:
        del data

    def fail(self) -> None:
        pass

    def finish(self, *, usage_asked: bool, usage_from_timings: bool) -> Recorded | Drop:
        del usage_asked, usage_from_timings
        return Drop.NOT_UNDERSTOOD


EMBEDDINGS = _Embeddings()
"""The embeddings dialect."""
