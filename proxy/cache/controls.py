"""The `cache` object in a request's body, as LiteLLM's users know it.

Its fields are `no-cache`, `no-store`, `ttl`, `s-maxage` and `namespace`. It is
nearhit's own: no part of the key, and never sent upstream. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from proxy.cache.directives import NONE, Directives

FIELD = "cache"
"""Where it stands in the body."""

_LONGEST_S = 10 * 366 * 86_400
_LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Controls:
    """What one call asks of the cache in its body.

    `ttl_s` is for how long its answer may be kept (None: as usual); `namespace` is a room of its own inside the
    caller's ("" for none).
    """

    directives: Directives = NONE
    ttl_s: float | None = None
    namespace: str = ""


def read_controls(value: Any) -> Controls | None:
    """The controls in a body's `cache`; None where they cannot be understood. Fields that are not known are ignored."""
    if not isinstance(value, dict):
        return None
    flags = [value.get(name) or False for name in ("no-cache", "no-store")]
    times = [value.get(name) for name in ("ttl", "s-maxage")]
    name = value.get("namespace")
    name = "" if name is None else name
    if not all(isinstance(flag, bool) for flag in flags) or not all(map(_is_time, times)):
        return None
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        return None
    no_cache, no_store = flags
    ttl_s, max_age_s = times
    asked = Directives(no_cache=no_cache, no_store=no_store, max_age_s=None if max_age_s is None else int(max_age_s))
    return Controls(NONE if asked == NONE else asked, ttl_s, name)


def without_controls(body: bytes) -> bytes:
    """The body, a JSON object, as it goes upstream."""
    decoded = json.loads(body)
    if not own_field(decoded):
        return body
    del decoded[FIELD]
    return json.dumps(decoded, separators=(",", ":")).encode("ascii")


def narrowed(asked: Directives, controls: Controls | None) -> Directives:
    """What header and body ask together: whichever allows less."""
    if controls is None or controls.directives is NONE:
        return asked
    more = controls.directives
    ages = [age for age in (asked.max_age_s, more.max_age_s) if age is not None]
    return replace(
        asked,
        no_cache=asked.no_cache or more.no_cache,
        no_store=asked.no_store or more.no_store,
        max_age_s=min(ages, default=None),
    )


def within(namespace: bytes, controls: Controls | None) -> bytes:
    """The namespace of a call whose caller has this one."""
    if controls is None or not controls.namespace:
        return namespace
    parts = (b"within", namespace, controls.namespace.encode("utf-8", "surrogatepass"))
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def own_field(body: Mapping[str, Any]) -> bool:
    """Whether the body has an object of that name; what is no object is some server's own field."""
    return isinstance(body.get(FIELD), dict)


def _is_time(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LONGEST_S
