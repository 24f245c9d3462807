"""The files in deploy/ fit the program: its options, ports, metrics and time limits."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import socket
import sys
import tomllib
from configparser import RawConfigParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from click.testing import CliRunner

from proxy.cli import main
from proxy.config import load, variable
from proxy.settings import OPTIONS, Settings
from proxy.web.app import make_app
from proxy.web.metrics import Metrics
from tests.conftest import Proxy

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HERE_ONLY = {".gitignore", *(DEPLOY / ".gitignore").read_text(encoding="utf-8").splitlines()}
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file() and path.name not in HERE_ONLY)
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
DEFAULTS = Settings()
VARIABLES = {variable(path) for path in OPTIONS}
ROUTES = {route.resource.canonical for route in make_app(DEFAULTS).router.routes() if route.resource is not None}


def _read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def _yaml(name: str) -> Any:
    return yaml.safe_load(_read(name))


COMPOSE = _yaml("compose.yaml")
SERVICES = COMPOSE["services"]


def _dockerfile() -> list[tuple[str, str]]:
    """The instructions with their arguments, comments and continued lines undone."""
    text = re.sub(r"(?m)^#.*\n", "", _read("Dockerfile")).replace("\\\n", " ")
    return [
        (name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def _arguments(instruction: str) -> list[str]:
    return [rest for name, rest in _dockerfile() if name == instruction]


def _environment_of_image() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in _arguments("ENV") for pair in shlex.split(rest))


def _unit() -> RawConfigParser:
    # A key may come twice: what is asked here does not.
    parser = RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys have capitals
    parser.read_string(_read("nearhit.service"))
    return parser


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)?", text)
    assert match, text
    return int(match[1]) * (60 if match[2] == "m" else 1)


@pytest.mark.parametrize("path", [*FILES, ROOT / "docs" / "deploy.md"], ids=lambda path: path.name)
def test_every_variable_named_is_an_option(path: Path) -> None:
    assert set(re.findall(r"\bNEARHIT_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))) <= VARIABLES


def test_every_file_is_told_of() -> None:
    assert [path.name for path in FILES if f"deploy/{path.name}" not in PAGE] == []


def test_image_and_compose_give_a_configuration_that_is_accepted() -> None:
    given = _environment_of_image() | SERVICES["nearhit"]["environment"] | {"NEARHIT_ADMIN_TOKEN": "made-up"}
    settings = load(None, {name: value for name, value in given.items() if name in VARIABLES}, {}).settings
    assert settings.upstream.url == "http://llama-server:8080"
    assert (settings.listen.host, settings.listen.port) == ("0.0.0.0", DEFAULTS.listen.port)
    assert settings.data_dir in json.loads(_arguments("VOLUME")[0])


def test_compose_does_not_start_without_an_admin_token() -> None:
    assert re.match(r"\$\{NEARHIT_ADMIN_TOKEN:\?[^}]+\}$", SERVICES["nearhit"]["environment"]["NEARHIT_ADMIN_TOKEN"])
    assert "NEARHIT_ADMIN_TOKEN" not in _environment_of_image()


def test_the_page_tells_what_compose_asks_for() -> None:
    asked = dict(re.findall(r"\$\{([A-Z_]+):([-?])", _read("compose.yaml")))
    assert {name for name in asked if f"| `{name}` |" not in PAGE} == set()
    required = {name for name, kind in asked.items() if kind == "?"}
    assert set(re.findall(r"\| `([A-Z_]+)` \| none", PAGE)) == required


def test_compose_publishes_nearhit_and_prometheus_on_this_machine_only() -> None:
    port = DEFAULTS.listen.port
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"nearhit": [f"${{LISTEN_ON:-127.0.0.1}}:{port}:{port}"], "prometheus": ["127.0.0.1:9090:9090"]}


def test_the_model_server_is_reached_from_inside_only() -> None:
    inside = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert set(SERVICES["llama-server"]["networks"]) == inside
    assert all(inside & set(service["networks"]) for service in SERVICES.values())


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert not service.get("privileged")


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_container_writes_outlives_it(name: str) -> None:
    targets = {entry.split(":")[-1] for entry in SERVICES[name]["volumes"] if entry.split(":")[0] in COMPOSE["volumes"]}
    kept = {"nearhit": {"/var/lib/nearhit"}, "prometheus": {"/prometheus"}}
    assert targets == kept.get(name, set())


def test_running_answers_may_end_before_a_kill() -> None:
    longest = DEFAULTS.limits.shutdown_s
    assert _seconds(SERVICES["nearhit"]["stop_grace_period"]) > longest
    assert _seconds(_unit()["Service"]["TimeoutStopSec"]) > longest


def test_the_image_runs_the_program_itself_and_not_as_root() -> None:
    names = [name for name, _ in _dockerfile()]
    assert json.loads(_arguments("ENTRYPOINT")[-1]) == ["nearhit"]
    assert json.loads(_arguments("CMD")[-1]) == ["serve"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", _arguments("USER")[-1])
    # What is done to a volume after its instruction is lost.
    assert names.index("VOLUME") > max(at for at, name in enumerate(names) if name == "RUN")
    assert _arguments("EXPOSE") == [str(DEFAULTS.listen.port)]


HEALTH_CHECK: list[str] = json.loads(_arguments("HEALTHCHECK")[-1].partition("CMD ")[2])


async def _checked(port: int) -> int | None:
    # A proxy that the environment names is not to be asked.
    environment = {"NEARHIT_LISTEN_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    program, *arguments = HEALTH_CHECK
    assert program == "python"
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


async def test_the_health_check_tells_a_nearhit_that_answers_from_none(proxy: Proxy) -> None:
    port = urlsplit(proxy.url).port
    assert port is not None
    assert await _checked(port) == 0
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert await _checked(unused.getsockname()[1]) == 1


def test_the_health_check_asks_the_port_that_is_listened_on() -> None:
    assert _environment_of_image()["NEARHIT_LISTEN_PORT"] == str(DEFAULTS.listen.port)


def test_the_image_has_everything_that_the_wheel_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", "LICENSE", project["project"]["readme"], *wheel["packages"], *wheel["force-include"]}
    copied = [shlex.split(rest)[:-1] for rest in _arguments("COPY") if not rest.startswith("--from")]
    assert needed == {source for sources in copied for source in sources}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert needed == {line.removeprefix("!") for line in ignored if line.startswith("!")}


def test_the_image_has_a_python_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = next(rest.partition("=")[2] for rest in _arguments("ARG") if rest.startswith("PYTHON_VERSION="))
    oldest = project["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, oldest.split(".")))


def test_prometheus_asks_services_that_exist_at_their_ports() -> None:
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in _yaml("prometheus.yml")["scrape_configs"]}
    assert jobs["nearhit"] == [f"nearhit:{DEFAULTS.listen.port}"]
    upstream = SERVICES["llama-server"]["environment"]
    assert jobs["llama-server"] == [f"llama-server:{upstream['LLAMA_ARG_PORT']}"]
    assert "--metrics" in SERVICES["llama-server"]["command"]
    assert set(jobs) <= set(SERVICES)
    assert "/metrics" in ROUTES


def test_prometheus_is_given_the_files_that_it_reads() -> None:
    mounted = dict(entry.split(":")[:2] for entry in SERVICES["prometheus"]["volumes"] if entry.startswith("./"))
    assert {Path(source).name for source in mounted} == {"prometheus.yml", *_yaml("prometheus.yml")["rule_files"]}
    assert all((DEPLOY / source).is_file() for source in mounted)
    assert f"--config.file={mounted['./prometheus.yml']}" in SERVICES["prometheus"]["command"]


def test_alerts_watch_metrics_that_exist() -> None:
    metrics = Metrics()
    known = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    rules = [rule for group in _yaml("alerts.yml")["groups"] for rule in group["rules"]]
    for rule in rules:
        named = set(re.findall(r"nearhit_\w+", rule["expr"] + rule["annotations"]["description"]))
        assert named <= known, rule["alert"]
        jobs = set(re.findall(r'job="([^"]+)"', rule["expr"]))
        assert jobs <= {job["job_name"] for job in _yaml("prometheus.yml")["scrape_configs"]}
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 4


def test_the_first_storage_error_is_alerted_on() -> None:
    """Its series begins with that error, which increase() does not see."""
    shown = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    assert "nearhit_storage_errors_total" not in shown
    (rule,) = [r for g in _yaml("alerts.yml")["groups"] for r in g["rules"] if r["alert"] == "NearhitStorageErrors"]
    assert "nearhit_storage_errors_total > 0 unless nearhit_storage_errors_total offset" in rule["expr"]


def test_the_unit_starts_a_command_that_exists_with_options_that_exist() -> None:
    program, command, *options = shlex.split(_unit()["Service"]["ExecStart"])
    assert Path(program).name == "nearhit"
    told = CliRunner().invoke(main, [command, "--help"])
    assert told.exit_code == 0
    assert [option for option in options if option.startswith("--") and option.split("=")[0] not in told.output] == []


def test_the_unit_writes_where_it_may() -> None:
    unit = _unit()["Service"]
    folder = unit["StateDirectory"]
    assert unit["ProtectSystem"] == "strict"
    assert unit["WorkingDirectory"] == f"%S/{folder}"
    assert f"Environment=NEARHIT_DATA_DIR=%S/{folder}" in _read("nearhit.service")


def test_the_unit_does_not_begin_again_with_a_configuration_that_cannot_be_used() -> None:
    refused = CliRunner().invoke(main, ["serve", "--cache-mode", "sometimes"])
    assert _unit()["Service"]["RestartPreventExitStatus"] == str(refused.exit_code)
    assert _unit()["Service"]["Restart"] == "on-failure"


def test_the_page_names_the_same_paths_as_the_unit() -> None:
    unit = _unit()["Service"]
    assert unit["EnvironmentFile"].removeprefix("-") in PAGE
    assert shlex.split(unit["ExecStart"])[0].rpartition("/bin/")[0] in PAGE
