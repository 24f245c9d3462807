"""Settings: defaults < config.yaml < `NEARHIT_*` environment < flags, validated once, frozen ever after."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import yaml

from proxy.settings import (
    FLAGS,
    OPTIONS,
    OTHER_VARIABLES,
    SECRET_FIELDS,
    SECRET_PATHS,
    STRUCTURED,
    Settings,
    SettingsError,
    UpstreamSettings,
)
from proxy.upstream.origin import origin_of


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings: its name for people, and its values by dotted path. `text` values are converted."""

    source: str
    values: Mapping[str, Any]
    text: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """Validated settings, where each value came from, and things a person should know."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def load(file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Loaded:
    """Put the layers together; `flags` are values by dotted path, None where a flag was not given.

    Raises:
        SettingsError: a layer cannot be read, or a value is wrong.
    """
    env_layer, warnings = _environment_layer(environment)
    layers = [
        *([_file_layer(file)] if file is not None else []),
        env_layer,
        Layer("flag", {path: value for path, value in flags.items() if value is not None}, text=True),
    ]
    origins = dict.fromkeys(OPTIONS, "default")
    nested: dict[str, Any] = {}
    for layer in layers:
        for path, value in layer.values.items():
            _check_value(path, value, layer)
            _put(nested, path, value)
            origins[path] = layer.source
    settings = msgspec.convert(nested, Settings, strict=False)
    _check_host(settings, origins)
    _check_url("upstream.url", settings.upstream, origins)
    _check_names(settings, origins)
    _check_clients(settings, origins)
    _check_places(settings, origins)
    return Loaded(settings, origins, tuple(warnings))


def flat(settings: Settings) -> dict[str, Any]:
    """The values of every option by dotted path."""
    return {path: _get(msgspec.to_builtins(settings), path) for path in OPTIONS}


def variable(path: str) -> str:
    """The environment variable of an option."""
    return "NEARHIT_" + path.replace(".", "_").upper()


def annotated_default() -> str:
    """The text of config.yaml as shipped."""
    here = Path(__file__).parent
    # An installed wheel carries it inside the package, a checkout beside it.
    candidates = (here / "config.yaml", here.parent / "config.yaml")
    return next(path for path in candidates if path.is_file()).read_text(encoding="utf-8")


_SECTIONS = tuple(dict.fromkeys(path.partition(".")[0] for path in OPTIONS if "." in path))


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans only (`on` and `off` are texts here, as in llama.cpp's flags), no times, no repeated keys."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Without the times of day (12:30 would be 750) and octal numbers of YAML 1.1.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            mark = node.value[number][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands there twice", mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _file_layer(file: Path) -> Layer:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from error
    try:
        # A SafeLoader with fewer types.
        document = yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{file}: is not YAML: {_yaml_trouble(error)}") from None
    except (ValueError, LookupError, AttributeError, TypeError):
        # What PyYAML's constructors raise of `0x_`, `!!bool abc` and their like.
        raise SettingsError(f"{file}: is not YAML: a number or a tagged value does not fit its type") from None
    if document is None:
        return Layer(str(file), {})
    if not isinstance(document, dict):
        found = type(document).__name__
        raise SettingsError(f"{file}: found {found}, expected sections such as 'upstream:'")
    values: dict[str, Any] = {}
    for path, value in _flatten(document, "", str(file)):
        if path in values:
            raise SettingsError(f"{file}: {path}: stands there twice")
        values[path] = value
    return Layer(str(file), values)


def _yaml_trouble(error: yaml.YAMLError | RecursionError) -> str:
    """Line and problem; the text around it may hold a secret, as may names of tags and aliases."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    place = f"line {mark.line + 1}: " if mark is not None else ""
    return place + re.sub(r" '(?!<)[^']{2,}'", "", problem)


def _flatten(document: Mapping[Any, Any], prefix: str, source: str) -> Iterable[tuple[str, Any]]:
    for name, value in document.items():
        path = f"{prefix}{name}"
        is_section = path in _SECTIONS
        if is_section and isinstance(value, dict):
            yield from _flatten(value, f"{path}.", source)
        elif is_section and value is None:
            continue
        elif is_section:
            # The value may be a secret that lost its name.
            raise SettingsError(f"{source}: {path}: found {type(value).__name__}, expected a section with options")
        elif path not in OPTIONS:
            raise SettingsError(f"{source}: {path}: unknown option{_suggestion(path)}")
        else:
            yield path, value


def _environment_layer(environment: Mapping[str, str]) -> tuple[Layer, list[str]]:
    by_variable = {variable(path): path for path in OPTIONS}
    given = {path: environment[name] for name, path in by_variable.items() if name in environment}
    values = {path: _structured(path, text) if path in STRUCTURED else text for path, text in given.items()}
    # Container platforms set variables of this form for a service called nearhit: no reason to stop.
    unknown = sorted(
        n for n in environment if n.startswith("NEARHIT_") and n not in by_variable and n not in OTHER_VARIABLES
    )
    warnings = [f"{name}: no such option{_suggestion(name, by_variable)}; ignored" for name in unknown]
    return Layer("environment", values, text=True), warnings


def _structured(path: str, text: str) -> Any:
    expected = STRUCTURED[path]
    try:
        return yaml.load(text, Loader=_Loader) or ([] if "list" in expected else {})  # noqa: S506 - as above
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError):
        raise SettingsError(
            f"environment: {variable(path)}: found text that is not YAML, expected {expected}"
        ) from None


def _check_value(path: str, value: Any, layer: Layer) -> None:
    try:
        msgspec.convert(value, OPTIONS[path], strict=not layer.text)
    except msgspec.ValidationError as error:
        raise _wrong(path, value, layer.source, _expected(path, str(error))) from None
    except UnicodeEncodeError:
        raise _wrong(path, value, layer.source, "text in UTF-8") from None


def _expected(path: str, complaint: str) -> str:
    kind = OPTIONS[path]
    if path in STRUCTURED:
        problem, _, place = complaint.partition(" - at `$")
        # What was mistyped may be a secret: those are longer, or do not look like a name.
        problem = re.sub(r"unknown field `(?![a-z_]{1,24}`)[^`]*`", "an unknown field", problem)
        problem = re.sub(r"Invalid enum value '(?!.{0,7}'$).*", "none of the values that there are", problem)
        return f"{STRUCTURED[path]} ({problem}{' at ' + place.rstrip('`') if place else ''})"
    if get_origin(kind) is Literal:
        *most, last = get_args(kind)
        return f"{', '.join(most)} or {last}"
    if kind is bool:
        return "true or false"
    if "matching regex" in complaint:
        return "visible ASCII characters without spaces"
    return complaint.removesuffix(".").removeprefix("Expected ").partition(", got")[0].replace("`", "")


def _check_host(settings: Settings, origins: Mapping[str, str]) -> None:
    host = settings.listen.host
    try:
        usable = host.isprintable() and " " not in host and bool(host.encode("idna"))
    except UnicodeError:
        usable = False
    if not usable:
        raise _wrong("listen.host", host, origins["listen.host"], "a host name or an IP address")


def _check_url(path: str, upstream: UpstreamSettings, origins: Mapping[str, str]) -> None:
    url = upstream.url
    expected = "a URL like http://127.0.0.1:8080"
    try:
        if url.isprintable() and " " not in url:
            origin_of(url)
            return
    except ValueError as error:
        if str(error).startswith("expected "):
            expected = str(error).removeprefix("expected ")
    raise _wrong(path, url, origins[path.partition("[")[0]], expected)


def _check_names(settings: Settings, origins: Mapping[str, str]) -> None:
    """Names of upstreams are unique, and what is named exists."""
    names = ["default"]
    for number, upstream in enumerate(settings.upstreams):
        _check_url(f"upstreams[{number}].url", upstream, origins)
        if upstream.name in names:
            raise _wrong(f"upstreams[{number}].name", upstream.name, origins["upstreams"], "a name of its own")
        names.append(upstream.name)
    expected = f"one of {', '.join(names)}, or nothing"
    for alias, target in settings.models.items():
        if not alias or (isinstance(target, str) and not target):
            raise _wrong(f"models.{alias}", target, origins["models"], "the name of a model")
        if not isinstance(target, str) and target.upstream not in (*names, ""):
            raise _wrong(f"models.{alias}.upstream", target.upstream, origins["models"], expected)
    seen: set[tuple[str, str, str]] = set()
    for number, seed in enumerate(settings.prefixes.seeds):
        path = f"prefixes.seeds[{number}]"
        if seed.upstream not in (*names, ""):
            raise _wrong(f"{path}.upstream", seed.upstream, origins["prefixes.seeds"], expected)
        if (seed.upstream, seed.model, seed.name) in seen:
            raise _wrong(f"{path}.name", seed.name, origins["prefixes.seeds"], "a name of its own among its model's")
        seen.add((seed.upstream, seed.model, seed.name))


def _check_clients(settings: Settings, origins: Mapping[str, str]) -> None:
    """Clients are named where, and only where, they count, and each is told from all others by name and key."""
    clients, are_named = settings.clients, settings.sharing == "clients"
    if are_named and not clients:
        expected = "auto, shared or per-credential, or at least one client in clients"
        raise _wrong("sharing", settings.sharing, origins["sharing"], expected)
    if clients and not are_named:
        raise _wrong("clients", clients, origins["clients"], "none, or the option sharing: clients")
    for number, client in enumerate(clients):
        for field in ("name", "key"):
            if any(getattr(client, field) == getattr(other, field) for other in clients[:number]):
                path = f"clients[{number}].{field}"
                raise _wrong(path, getattr(client, field), origins["clients"], f"a {field} of its own")


def _check_places(settings: Settings, origins: Mapping[str, str]) -> None:
    for path, what in (("data_dir", "folder"), ("cache.file", "file")):
        try:
            place = os.fsencode((settings.data if what == "folder" else settings.database) or "")
        except (RuntimeError, ValueError):
            # No such user's home, or text that no file name can hold.
            place = b"\0"
        if b"\0" in place:
            value = settings.data_dir if what == "folder" else settings.cache.file
            raise _wrong(path, value, origins[path], f"the path of a {what}")


def _wrong(path: str, value: Any, source: str, expected: str) -> SettingsError:
    name = {"environment": variable(path), "flag": FLAGS.get(path, path)}.get(source, path)
    found = _shown(value)
    if path in SECRET_PATHS or path.rpartition(".")[2] in SECRET_FIELDS:
        found = "a secret"
    elif path in STRUCTURED:
        found = type(value).__name__
    elif path.endswith(".url"):
        # People put passwords and keys into URLs.
        found = re.sub(r"[?#].*", "?...", re.sub(r"[^/'\"]*@", "...@", repr(value)))
    elif value is None:
        found = "nothing"
    elif source not in ("environment", "flag"):
        found += f" ({type(value).__name__})"
    return SettingsError(f"{source}: {name}: found {found}, expected {expected}")


def _put(nested: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        nested = nested.setdefault(section, {})
    nested[name] = value


def _get(nested: Mapping[str, Any], path: str) -> Any:
    value: Any = nested
    for name in path.split("."):
        value = value[name]
    return value


def _suggestion(name: str, known: Iterable[str] = ()) -> str:
    same_end = [path for path in OPTIONS if path.endswith(f".{name}")]
    close = same_end or difflib.get_close_matches(name, list(known) or [*OPTIONS, *_SECTIONS], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"
