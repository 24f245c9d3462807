"""How a test tells a program's own Python what to do: orders in, one line of JSON each, and what came of them out.

Runs where neither nearhit nor the tests' packages are installed. Where an order's `base` is empty, the environment has
the address.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def obey(steps: Mapping[str, Callable[..., Any]]) -> None:
    """Do what each line of standard input says, until it ends; tell what was said, or the error as a person sees it."""
    # Some libraries print for people.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            told = {"said": steps[order.pop("step")](**order)}
        except Exception as error:  # noqa: BLE001 - what a program raises is what the test is about
            told = {"error": "".join(traceback.format_exception_only(error)).strip()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()
