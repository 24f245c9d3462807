"""The word lists: every file can be used, and says what it seems to say."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.cache import language_files
from proxy.cache.language_files import raw_languages
from proxy.cache.near import languages as lists
from proxy.cache.near.languages import fold_accents, languages
from proxy.cache.near.tokens import tokenize

FOLDER = Path(lists.__file__).parents[1] / "languages"
CODES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WITH_RULES = ["en", "es"]
EVERY = pytest.mark.parametrize("code", CODES)


@EVERY
def test_a_file_names_its_language_and_its_courtesies(code: str) -> None:
    file = raw_languages()[code]
    assert file["name"]
    assert file["spaces"] in ("true", "false")
    assert file["volatile"]
    assert {"lead", "tail"} <= set(file["courtesy"])
    assert "function_words" in file
    assert "payload" in file


@EVERY
def test_a_file_of_a_language_with_spaces_has_words_to_tell_it_by(code: str) -> None:
    file = raw_languages()[code]
    assert bool(file["function_words"]) == (file["spaces"] == "true")


@EVERY
def test_every_entry_is_composed_and_in_lower_case(code: str) -> None:
    entries = [text for where, text in _texts(raw_languages()[code]) if where not in ("name", "spaces")]
    assert [text for text in entries if text != unicodedata.normalize("NFC", text)] == []
    assert [text for text in entries if text != text.lower()] == []


@EVERY
def test_no_entry_is_empty(code: str) -> None:
    assert [where for where, text in _texts(raw_languages()[code]) if not text.strip()] == []


@pytest.mark.parametrize("code", WITH_RULES)
def test_a_courtesy_is_made_of_words_as_they_are_read(code: str) -> None:
    courtesy = raw_languages()[code]["courtesy"]
    phrases = [phrase for end in ("lead", "lead_before_request", "tail") for phrase in courtesy[end]]
    assert [phrase for phrase in phrases if [token.text for token in tokenize(phrase)] != phrase.split()] == []


def test_english_and_spanish_have_rules() -> None:
    assert sorted(languages().rules) == WITH_RULES
    assert all(languages().rules[code].function_words for code in WITH_RULES)


def test_accents_go_and_the_letter_ñ_stays() -> None:
    assert fold_accents("canción") == "cancion"
    assert fold_accents("pingüino") == "pinguino"
    assert fold_accents("año") == "año"


def test_the_same_files_have_the_same_digest_and_others_another(
    tmp_path: Path, fresh_lists: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = languages().digest
    _with_a_language(tmp_path, monkeypatch, courtesy="grumblo")
    assert languages().digest != before


def test_a_language_is_added_by_adding_a_file(
    tmp_path: Path, fresh_lists: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_a_language(tmp_path, monkeypatch, courtesy="grumblo")
    assert "grumblo" in languages().tail
    assert "xx" in languages().function_words
    assert sorted(languages().rules) == WITH_RULES


@pytest.fixture
def fresh_lists() -> Iterator[None]:
    """Lists are read once; these tests read others in between."""
    yield
    raw_languages.cache_clear()
    languages.cache_clear()


def _with_a_language(folder: Path, monkeypatch: pytest.MonkeyPatch, *, courtesy: str) -> None:
    for path in FOLDER.glob("*.yaml"):
        shutil.copy(path, folder)
    text = (
        "name: Testish\nspaces: true\nvolatile: [nuwo]\nfunction_words: [ze, zo]\n"
        f"courtesy: {{lead: [halu], tail: [{courtesy}]}}\npayload: [trazlo]\n"
    )
    (folder / "xx.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(language_files, "FOLDER", folder)
    raw_languages.cache_clear()
    languages.cache_clear()


def _texts(file: Mapping[str, Any] | list[Any] | str, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(file, str):
        yield where, file
    elif isinstance(file, list):
        for item in file:
            yield from _texts(item, where)
    else:
        for key, value in file.items():
            yield from _texts(value, f"{where}.{key}" if where else str(key))
