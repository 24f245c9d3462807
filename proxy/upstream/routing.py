"""Which upstream a call goes to, and under which model name. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

DEFAULT = "default"
"""The name of the first upstream."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a name for a model stands for; with `upstream` empty, the upstream that lists the model."""

    model: str
    upstream: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """What an upstream shows: the ids that it lists, and the file names of its models, by id."""

    models: Sequence[str] = ()
    files: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes; `model` is the name to send, None: the one that it came with."""

    upstream: str
    model: str | None = None


class Routing:
    """Decides by the name of a model. Names of the operator's come first, then patterns, then what upstreams list."""

    def __init__(
        self, names: Mapping[str, Target], patterns: Mapping[str, Sequence[str]], folders: Mapping[str, str]
    ) -> None:
        """`patterns` are by upstream, the first one first; `folders` gives the file that a folder's name stands for."""
        self.names = names
        self.folders = folders
        self._patterns = patterns
        self.trivial = not names and not folders and len(patterns) == 1
        """Whether every call goes to the same upstream as it came."""

    def route(self, model: str, shown: Mapping[str, Shown]) -> Route:
        """Where a call for `model` goes, given what every upstream shows."""
        target = self.names.get(model)
        if target is not None:
            return Route(target.upstream or self._serving(target.model, shown), target.model)
        file = self.folders.get(model)
        if file is not None and (found := _with_file(file, shown)) is not None:
            return found
        return Route(self._serving(model, shown))

    def friendly(self, upstream: str, model: str, shown: Shown) -> str:
        """The name that people know an upstream's model by."""
        file = (shown.files or {}).get(model)
        for name, folder_file in self.folders.items():
            if file is not None and folder_file == file:
                return name
        for name, target in self.names.items():
            if target.model == model and target.upstream in ("", upstream):
                return name
        return _short(model)

    def _serving(self, model: str, shown: Mapping[str, Shown]) -> str:
        for upstream, patterns in self._patterns.items():
            if any(fnmatchcase(model, pattern) for pattern in patterns):
                return upstream
        for upstream, patterns in self._patterns.items():
            if not patterns and model in shown[upstream].models:
                return upstream
        return next(iter(self._patterns))


def _with_file(file: str, shown: Mapping[str, Shown]) -> Route | None:
    for upstream, one in shown.items():
        for model, its_file in (one.files or {}).items():
            if its_file == file:
                return Route(upstream, model)
    return None


def _short(model: str) -> str:
    """Without the folders and the ending of a file's path, which llama-server shows as the model's id."""
    is_file = model.startswith(("/", "./", "../")) or model.endswith((".gguf", ".rkllm"))
    name = model.rsplit("/", 1)[-1] if is_file else model
    return name.removesuffix(".gguf").removesuffix(".rkllm") or model


class _Named(msgspec.Struct):
    model: Any = None


_named = msgspec.json.Decoder(_Named)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def model_in(body: bytes) -> str:
    """The model that a JSON body names; empty where it names none, or is none."""
    try:
        model = _named.decode(body).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    return model if isinstance(model, str) else ""


def with_fields(body: bytes, fields: Mapping[str, Any]) -> bytes:
    """A JSON object's bytes with these top-level fields set, and all else as it came; other bytes stay as they are."""
    try:
        decoded: dict[str, Any] = dict(_fields.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body
    return msgspec.json.encode(decoded | dict(fields))
