"""What commands have in common: the flags of settings, how they stop, how they ask a running nearhit, tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.config import Loaded, load
from proxy.settings import FLAGS, SettingsError

EXIT_CONFIG = 2
EXIT_FAILED = 1

_WIDE = 10_000

_HELP: Mapping[str, dict[str, Any]] = {
    "upstream.url": {"metavar": "URL", "help": "The LLM server, with or without /v1."},
    "listen.host": {"help": "Address to listen on."},
    "listen.port": {"help": "Port to listen on; 0 takes a free one."},
    "upstream.kind": {
        "metavar": "KIND",
        "help": "auto, llamacpp, rockchipllama, rkllama, rkllm_flask or openai: which kind of server it is.",
    },
    "upstream.slot_dir": {"metavar": "DIR", "help": "The folder of llama-server's --slot-save-path."},
    "sharing": {"help": "auto, shared or per-credential: who gets whose answers."},
    "cache.mode": {"help": "off, exact or approx: whether other words may get the same answer."},
    "cache.threshold": {"help": "Least similarity of prompts that are compared, 0.5 to 1."},
    "cache.persist": {"help": "on keeps answers in a file, off in memory."},
    "cache.file": {"metavar": "FILE", "help": "The database file."},
    "cache.max_entries": {"help": "Number of answers to keep."},
    "cache.ttl_hours": {"help": "Hours for which an answer is served."},
    "data_dir": {"metavar": "DIR", "help": "Where database, token and secret are."},
    "log.format": {"help": "text or json."},
    "log.level": {"help": "debug, info, warning or error."},
}

Command = Callable[..., None]


def with_settings(command: Command) -> Command:
    """Add the flags of settings, in the order in which they are listed."""
    for path, extra in reversed(list(_HELP.items())):
        command = click.option(FLAGS[path], path.replace(".", "__"), default=None, **extra)(command)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A configuration file; see config.yaml for every option.",
    )(command)


def load_settings(config_file: Path | None, flags: Mapping[str, Any]) -> Loaded:
    try:
        loaded = load(config_file, os.environ, {name.replace("__", "."): value for name, value in flags.items()})
    except SettingsError as error:
        stop(str(error), EXIT_CONFIG)
    for warning in loaded.warnings:
        click.echo(f"nearhit: {warning}", err=True)
    return loaded


def stop(message: str, code: int = EXIT_FAILED) -> NoReturn:
    click.echo(f"nearhit: {message}", err=True)
    sys.exit(code)


def url_option(command: Command) -> Command:
    return click.option(
        "--url", default=None, help="Where nearhit listens; taken from the settings if it is not given."
    )(command)


def asked(config_file: Path | None, flags: Mapping[str, Any], url: str | None, path: str, body: Any = None) -> Any:
    from proxy.ask import AskError, ask

    try:
        return ask(load_settings(config_file, flags).settings, url, path, body)
    except AskError as error:
        stop(str(error))


def print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """As wide as it is: values are not cut, and nothing in them is taken for markup or a terminal code."""
    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        cells = (cell if cell.isprintable() else ascii(cell)[1:-1] for cell in row)
        table.add_row(*(Text(cell, style="dim" if cell == "default" else "") for cell in cells))
    Console(soft_wrap=True, width=_WIDE).print(table)
