"""Where a call goes by the name of its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.models_dir import read_models_dir
from proxy.upstream.routing import Route, Routing, Shown, Target, model_in, with_fields

SHOWN = {
    "default": Shown(("qwen3", "/srv/models/smol.gguf"), {"/srv/models/smol.gguf": "smol.gguf"}),
    "npu": Shown(("gemma", "qwen3"), {"gemma": "Gemma-w8a8.rkllm"}),
}


def routing(
    names: dict[str, Target] | None = None,
    npu: list[str] | None = None,
    first: list[str] | None = None,
    folders: dict[str, str] | None = None,
) -> Routing:
    return Routing(names or {}, {"default": first or [], "npu": npu or []}, folders or {})


@pytest.mark.parametrize(
    ("routes", "model", "expected"),
    [
        (routing(), "qwen3", Route("default")),
        (routing(), "gemma", Route("npu")),
        (routing(), "gpt-4o", Route("default")),
        (routing(), "", Route("default")),
        (routing(npu=["qwen*"]), "qwen3", Route("npu")),
        (routing(npu=["qwen*"]), "gemma", Route("default")),
        (routing(first=["x*"]), "qwen3", Route("npu")),
        (routing({"assistant": Target("gemma")}), "assistant", Route("npu", "gemma")),
        (routing({"assistant": Target("anything", "npu")}), "assistant", Route("npu", "anything")),
        (routing({"gemma": Target("qwen3")}), "gemma", Route("default", "qwen3")),
        (routing(folders={"voice": "Gemma-w8a8.rkllm"}), "voice", Route("npu", "gemma")),
        (routing(folders={"voice": "gone.gguf"}), "voice", Route("default")),
    ],
)
def test_a_call_goes_to_the_upstream_of_its_model(routes: Routing, model: str, expected: Route) -> None:
    assert routes.route(model, SHOWN) == expected


@given(
    model=st.text(max_size=5),
    npu=st.lists(st.text(max_size=3), max_size=3),
    names=st.dictionaries(st.text(min_size=1, max_size=5), st.builds(Target, st.text(max_size=5), st.just(""))),
)
def test_every_name_leads_to_an_upstream_that_exists(model: str, npu: list[str], names: dict[str, Target]) -> None:
    assert routing(names, npu).route(model, SHOWN).upstream in SHOWN


@pytest.mark.parametrize(
    ("upstream", "model", "expected"),
    [
        ("default", "/srv/models/smol.gguf", "tiny"),
        ("default", "/srv/models/other.gguf", "other"),
        ("npu", "gemma", "voice"),
        ("default", "gemma", "gemma"),
        ("npu", "org/name", "org/name"),
    ],
)
def test_models_are_shown_under_the_names_that_people_gave_them(upstream: str, model: str, expected: str) -> None:
    routes = routing({"voice": Target("gemma", "npu")}, folders={"tiny": "smol.gguf"})
    assert routes.friendly(upstream, model, SHOWN[upstream]) == expected


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b'{"model": 3}', b'{"model": null}', b'{"a": 1}', b"\xff", b'{"model": "x"', b"[" * 5000],
)
def test_a_body_without_a_model_names_none(body: bytes) -> None:
    assert model_in(body) == ""


def test_a_model_is_named_by_a_body() -> None:
    assert model_in(b'{"messages": [{"model": "no"}], "model": "yes"}') == "yes"


def test_setting_a_field_leaves_the_others_as_they_were() -> None:
    body = b'{"temperature": 1.10, "model": "a", "n": 123456789012345678901234567890, "t": "\\u00e9"}'
    changed = with_fields(body, {"model": "b"})
    assert json.loads(changed) == {**json.loads(body), "model": "b"}
    assert b"1.10" in changed
    assert b"\\u00e9" in changed


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b'{"a"', b'"text"'])
def test_what_is_no_object_stays_as_it_is(body: bytes) -> None:
    assert with_fields(body, {"model": "b"}) == body


def _model(folder: Path, name: str, *files: str) -> None:
    (folder / name).mkdir(parents=True)
    for file in files:
        (folder / name / file).touch()


def test_folders_name_the_models_that_they_hold(tmp_path: Path) -> None:
    _model(tmp_path, "assistant", "Qwen3.gguf", "notes.txt")
    _model(tmp_path, "npu model", "b.rkllm", "a.rkllm")
    _model(tmp_path, "again", "b.gguf", "Qwen3.gguf")
    _model(tmp_path, "copy", "Qwen3.gguf")
    _model(tmp_path, "empty")
    (tmp_path / "file.gguf").touch()
    folders = read_models_dir(tmp_path)
    assert folders.files == {"again": "Qwen3.gguf", "npu model": "a.rkllm"}
    assert any("copy: another folder holds a Qwen3.gguf" in warning for warning in folders.warnings)
    assert any("npu model holds 2 models; a.rkllm is called" in warning for warning in folders.warnings)


def test_a_folder_that_is_renamed_renames_its_model(tmp_path: Path) -> None:
    _model(tmp_path, "old", "a.gguf")
    (tmp_path / "old").rename(tmp_path / "new")
    assert read_models_dir(tmp_path).files == {"new": "a.gguf"}


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    folders = read_models_dir(tmp_path / "nowhere")
    assert not folders.files
    assert "No such file or directory" in folders.warnings[0]
