"""The files in `languages/`, one for each language: every word list, in one readable place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "languages"


@functools.cache
def raw_languages() -> Mapping[str, Mapping[str, Any]]:
    """The files as they are, every scalar a text, by language code; read once."""
    # Texts, because in YAML "no" and "on" are truth values; libyaml, where it is there, is ten times as fast.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    return {
        path.stem: yaml.load(path.read_text(encoding="utf-8"), loader)  # noqa: S506 - it makes nothing but texts
        for path in sorted(FOLDER.glob("*.yaml"))
    }
