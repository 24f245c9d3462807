"""What exists is written down: options, commands, routes, metrics, reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy.cache.policy import Bypass, Drop, Miss
from proxy.cli import main
from proxy.settings import OPTIONS, Settings
from proxy.web.app import make_app
from proxy.web.metrics import Metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
DOCS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG = (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines()

METRICS = sorted(
    {family.name + ("_total" if family.type == "counter" else "") for family in Metrics().registry.collect()}
)
ROUTES = sorted(
    {
        route.resource.canonical
        for route in make_app(Settings()).router.routes()
        if route.resource is not None
        and route.resource.canonical.startswith(("/-/", "/metrics"))
        and "{" not in route.resource.canonical
    }
)
REASONS = sorted({reason.value for kind in (Bypass, Miss, Drop) for reason in kind})


def _comments() -> dict[str, str]:
    """The comment above each option of config.yaml, by the option's path."""
    found: dict[str, str] = {}
    section, comment = "", ""
    for line in CONFIG:
        match = re.fullmatch(r"( *)(\w+):(.*)", line)
        if line.lstrip().startswith("#"):
            comment += line.lstrip("# ")
            continue
        if match and not match[3]:
            section = match[2]
        elif match:
            found[f"{section}.{match[2]}" if match[1] else match[2]] = comment
        comment = ""
    return found


@pytest.mark.parametrize("path", OPTIONS)
def test_every_option_is_explained_in_the_configuration_file(path: str) -> None:
    assert len(_comments().get(path, "")) >= len("text | json")


def test_the_configuration_file_explains_nothing_that_does_not_exist() -> None:
    assert list(_comments()) == list(OPTIONS)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_is_mentioned(command: str) -> None:
    assert re.search(rf"\bnearhit {command}\b", README + DOCS) or (command == "demo" and "make demo" in README)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_mentioned(name: str) -> None:
    assert _named(name)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_mentioned(route: str) -> None:
    assert _named(route)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_explained(reason: str) -> None:
    assert f"`{reason}`" in DOCS


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_pages_name_no_option_command_or_metric_that_does_not_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sections = {path.partition(".")[0] for path in OPTIONS if "." in path}
    options = {f"{a}.{b}" for a, b in re.findall(r"`([a-z]+)\.([a-z_]+)(?:: [^`]*)?`", text) if a in sections}
    stats = {name for name in options if name.startswith("cache.")} & _stats_names()
    assert options - stats <= set(OPTIONS)
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    assert set(re.findall(r"(?m)^[`$ ]*nearhit ([a-z]+)\b", code)) <= set(main.commands)


def _stats_names() -> set[str]:
    beside = {"cache.enabled", "cache.size", "cache.bytes", "cache.max_entries", "cache.max_bytes", "cache.trouble"}
    return beside | set(Metrics().summary())


def _named(name: str) -> bool:
    return re.search(rf"(?<![\w/]){re.escape(name)}(?![\w/])", DOCS) is not None
