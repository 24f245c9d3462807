"""A model that answers at length, and disks that get into trouble."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failures.disks import FILLING, READ_ONLY, Disk
from tests.failures.serving import long_answers
from tests.fake_model import FakeModel


@pytest.fixture(autouse=True)
def _long_answers(model: FakeModel) -> None:
    model.respond = long_answers()


@pytest.fixture(params=list(FILLING))
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be filled."""
    with FILLING[request.param](tmp_path / "disk") as disk:
        yield disk


@pytest.fixture(params=list(READ_ONLY))
def protected_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that can be made read-only while nothing on it is open."""
    with READ_ONLY[request.param](tmp_path / "disk") as disk:
        yield disk
