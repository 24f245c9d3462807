"""JSON read so that no two different texts of numbers look the same. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

Json = Any
"""A decoded JSON value."""


class NotFinite(ValueError):
    """A number that no double can hold, or a name that stands for none."""


def finite(literal: str) -> float:
    """The number, if a double can hold it.

    Raises:
        NotFinite: it overflows, and all that do so would look the same.
    """
    number = float(literal)
    if math.isinf(number):
        raise NotFinite(literal)
    return number


def refuse_constant(literal: str) -> Json:
    """Infinity and NaN are not JSON.

    Raises:
        NotFinite: always.
    """
    raise NotFinite(literal)


decode = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite).decode
"""A JSON text's value.

Raises:
    ValueError: it is none, or holds a number that cannot be kept.
    RecursionError: it is nested too deeply.
"""
