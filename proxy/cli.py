"""The command `nearhit`. The only module that prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy import __version__
from proxy.config import Loaded, annotated_default, flat, load
from proxy.settings import FLAGS, LIST_PATHS, SECRET_PATHS, SettingsError

EXIT_CONFIG = 2
EXIT_FAILED = 1

_FOLDERS = ("proxy", "storage")
_WIDE = 10_000

_HELP: Mapping[str, dict[str, Any]] = {
    "upstream.url": {"metavar": "URL", "help": "The LLM server, with or without /v1."},
    "listen.host": {"help": "Address to listen on."},
    "listen.port": {"help": "Port to listen on; 0 takes a free one."},
    "upstream.kind": {"help": "auto, llamacpp or openai: which kind of server it is."},
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


def _with_settings(command: Command) -> Command:
    """Add the flags of settings, in the order in which they are listed."""
    for path, extra in reversed(list(_HELP.items())):
        command = click.option(FLAGS[path], path.replace(".", "__"), default=None, **extra)(command)
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


def _url_option(command: Command) -> Command:
    return click.option(
        "--url", default=None, help="Where nearhit listens; taken from the settings if it is not given."
    )(command)


def _asked(config_file: Path | None, flags: Mapping[str, Any], url: str | None, path: str, body: Any = None) -> Any:
    from proxy.ask import AskError, ask

    try:
        return ask(_load(config_file, flags).settings, url, path, body)
    except AskError as error:
        _stop(str(error))


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
        # asyncio's own text repeats the address; resolvers have negative numbers and good texts.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        _stop(f"cannot listen on {listen.host}:{listen.port}: {reason}")


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
    _print_table(("option", "value", "from"), ((path, json.dumps(value), origin) for path, value, origin in rows))


@main.command()
@_with_settings
@_url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def stats(config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any) -> None:
    """Show what a running nearhit has done.

    Example: nearhit stats --port 8090
    """
    answer = _asked(config_file, flags, url, "/-/stats")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    warnings = answer.pop("warnings", ())
    _print_table(("what", "value"), ((name, str(value)) for name, value in _flattened(answer)))
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--ask", "words", help="Explain this question, with temperature 0 and nothing else, instead of a FILE.")
@_with_settings
@_url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(
    file: Any, words: str | None, config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any
) -> None:
    """Say why a request would or would not be answered from the cache.

    FILE holds the body of a request as a client sends it; - reads it from standard input.

    Example: nearhit explain request.json
    """
    if (file is None) == (words is None):
        _stop("give a FILE with a request's body, or --ask 'a question'", EXIT_CONFIG)
    body: Any = {"messages": [{"role": "user", "content": words}], "temperature": 0}
    if file is not None:
        try:
            body = json.load(file)
        except (ValueError, RecursionError):
            _stop(f"{file.name}: is not JSON", EXIT_CONFIG)
    told = _asked(config_file, flags, url, "/-/explain", body)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    from proxy.telling import tell_explanation

    tell_explanation(Console(soft_wrap=True), told)


@main.command()
@click.argument("entry_id", metavar="ID")
@click.argument("verdict", type=click.Choice(["wrong"]))
@_with_settings
@_url_option
def feedback(entry_id: str, verdict: str, config_file: Path | None, url: str | None, **flags: Any) -> None:
    """Say that an answer from the cache was wrong: it goes, and that pair of questions never matches again.

    ID is what the response had as X-Nearhit-Entry.

    Example: nearhit feedback 3fa2c41b9d0e8a77 wrong
    """
    told = _asked(config_file, flags, url, "/-/feedback", {"id": entry_id, "verdict": verdict})
    click.echo(f"removed {told['id']}; {told['pairs_never_again']} pairings will not match again")


@main.command()
@_with_settings
@_url_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(config_file: Path | None, url: str | None, *, as_json: bool, **flags: Any) -> None:
    """Tell what is wrong with a running nearhit, or what would make it save more. Exits with 1 if there is a problem.

    Example: nearhit doctor
    """
    found = _asked(config_file, flags, url, "/-/doctor")["findings"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        from proxy.telling import tell_findings

        tell_findings(Console(soft_wrap=True), found)
        if not found:
            click.echo("all is well")
    if any(finding["severity"] == "problem" for finding in found):
        sys.exit(EXIT_FAILED)


@main.command("eval")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--form", type=click.Choice(["pair", "replay", "trace"]), help="Only this form; each by default.")
@click.option(
    "--threshold", default=0.6, show_default=True, type=click.FloatRange(0.5, 1), help="See --cache-threshold."
)
@click.option("--show", type=click.Choice(["false", "missed"]), help="List these cases, with what decided.")
@click.option("--max-false", type=click.IntRange(0), help="Exit with 1 if there are more false hits in all.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def evaluate(
    files: tuple[Path, ...],
    form: str | None,
    threshold: float,
    show: str | None,
    max_false: int | None,
    *,
    as_json: bool,
) -> None:
    """Replay labelled questions through the near tier, and tell how often it hits, and how often wrongly.

    A FILE has one JSON object a line: {"a": ..., "b": ..., "same": true or false} for pairs, or
    {"prompt": ..., "cls": ...} for a log of requests in their order.

    Example: nearhit eval my-questions.jsonl --show false
    """
    from proxy.evaluate.run import EvaluationError, Form, Options, Show
    from proxy.evaluate.run import evaluate as run
    from proxy.evaluate.screen import Watching, render

    watching = Watching(Console(stderr=True))
    options = Options(threshold, Form(form) if form else None, Show(show) if show else None)
    try:
        with watching.working():
            report = run(files, options, watching)
    except EvaluationError as error:
        _stop(str(error), EXIT_CONFIG)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        render(report, Console())
    if max_false is not None and report.false_hits > max_false:
        sys.exit(EXIT_FAILED)


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


def _print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """As wide as it is: values are not cut, and nothing in them is taken for markup or a terminal code."""
    table = Table(*header, box=None, header_style="bold")
    for row in rows:
        cells = (cell if cell.isprintable() else ascii(cell)[1:-1] for cell in row)
        table.add_row(*(Text(cell, style="dim" if cell == "default" else "") for cell in cells))
    Console(soft_wrap=True, width=_WIDE).print(table)


def _masked(path: str, value: Any) -> Any:
    if path in LIST_PATHS:
        return [{**item, "key": "(set)" if item["key"] else ""} for item in value]
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
    site = Path(__file__).parents[1]
    for distribution in distributions(path=[str(site)]):
        shared = _shared_folder(distribution)
        name = distribution.metadata["Name"] if shared else None
        if name and name.lower() != "nearhit":
            _stop(f"the package {name} shares the folder {site / shared}: install nearhit in an environment of its own")


def _shared_folder(distribution: Distribution) -> str:
    """Which of our folders the distribution has files in, or ""."""
    try:
        # Its text is enough; parsing the records of a full environment takes 0.2 s.
        files = (distribution.read_text("RECORD") or "").splitlines()
    except (OSError, ValueError):
        return ""
    return next((folder for folder in _FOLDERS for file in files if file.startswith(f"{folder}/")), "")


if __name__ == "__main__":
    main()
