"""The command `nearhit`. The only module that prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from proxy import __version__
from proxy.config import SECRET_PATHS, Loaded, SettingsError, annotated_default, flat, load

EXIT_CONFIG = 2
EXIT_FAILED = 1

_FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--upstream", "upstream.url", {"metavar": "URL", "help": "The LLM server, with or without /v1."}),
    ("--host", "listen.host", {"help": "Address to listen on."}),
    ("--port", "listen.port", {"help": "Port to listen on; 0 takes a free one."}),
    ("--kind", "upstream.kind", {"help": "auto, llamacpp or openai: which kind of server it is."}),
    ("--sharing", "sharing", {"help": "auto, shared or per-credential: who gets whose answers."}),
    ("--cache-mode", "cache.mode", {"help": "off or exact."}),
    ("--cache-persist", "cache.persist", {"help": "on keeps answers in a file, off in memory."}),
    ("--cache-file", "cache.file", {"metavar": "FILE", "help": "The database file."}),
    ("--cache-max", "cache.max_entries", {"help": "Number of answers to keep."}),
    ("--cache-ttl-hours", "cache.ttl_hours", {"help": "Hours for which an answer is served."}),
    ("--data-dir", "data_dir", {"metavar": "DIR", "help": "Where database, token and secret are."}),
    ("--log-format", "log.format", {"help": "text or json."}),
    ("--log-level", "log.level", {"help": "debug, info, warning or error."}),
)

Command = Callable[..., None]


def _with_settings(command: Command) -> Command:
    """Add the flags of settings, in the order in which they are listed."""
    for flag, path, extra in reversed(_FLAGS):
        command = click.option(flag, path.replace(".", "__"), default=None, **extra)(command)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A configuration file; see config.yaml for every option.",
    )(command)


def _load(config_file: Path | None, flags: Mapping[str, Any]) -> Loaded:
    try:
        loaded = load(config_file, os.environ, {name.replace("__", "."): value for name, value in flags.items()})
    except SettingsError as error:
        _stop(str(error), EXIT_CONFIG)
    for warning in loaded.warnings:
        click.echo(f"nearhit: {warning}", err=True)
    return loaded


def _stop(message: str, code: int = EXIT_FAILED) -> NoReturn:
    click.echo(f"nearhit: {message}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nearhit")
def main() -> None:
    """A caching reverse proxy for the LLM servers that people run themselves.

    Start it in front of a server, and point clients at it instead:

        nearhit serve --upstream http://127.0.0.1:8080
    """
    _refuse_shadowed_package()


@main.command()
@_with_settings
def serve(config_file: Path | None, **flags: Any) -> None:
    """Run the proxy.

    Example: nearhit serve --upstream http://127.0.0.1:8080 --port 8090
    """
    loaded = _load(config_file, flags)
    # Imported here: other commands need no server.
    from proxy.serve import serve as run
    from storage.base import StorageRefused

    settings = loaded.settings

    def announce(address: str) -> None:
        click.echo(f"nearhit {__version__} listens on {address}, upstream {settings.upstream.url}", err=True)
        if settings.listen.host not in ("127.0.0.1", "::1", "localhost") and not settings.admin.token:
            click.echo("nearhit: admin.token is not set: /-/stats answers this machine only", err=True)

    try:
        run(settings, announce)
    except StorageRefused as error:
        _stop(str(error), EXIT_CONFIG)
    except OSError as error:
        listen = settings.listen
        _stop(f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}")


@main.command()
@_with_settings
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--default", is_flag=True, help="Print the annotated default, to start a config.yaml from.")
def config(config_file: Path | None, *, as_json: bool, default: bool, **flags: Any) -> None:
    """Print the configuration that is in effect, and where each value comes from.

    Example: nearhit config --config config.yaml
    """
    if default:
        click.echo(annotated_default(), nl=False)
        return
    loaded = _load(config_file, flags)
    rows = [(path, _masked(path, value), loaded.origins[path]) for path, value in flat(loaded.settings).items()]
    if as_json:
        click.echo(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, indent=2))
        return
    table = Table("option", "value", "from", box=None, header_style="bold")
    for path, value, origin in rows:
        table.add_row(path, json.dumps(value), origin if origin != "default" else "[dim]default[/dim]")
    Console(soft_wrap=True).print(table)


@main.command()
@_with_settings
@click.option("--url", default=None, help="Where nearhit listens; taken from the settings if it is not given.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def stats(config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any) -> None:
    """Show what a running nearhit has done.

    Example: nearhit stats --port 8090
    """
    from proxy.ask import AskError, ask

    settings = _load(config_file, flags).settings
    try:
        answer = ask(settings, url, "/-/stats")
    except AskError as error:
        _stop(str(error))
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    table = Table("what", "value", box=None, header_style="bold")
    for name, value in _flattened(answer):
        table.add_row(name, str(value))
    Console(soft_wrap=True).print(table)


@main.command()
@click.option(
    "--rounds", default=2, show_default=True, type=click.IntRange(1, 10), help="How often each question is asked again."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def demo(*, rounds: int, as_json: bool) -> None:
    """Start a real llama.cpp with a small model, put nearhit in front, and show what repeated questions cost.

    Example: nearhit demo
    """
    from proxy.demo.run import DemoError, run
    from proxy.demo.screen import Screen

    screen = Screen(Console(stderr=as_json))
    try:
        summary = run(screen, rounds)
    except DemoError as error:
        _stop(str(error))
    except KeyboardInterrupt:
        _stop("stopped; nothing is left running", 130)
    if as_json:
        click.echo(json.dumps(summary, indent=2))


def _masked(path: str, value: Any) -> Any:
    return "(set)" if path in SECRET_PATHS and value else value


def _flattened(nested: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in nested.items():
        if isinstance(value, dict):
            rows.extend(_flattened(value, f"{prefix}{name}."))
        else:
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


def _refuse_shadowed_package() -> None:
    """Stop if another distribution put its files into our import packages: pip does not tell of such a clash."""
    here = Path(__file__).parent
    for distribution in distributions(path=[str(here.parent)]):
        name = distribution.metadata["Name"]
        if name and name.lower() != "nearhit" and any(f.parts[:1] == ("proxy",) for f in distribution.files or ()):
            _stop(f"the package {name} shares the folder {here}: install nearhit in an environment of its own")


if __name__ == "__main__":
    main()
