"""One matcher for all tests here: its dictionaries take seconds to load."""

from __future__ import annotations

import pytest

from proxy.cache.near.matcher import Matcher, load
from tests.near.asking import Asking


@pytest.fixture(scope="session")
def matcher() -> Matcher:
    return load()


@pytest.fixture(scope="session")
def asking(matcher: Matcher) -> Asking:
    return Asking(matcher)
