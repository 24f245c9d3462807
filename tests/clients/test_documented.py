"""docs/clients.md says which versions were tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.asking import ROOT

pytestmark = pytest.mark.slow

TRIED = sorted((ROOT / "tests/clients/requirements").glob("*.txt"))


@pytest.mark.parametrize("path", TRIED, ids=lambda path: path.stem)
def test_the_versions_that_are_tried_are_the_documented_ones(path: Path) -> None:
    page = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if "==" in line]
    assert pins
    assert not [(name, version) for name, _, version in pins if f"{name} {version}" not in page]
