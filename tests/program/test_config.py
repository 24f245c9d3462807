"""Settings: where they come from, who wins, and what a person hears of a wrong one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.config import annotated_default, flat, load, variable
from proxy.settings import OPTIONS, SECRET_PATHS, ModelTarget, Settings, SettingsError

DEFAULT_FILE = Path(__file__).parents[2] / "config.yaml"


class InFile:
    """Loads settings from a file of the given text, called config.yaml."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.yaml"

    def write(self, content: str | bytes) -> Path:
        self.path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return self.path

    def load(self, content: str | bytes) -> dict[str, Any]:
        return flat(load(self.write(content), {}, {}).settings)

    def refusal(self, content: str | bytes) -> str:
        message = refusal(self.write(content))
        assert str(self.path) in message
        return message.replace(str(self.path), "config.yaml")


@pytest.fixture
def config(tmp_path: Path) -> InFile:
    return InFile(tmp_path)


def refusal(
    file: Path | None = None, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> str:
    with pytest.raises(SettingsError) as caught:
        load(file, environment or {}, flags or {})
    return str(caught.value)


# The shipped file


def _paths(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        nested = isinstance(value, dict) and prefix + name not in OPTIONS
        found.update(_paths(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return found


def test_the_shipped_file_holds_every_option_with_its_default_in_the_same_order() -> None:
    shipped = _paths(yaml.safe_load(DEFAULT_FILE.read_text(encoding="utf-8")))
    assert list(shipped.items()) == list(flat(Settings()).items())


def test_the_shipped_file_loads_as_the_defaults() -> None:
    loaded = load(DEFAULT_FILE, {}, {})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {str(DEFAULT_FILE)}


def test_the_printed_default_is_the_shipped_file() -> None:
    assert annotated_default() == DEFAULT_FILE.read_text(encoding="utf-8")


def test_every_default_is_valid_as_its_own_type(config: InFile) -> None:
    assert config.load(json.dumps(flat(Settings()))) == flat(Settings())


# Unknown names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lisen: {port: 1}", "config.yaml: lisen: unknown option; did you mean listen?"),
        ("listen: {prot: 1}", "config.yaml: listen.prot: unknown option; did you mean listen.port?"),
        ("cache: {mod: exact}", "config.yaml: cache.mod: unknown option; did you mean cache.mode?"),
        ("shareing: auto", "config.yaml: shareing: unknown option; did you mean sharing?"),
        ("port: 8090", "config.yaml: port: unknown option; did you mean listen.port?"),
        ("xyzzy: 1", "config.yaml: xyzzy: unknown option"),
        ("1: 2", "config.yaml: 1: unknown option"),
        ("null: 2", "config.yaml: None: unknown option"),
    ],
)
def test_an_unknown_name_is_told_with_its_path_and_the_nearest_known(config: InFile, text: str, message: str) -> None:
    assert config.refusal(text) == message


# Wrong values, as a person reads it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listen: {port: abc}", "config.yaml: listen.port: found 'abc' (str), expected int"),
        ("listen: {port: '8090'}", "config.yaml: listen.port: found '8090' (str), expected int"),
        ("listen: {port: 70000}", "config.yaml: listen.port: found 70000 (int), expected int <= 65535"),
        ("listen: {port: -1}", "config.yaml: listen.port: found -1 (int), expected int >= 0"),
        ("listen: {port: 1.5}", "config.yaml: listen.port: found 1.5 (float), expected int"),
        ("listen: {port: true}", "config.yaml: listen.port: found True (bool), expected int"),
        ("listen: {port: }", "config.yaml: listen.port: found nothing, expected int"),
        ("listen: {port: [1]}", "config.yaml: listen.port: found [1] (list), expected int"),
        ("listen: {host: ''}", "config.yaml: listen.host: found '' (str), expected str of length >= 1"),
        ("listen: 5", "config.yaml: listen: found int, expected a section with options"),
        ("cache: {ttl_hours: .nan}", "config.yaml: cache.ttl_hours: found nan (float), expected float > 0.0"),
        ("cache: {ttl_hours: .inf}", "config.yaml: cache.ttl_hours: found inf (float), expected float <= 87600.0"),
        ("cache: {mode: near}", "config.yaml: cache.mode: found 'near' (str), expected off, exact or approx"),
        ("cache: {persist: yes}", "config.yaml: cache.persist: found 'yes' (str), expected on or off"),
        ("cache: {persist: false}", "config.yaml: cache.persist: found False (bool), expected on or off"),
        ("sharing: all", "config.yaml: sharing: found 'all' (str), expected auto, shared, per-credential or clients"),
        (
            "sharing: clients",
            "config.yaml: sharing: found 'clients' (str), expected auto, shared or per-credential, or at least one "
            "client in clients",
        ),
        ("log: {access: yes}", "config.yaml: log.access: found 'yes' (str), expected true or false"),
        ("- 1", "config.yaml: found list, expected sections such as 'upstream:'"),
        ("just text", "config.yaml: found str, expected sections such as 'upstream:'"),
        ('data_dir: "a\\0b"', "config.yaml: data_dir: found 'a\\x00b' (str), expected the path of a folder"),
        (
            "data_dir: ~nosuchuser/x",
            "config.yaml: data_dir: found '~nosuchuser/x' (str), expected the path of a folder",
        ),
        (
            "cache: {file: ~nosuchuser/x}",
            "config.yaml: cache.file: found '~nosuchuser/x' (str), expected the path of a file",
        ),
    ],
)
def test_a_wrong_value_in_the_file_is_told_with_what_was_found_and_expected(
    config: InFile, text: str, message: str
) -> None:
    assert config.refusal(text) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NEARHIT_LISTEN_PORT", "abc", "environment: NEARHIT_LISTEN_PORT: found 'abc', expected int"),
        ("NEARHIT_LISTEN_PORT", "99999", "environment: NEARHIT_LISTEN_PORT: found '99999', expected int <= 65535"),
        ("NEARHIT_LISTEN_PORT", "", "environment: NEARHIT_LISTEN_PORT: found '', expected int"),
        ("NEARHIT_LOG_ACCESS", "maybe", "environment: NEARHIT_LOG_ACCESS: found 'maybe', expected true or false"),
        ("NEARHIT_CACHE_PERSIST", "yes", "environment: NEARHIT_CACHE_PERSIST: found 'yes', expected on or off"),
        (
            "NEARHIT_UPSTREAM_URL",
            "localhost:8080",
            "environment: NEARHIT_UPSTREAM_URL: found 'localhost:8080', expected a URL like http://127.0.0.1:8080",
        ),
    ],
)
def test_a_wrong_value_in_the_environment_is_told_with_the_name_of_the_variable(
    name: str, value: str, message: str
) -> None:
    assert refusal(environment={name: value}) == message


def test_a_long_wrong_value_is_shortened(config: InFile) -> None:
    message = config.refusal(f"sharing: {'x' * 10_000}")
    assert len(message) < 200


def test_overrides_are_a_list_of_mappings(config: InFile) -> None:
    text = "cache: {overrides: [{model: 'coder-*', mode: exact}, {key: k, threshold: 0.9, shadow: true}]}"
    first, second = load(config.write(text), {}, {}).settings.cache.overrides
    assert (first.model, first.mode, first.threshold) == ("coder-*", "exact", None)
    assert (second.model, second.key, second.threshold, second.shadow) == ("*", "k", 0.9, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("approx", "found str, expected a list of mappings (Expected `array`, got `str`)"),
        ("[{modl: x}]", "found list, expected a list of mappings (Object contains unknown field `modl` at [0])"),
        ("[{threshold: 0.4}]", "found list, expected a list of mappings (Expected `float` >= 0.5 at [0].threshold)"),
        ("[{key: 'top secret'}]", "found list, expected a list of mappings (Expected `str` matching regex"),
    ],
)
def test_wrong_overrides_are_told_without_what_is_in_them(config: InFile, text: str, problem: str) -> None:
    refusal = config.refusal(f"cache: {{overrides: {text}}}")
    assert refusal.startswith(f"config.yaml: cache.overrides: {problem}")
    assert "top" not in refusal


def test_overrides_in_the_environment_are_yaml() -> None:
    environment = {"NEARHIT_CACHE_OVERRIDES": "[{model: m, mode: exact}]"}
    assert load(None, environment, {}).settings.cache.overrides[0].mode == "exact"
    with pytest.raises(SettingsError, match="NEARHIT_CACHE_OVERRIDES: found text that is not YAML"):
        load(None, {"NEARHIT_CACHE_OVERRIDES": "[{"}, {})


# The file itself


@pytest.mark.parametrize("text", ["", "# nothing\n", "listen:\n", "listen: {}\n", "---\n", "listen: null"])
def test_a_file_that_says_nothing_changes_nothing(config: InFile, text: str) -> None:
    assert config.load(text) == flat(Settings())


@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        ("sharing: auto\nlog: {}\nsharing: shared\n", 3, "sharing"),
        ("listen:\n  port: 1\n  host: localhost\n  port: 2\n", 4, "port"),
    ],
)
def test_a_repeated_key_is_refused_with_its_line(config: InFile, text: str, line: int, name: str) -> None:
    assert config.refusal(text) == f"config.yaml: is not YAML: line {line}: '{name}' stands there twice"


def test_an_option_written_as_path_and_in_its_section_is_refused(config: InFile) -> None:
    assert config.refusal("cache.mode: 'off'\ncache: {mode: exact}") == "config.yaml: cache.mode: stands there twice"


@pytest.mark.parametrize(
    "text",
    [
        "{{{",
        "? [1, 2]\n: 3",
        "a: &a [*a]",
        "x: !!python/object:os.system 1",
        "listen: {port: 1}\n---\nlisten: {port: 2}",
        "listen: {port: !!float abc}",
        "listen: {port: !!int abc}",
        "listen: {port: !!timestamp abc}",
        "listen: {port: !!bool abc}",
        f"listen: {{port: {'9' * 5000}}}",
        "[" * 5000,
        "\x07",
    ],
)
def test_what_is_not_yaml_is_refused(config: InFile, text: str) -> None:
    assert config.refusal(text).startswith("config.yaml: is not YAML: ")


def test_a_file_that_is_not_utf8_is_refused(config: InFile) -> None:
    assert config.refusal(b"sharing: \xff").startswith("config.yaml: cannot be read: ")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read: ")
    assert refusal(tmp_path / "missing").startswith(f"{tmp_path / 'missing'}: cannot be read: ")


@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_are_texts_without_quotes(config: InFile, word: str) -> None:
    assert config.load(f"cache: {{persist: {word}}}")["cache.persist"] == word


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "2020-01-01", "12:30"])
def test_words_that_older_yaml_would_convert_stay_texts(config: InFile, word: str) -> None:
    assert config.load(f"data_dir: {word}")["data_dir"] == word


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "admin: {token: [hunter2]}",
        "admin: hunter2",
        "upstream: hunter2",
        "upstream: {api_key: {a: hunter2}}",
        "admin:\n  token: 'hunter2\n",
        "admin: {token: *hunter2}",
        "admin: {token: !hunter2 1}",
        "admin: {token: hunter2 hunter2}",
        'admin: {token: "hunter2\\n"}',
        "admin: {token: hunter2é}",
        "upstream: {api_key: hunter2 }}",
        "upstream: {url: 'http://me:hunter2@localhost'}",
        "upstream: {url: 'http://localhost/?key=hunter2'}",
        "upstream: {url: 'http://me:hunter2@localhost:port'}",
        "upstream: {url: 'ftp://me:hunter2@localhost'}",
        "upstream: {url: [hunter2@x]}",
        "{sharing: clients, clients: [{name: a, key:hunter2hunter2}]}",
        "{sharing: clients, clients: [{name: a, key: hunter2hunter2, rights: [hunter2hunter2]}]}",
    ],
)
def test_no_error_shows_a_secret(config: InFile, text: str) -> None:
    assert "hunter2" not in config.refusal(text)


def test_a_secret_that_no_header_can_carry_is_refused(config: InFile) -> None:
    message = config.refusal('admin: {token: "two words"}')
    assert message == "config.yaml: admin.token: found a secret, expected visible ASCII characters without spaces"


@pytest.mark.parametrize("value", ["0123", "1e5", "null", "true", "12345678901234567890", "[1]", "0x10"])
@pytest.mark.parametrize("path", sorted(SECRET_PATHS))
def test_a_secret_in_the_environment_stays_the_text_that_it_is(path: str, value: str) -> None:
    assert flat(load(None, {variable(path): value}, {}).settings)[path] == value


# Upstream URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8080", "expected a URL like http://127.0.0.1:8080"),
        ("127.0.0.1", "expected a URL like http://127.0.0.1:8080"),
        ("ftp://localhost", "expected a URL like http://127.0.0.1:8080"),
        ("http://", "expected a URL like http://127.0.0.1:8080"),
        ("http://a b", "expected a URL like http://127.0.0.1:8080"),
        ("http://localhost\n", "expected a URL like http://127.0.0.1:8080"),
        ("http://[::1", "expected a URL like http://127.0.0.1:8080"),
        ("http://localhost:port", "expected a URL like http://127.0.0.1:8080"),
        ("http://localhost:99999", "expected a URL like http://127.0.0.1:8080"),
        ("http://localhost?a=1", "expected a URL without query and fragment"),
        ("http://localhost#a", "expected a URL without query and fragment"),
        ("http://me@localhost", "expected a URL without credentials; use upstream.api_key"),
        ("http://me:pw@localhost", "expected a URL without credentials; use upstream.api_key"),
    ],
)
def test_a_bad_upstream_url_is_refused(url: str, expected: str) -> None:
    message = refusal(flags={"upstream.url": url})
    assert message.startswith("flag: --upstream: found ")
    assert message.endswith(expected)


@pytest.mark.parametrize("url", ["http://localhost", "https://x.example/v1/", "HTTP://X:1/a/b", "http://[::1]:8080/v1"])
def test_a_good_upstream_url_is_kept_as_written(url: str) -> None:
    assert load(None, {}, {"upstream.url": url}).settings.upstream.url == url


# Order


def test_flags_win_over_the_environment_over_the_file_over_defaults(config: InFile) -> None:
    file = config.write("listen: {port: 1, host: a.example}\ncache: {ttl_hours: 1}\nlog: {level: debug}")
    environment = {"NEARHIT_LISTEN_PORT": "2", "NEARHIT_CACHE_TTL_HOURS": "2", "NEARHIT_SHARING": "shared"}
    loaded = load(file, environment, {"listen.port": "3", "sharing": None})
    assert loaded.settings.listen.port == 3
    assert loaded.settings.cache.ttl_hours == 2
    assert loaded.settings.listen.host == "a.example"
    assert loaded.settings.sharing == "shared"
    origins = {path: origin for path, origin in loaded.origins.items() if origin != "default"}
    assert origins == {
        "listen.host": str(file),
        "listen.port": "flag",
        "cache.ttl_hours": "environment",
        "sharing": "environment",
        "log.level": str(file),
    }


def test_a_wrong_value_is_refused_even_where_a_higher_layer_wins(config: InFile) -> None:
    assert "listen.port" in refusal(config.write("listen: {port: abc}"), {}, {"listen.port": "1"})


def test_the_url_that_wins_is_the_one_that_counts() -> None:
    loaded = load(None, {"NEARHIT_UPSTREAM_URL": "http://a.example"}, {"upstream.url": "http://b.example"})
    assert loaded.settings.upstream.url == "http://b.example"


def test_unknown_variables_warn_and_do_not_stop() -> None:
    environment = {
        "NEARHIT_CACHE_TTL_HOUR": "1",
        "NEARHIT_PORT_8090_TCP_ADDR": "10.0.0.1",
        "NEARHIT_ADMIN_TOKN": "hunter2",
        "HOME": "/x",
    }
    loaded = load(None, environment, {})
    assert loaded.settings == Settings()
    assert loaded.warnings == (
        "NEARHIT_ADMIN_TOKN: no such option; did you mean NEARHIT_ADMIN_TOKEN?; ignored",
        "NEARHIT_CACHE_TTL_HOUR: no such option; did you mean NEARHIT_CACHE_TTL_HOURS?; ignored",
        "NEARHIT_PORT_8090_TCP_ADDR: no such option; ignored",
    )


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("True", True), ("0", False), ("1", True)]
)
def test_yes_and_no_in_the_environment(text: str, value: bool) -> None:
    assert load(None, {"NEARHIT_LOG_ACCESS": text}, {}).settings.log.access is value


# Places


def test_the_database_is_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None, {}, {}).settings.database == tmp_path / "xdg" / "nearhit" / "nearhit.db"
    assert load(None, {}, {"data_dir": "~/d"}).settings.database == tmp_path / "d" / "nearhit.db"
    assert load(None, {}, {"data_dir": "/d", "cache.file": "~/f.db"}).settings.database == tmp_path / "f.db"
    assert load(None, {}, {"cache.persist": "off", "cache.file": "/f.db"}).settings.database is None
    monkeypatch.delenv("XDG_DATA_HOME")
    assert load(None, {}, {}).settings.data == tmp_path / ".local" / "share" / "nearhit"


# Anything at all

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.dates()
    | st.sampled_from(["on", "off", "", "~", "~x", "\0", "9" * 5000, "1e999", "http://[", "http://x:y", "\ud800"])
)


@given(path=st.sampled_from(sorted(OPTIONS)), value=SCALARS)
def test_any_flag_gives_settings_or_a_settings_error(path: str, value: object) -> None:
    try:
        loaded = load(None, {}, {path: value})
    except SettingsError as error:
        assert str(error).startswith("flag: ")  # noqa: PT017 - either way is right
    else:
        assert loaded.origins[path] == ("default" if value is None else "flag")


@given(path=st.sampled_from(sorted(OPTIONS)), value=st.text() | st.integers().map(str) | st.floats().map(str))
def test_any_variable_gives_settings_or_a_settings_error(path: str, value: str) -> None:
    try:
        loaded = load(None, {variable(path): value}, {})
    except SettingsError as error:
        assert str(error).startswith(f"environment: {variable(path)}: found ")  # noqa: PT017 - either way is right
    else:
        assert loaded.origins[path] == "environment"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(path=st.sampled_from(sorted(OPTIONS)), value=SCALARS, nested=st.booleans())
def test_any_scalar_in_the_file_gives_settings_or_a_settings_error(
    config: InFile, path: str, value: object, nested: bool
) -> None:
    *section, name = path.split(".")
    document = {section[0]: {name: value}} if section and nested else {path: value}
    try:
        config.load(yaml.dump(document))
    except SettingsError as error:
        assert str(config.path) in str(error)  # noqa: PT017 - either way is right


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary() | st.text(alphabet="abc:{}[]'\"&*!?|>-% \n\t0x_.~,", max_size=60).map(os.fsencode))
def test_any_bytes_give_settings_or_a_settings_error(config: InFile, content: bytes) -> None:
    try:
        config.load(content)
    except SettingsError as error:
        assert str(config.path) in str(error)  # noqa: PT017 - either way is right


def test_more_upstreams_have_names_urls_and_the_options_of_the_first(config: InFile) -> None:
    text = "upstreams: [{name: npu, url: 'http://127.0.0.1:8021', kind: rockchipllama, models: ['qwen*']}]"
    (npu,) = load(config.write(text), {}, {}).settings.upstreams
    assert (npu.name, npu.kind, npu.models, npu.poll_s) == ("npu", "rockchipllama", ["qwen*"], 5.0)


def test_names_for_models_stand_for_a_model_or_a_model_of_an_upstream(config: InFile) -> None:
    text = "upstreams: [{name: npu, url: 'http://b'}]\nmodels: {a: qwen3, b: {model: q, upstream: npu}}"
    models = load(config.write(text), {}, {}).settings.models
    assert models["a"] == "qwen3"
    assert models["b"] == ModelTarget("q", "npu")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "upstreams: [{name: default, url: 'http://b'}]",
            "upstreams[0].name: found 'default' (str), expected a name of",
        ),
        ("upstreams: [{name: 'a b', url: 'http://b'}]", "upstreams: found list, expected a list of mappings"),
        ("upstreams: [{url: 'http://b'}]", "upstreams: found list, expected a list of mappings"),
        ("upstreams: [{name: b, url: 'ftp://b'}]", "upstreams[0].url: found 'ftp://b', expected a URL"),
        (
            "models: {a: {model: b, upstream: nobody}}",
            "models.a.upstream: found 'nobody' (str), expected one of default",
        ),
        ("models: {a: ''}", "models.a: found '' (str), expected the name of a model"),
        ("models: [a]", "models: found list, expected a mapping"),
        ("prefixes: {seeds: [{name: a, file: b, upstream: c}]}", "prefixes.seeds[0].upstream: found 'c' (str)"),
        ("prefixes: {seeds: [{name: a, file: b}, {name: a, file: c}]}", "prefixes.seeds[1].name: found 'a' (str)"),
        ("prefixes: {seeds: [{name: ../a, file: b}]}", "prefixes.seeds: found list, expected a list of mappings"),
    ],
)
def test_wrong_upstreams_models_and_seeds_are_told(config: InFile, text: str, problem: str) -> None:
    assert problem in config.refusal(text)


def test_lists_and_mappings_in_the_environment_are_yaml() -> None:
    environment = {"NEARHIT_MODELS": "{a: b}", "NEARHIT_UPSTREAM_MODELS": "['qwen*']"}
    settings = load(None, environment, {}).settings
    assert settings.models == {"a": "b"}
    assert settings.upstream.models == ["qwen*"]


# Named clients

ANN = "{name: ann, key: hunter2-of-ann, namespace: home, rights: [read-only, admin], max_concurrency: 2}"


def test_clients_are_a_list_of_mappings(config: InFile) -> None:
    text = f"sharing: clients\nclients: [{ANN}, {{name: bob, key: hunter2-of-bob, requests_per_minute: 9}}]"
    ann, bob = load(config.write(text), {}, {}).settings.clients
    assert (ann.name, ann.namespace, ann.rights, ann.max_concurrency) == ("ann", "home", ["read-only", "admin"], 2)
    assert (bob.namespace, bob.rights, bob.max_concurrency, bob.requests_per_minute) == ("", [], 0, 9)


def test_clients_in_the_environment_are_yaml() -> None:
    environment = {"NEARHIT_SHARING": "clients", "NEARHIT_CLIENTS": f"[{ANN}]"}
    assert load(None, environment, {}).settings.clients[0].name == "ann"


@pytest.mark.parametrize(
    ("clients", "problem"),
    [
        (f"[{ANN}, {ANN}]", "clients[1].name: found 'ann' (str), expected a name of its own"),
        (
            f"[{ANN}, {{name: bob, key: hunter2-of-ann}}]",
            "clients[1].key: found a secret, expected a key of its own",
        ),
        ("[{name: ann}]", "clients: found list, expected a list of mappings (Object missing required field `key`"),
        ("[{key: hunter2-of-ann}]", "clients: found list, expected a list of mappings (Object missing required field"),
        ("[{name: ann, key: hunter2}]", "clients: found list, expected a list of mappings (Expected `str` of length"),
        (
            "[{name: ann, key: hunter2 of ann}]",
            "clients: found list, expected a list of mappings (Expected `str` match",
        ),
        ("[{name: 'a n', key: hunter2-of-ann}]", "clients: found list, expected a list of mappings (Expected `str` m"),
        (
            "[{name: ann, key: hunter2-of-ann, rights: [all]}]",
            "clients: found list, expected a list of mappings (Inval",
        ),
        (
            "[{name: ann, key: hunter2-of-ann, right: []}]",
            "clients: found list, expected a list of mappings (Object co",
        ),
        (
            "[{name: ann, key: hunter2-of-ann, max_concurrency: -1}]",
            "clients: found list, expected a list of mappings (Expected `int` >= 0 at [0].max_concurrency)",
        ),
        ("ann", "clients: found str, expected a list of mappings"),
        ("{ann: hunter2}", "clients: found dict, expected a list of mappings"),
    ],
)
def test_wrong_clients_are_told_without_their_keys(config: InFile, clients: str, problem: str) -> None:
    message = config.refusal(f"sharing: clients\nclients: {clients}")
    assert message.startswith(f"config.yaml: {problem}")
    assert "hunter2" not in message


@pytest.mark.parametrize("setting", ["auto", "shared", "per-credential"])
def test_clients_that_would_not_count_are_refused(config: InFile, setting: str) -> None:
    message = config.refusal(f"sharing: {setting}\nclients: [{ANN}]")
    assert message == "config.yaml: clients: found list, expected none, or the option sharing: clients"


def test_no_clients_are_told_where_they_were_left_out() -> None:
    assert refusal(flags={"sharing": "clients"}).startswith("flag: --sharing: found 'clients', expected auto,")
    assert refusal(environment={"NEARHIT_SHARING": "clients"}).startswith("environment: NEARHIT_SHARING: found ")


def test_several_clients_may_have_one_namespace_and_a_namespace_a_clients_name(config: InFile) -> None:
    clients = "[{name: a, key: 12345678}, {name: b, key: '123456789', namespace: a}]"
    assert "expected a list of mappings" in config.refusal(f"sharing: clients\nclients: {clients}")
    clients = clients.replace("12345678}", "'12345678'}")
    assert len(load(config.write(f"sharing: clients\nclients: {clients}"), {}, {}).settings.clients) == 2
