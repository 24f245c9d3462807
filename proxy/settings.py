"""Every option: its name, type, range and default. config.yaml says what each is for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta, Struct, field

SECRET_PATHS = frozenset({"upstream.api_key", "admin.token"})
"""Options whose values are never printed."""

STRUCTURED: Mapping[str, str] = MappingProxyType(
    {
        "upstream.models": "a list of patterns",
        "upstreams": "a list of mappings",
        "models": "a mapping",
        "prefixes.seeds": "a list of mappings",
        "cache.overrides": "a list of mappings",
        "clients": "a list of mappings",
    }
)
"""Options that are lists or mappings, perhaps with secrets in them; as environment variables, they are YAML."""

SECRET_FIELDS = frozenset({"key", "api_key"})
"""Fields of such options whose values are never printed."""

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
SecondsOrOff = Annotated[float, Meta(ge=0, le=86_400)]
Mode = Literal["off", "exact", "approx"]
Threshold = Annotated[float, Meta(ge=0.5, le=1)]
"""Below 0.5, nearly everything would be shown to the guard."""
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]
"""Goes into a path of a URL, a file name and a metric label."""
Secret = Annotated[str, Meta(pattern=r"\A[!-~]*\Z")]
"""Goes into a header field."""

OTHER_VARIABLES = frozenset({"NEARHIT_WARM_KEY"})
"""Environment variables that are no options."""

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "upstream.url": "--upstream",
        "listen.host": "--host",
        "listen.port": "--port",
        "upstream.kind": "--kind",
        "upstream.slot_dir": "--slot-dir",
        "sharing": "--sharing",
        "cache.mode": "--cache-mode",
        "cache.threshold": "--cache-threshold",
        "cache.persist": "--cache-persist",
        "cache.file": "--cache-file",
        "cache.max_entries": "--cache-max",
        "cache.ttl_hours": "--cache-ttl-hours",
        "data_dir": "--data-dir",
        "log.format": "--log-format",
        "log.level": "--log-level",
    }
)
"""The flag of an option, where it has one."""


class SettingsError(Exception):
    """The configuration cannot be used; the message names the field, what was found and what was expected."""


class _Section(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Listen(_Section, frozen=True):
    """`listen`."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8090


class UpstreamSettings(_Section, frozen=True):
    """`upstream`."""

    url: Annotated[str, Meta(min_length=1)] = "http://127.0.0.1:8080"
    kind: Literal["auto", "llamacpp", "rockchipllama", "rkllama", "rkllm_flask", "openai"] = "auto"
    api_key: Secret = ""
    epoch: str = ""
    cached: Literal["auto", "on", "off"] = "auto"
    poll_s: Annotated[float, Meta(ge=0.05, le=3600)] = 5.0
    canary_s: SecondsOrOff = 3600.0
    connect_timeout_s: Seconds = 10.0
    read_timeout_s: SecondsOrOff = 0.0
    on_disconnect: Literal["auto", "cancel", "drain"] = "auto"
    max_concurrency: Annotated[int, Meta(ge=0, le=10_000)] = 0
    max_waiting: Annotated[int, Meta(ge=0, le=100_000)] = 100
    queue_timeout_s: Seconds = 300.0
    busy_retry_s: SecondsOrOff = 30.0
    slot_dir: str = ""
    models: list[str] = field(default_factory=list)


class MoreUpstream(UpstreamSettings, frozen=True, kw_only=True):
    """One of `upstreams`: another server, with a name and options as under `upstream`."""

    name: Name
    url: Annotated[str, Meta(min_length=1)]


class ModelTarget(_Section, frozen=True):
    """What a name of `models` stands for: a model, and the upstream that has it; empty means the first."""

    model: Annotated[str, Meta(min_length=1)]
    upstream: str = ""


class Seed(_Section, frozen=True):
    """One of `prefixes.seeds`: a file with a system prompt, for a model of an upstream; empty means the first."""

    name: Name
    file: Annotated[str, Meta(min_length=1)]
    model: str = ""
    upstream: str = ""


class PrefixSettings(_Section, frozen=True):
    """`prefixes`."""

    mode: Literal["on", "off"] = "on"
    seeds: list[Seed] = field(default_factory=list)
    learn_after: Annotated[int, Meta(ge=0, le=1_000_000)] = 3
    max_bytes: Annotated[int, Meta(ge=0)] = 4_294_967_296
    ring: Annotated[int, Meta(ge=0, le=10_000)] = 16
    seed_idle_s: SecondsOrOff = 60.0
    seed_timeout_s: Seconds = 900.0
    ready_timeout_s: SecondsOrOff = 300.0


class ClientSettings(_Section, frozen=True, kw_only=True):
    """One of `clients`: who may use this nearhit, and what is its own. An empty namespace is the client's name."""

    name: Name
    key: Annotated[str, Meta(min_length=8, pattern=r"\A[!-~]*\Z")]
    namespace: Annotated[str, Meta(max_length=256)] = ""
    rights: list[Literal["read-only", "no-store", "admin"]] = field(default_factory=list)
    max_concurrency: Annotated[int, Meta(ge=0, le=10_000)] = 0
    requests_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class Override(_Section, frozen=True):
    """One of `cache.overrides`: what holds for the models and the client that it names. None leaves it as it is."""

    model: str = "*"
    key: Secret = ""
    mode: Mode | None = None
    threshold: Threshold | None = None
    shadow: bool | None = None
    ttl_hours: Annotated[float, Meta(gt=0, le=87_600)] | None = None


class CacheSettings(_Section, frozen=True):
    """`cache`."""

    mode: Mode = "approx"
    threshold: Threshold = 0.6
    shadow: bool = False
    overrides: list[Override] = field(default_factory=list)
    persist: Literal["on", "off"] = "on"
    file: str = ""
    ttl_hours: Annotated[float, Meta(gt=0, le=87_600)] = 72.0
    max_ttl_hours: Annotated[float, Meta(gt=0, le=87_600)] = 720.0
    volatile_ttl_s: Annotated[float, Meta(ge=0, le=31_536_000)] = 60.0
    store_words: Literal["full", "digest"] = "full"
    secure_delete: bool = False
    max_entries: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 10_000
    max_bytes: Annotated[int, Meta(ge=1_048_576)] = 1_073_741_824
    top_k: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 20
    max_answer_bytes: Annotated[int, Meta(ge=1024, le=1_073_741_824)] = 4_194_304
    hot_bytes: Annotated[int, Meta(ge=0)] = 16_777_216
    sampled: Literal["cache", "exact", "bypass"] = "cache"
    retry_window_s: SecondsOrOff = 0.0
    variants: Annotated[int, Meta(ge=1, le=100)] = 1
    stale_if_error_hours: Annotated[float, Meta(ge=0, le=87_600)] = 24.0
    stale_while_revalidate_s: Annotated[float, Meta(ge=0, le=31_536_000)] = 0.0
    join_timeout_s: SecondsOrOff = 600.0
    join_failures: Literal["share", "retry"] = "share"
    leases: Literal["auto", "on", "off"] = "auto"
    replay_tokens_per_second: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    flush_s: Annotated[float, Meta(ge=0.01, le=60)] = 0.2


class Limits(_Section, frozen=True):
    """`limits`."""

    max_request_bytes: Annotated[int, Meta(ge=1024)] = 67_108_864
    request_timeout_s: Seconds = 60.0
    shutdown_s: SecondsOrOff = 30.0


class Admin(_Section, frozen=True):
    """`admin`."""

    token: Secret = ""


class Log(_Section, frozen=True):
    """`log`."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class Settings(_Section, frozen=True):
    """Every option; config.yaml says what each is for."""

    listen: Listen = field(default_factory=Listen)
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    upstreams: list[MoreUpstream] = field(default_factory=list)
    models: dict[str, str | ModelTarget] = field(default_factory=dict)
    models_dir: str = ""
    prefixes: PrefixSettings = field(default_factory=PrefixSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    sharing: Literal["auto", "shared", "per-credential", "clients"] = "auto"
    clients: list[ClientSettings] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)
    admin: Admin = field(default_factory=Admin)
    log: Log = field(default_factory=Log)
    data_dir: str = ""

    @property
    def data(self) -> Path:
        """The data directory: as configured, else the user's (XDG base directory specification)."""
        if self.data_dir:
            return Path(self.data_dir).expanduser()
        home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
        return Path(home) / "nearhit"

    @property
    def database(self) -> Path | None:
        """The database file, or None where answers stay in memory."""
        if self.cache.persist == "off":
            return None
        return Path(self.cache.file).expanduser() if self.cache.file else self.data / "nearhit.db"


def _options(section: type[Struct], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(section, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, _Section):
            found.update(_options(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = kind
    return found


OPTIONS: Mapping[str, Any] = _options(Settings)
"""The type of every option by its dotted path, in the order of config.yaml."""
