"""The command `nearhit`. Nothing but this and `proxy.commands` prints."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib.metadata import Distribution, distributions
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from proxy import __version__
from proxy.commands.doctor import doctor
from proxy.commands.entries import entries, purge
from proxy.commands.files import backup, migrate
from proxy.commands.options import EXIT_CONFIG, EXIT_FAILED, load_settings, print_table, stop, with_settings
from proxy.commands.prefixes import prefixes
from proxy.commands.running import explain, feedback, stats
from proxy.commands.transfer import export_, import_
from proxy.commands.warm import warm
from proxy.config import annotated_default, flat
from proxy.settings import SECRET_FIELDS, SECRET_PATHS, STRUCTURED

_FOLDERS = ("proxy", "storage")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; where its output has no room, say so in a line."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            # Python would try to write the rest at its end, and complain once more.
            sys.stdout = None
            stop(f"cannot write: {error.strerror}")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nearhit")
def main() -> None:
    """A caching reverse proxy for the LLM servers that people run themselves.

    Start it in front of a server, and point clients at it instead:

        nearhit serve --upstream http://127.0.0.1:8080
    """
    # Questions and answers may have characters that a terminal's encoding has not.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _refuse_shadowed_package()


@main.command()
@with_settings
def serve(config_file: Path | None, **flags: Any) -> None:
    """Run the proxy.

    Example: nearhit serve --upstream http://127.0.0.1:8080 --port 8090
    """
    loaded = load_settings(config_file, flags)
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
        stop(str(error), EXIT_CONFIG)
    except OSError as error:
        listen = settings.listen
        # asyncio's own text repeats the address; resolvers have negative numbers and good texts.
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        stop(f"cannot listen on {listen.host}:{listen.port}: {reason}")


@main.command()
@with_settings
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--default", is_flag=True, help="Print the annotated default, to start a config.yaml from.")
def config(config_file: Path | None, *, as_json: bool, default: bool, **flags: Any) -> None:
    """Print the configuration that is in effect, and where each value comes from.

    Example: nearhit config --config config.yaml
    """
    if default:
        click.echo(annotated_default(), nl=False)
        return
    loaded = load_settings(config_file, flags)
    rows = [(path, _masked(path, value), loaded.origins[path]) for path, value in flat(loaded.settings).items()]
    if as_json:
        click.echo(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, indent=2))
        return
    print_table(("option", "value", "from"), ((path, json.dumps(value), origin) for path, value, origin in rows))


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
        stop(str(error), EXIT_CONFIG)
    except KeyboardInterrupt:
        stop("stopped", 130)
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
        stop(str(error))
    except KeyboardInterrupt:
        stop("stopped; nothing is left running", 130)
    if as_json:
        click.echo(json.dumps(summary, indent=2))


def _masked(path: str, value: Any) -> Any:
    if path in STRUCTURED and isinstance(value, list):
        return [_without_secrets(item) if isinstance(item, dict) else item for item in value]
    return "(set)" if path in SECRET_PATHS and value else value


def _without_secrets(item: dict[str, Any]) -> dict[str, Any]:
    return {name: "(set)" if name in SECRET_FIELDS and value else value for name, value in item.items()}


def _refuse_shadowed_package() -> None:
    """Stop if another distribution put its files into our import packages: pip does not tell of such a clash."""
    site = Path(__file__).parents[1]
    for distribution in distributions(path=[str(site)]):
        shared = _shared_folder(distribution)
        name = distribution.metadata["Name"] if shared else None
        if name and name.lower() != "nearhit":
            stop(f"the package {name} shares the folder {site / shared}: install nearhit in an environment of its own")


def _shared_folder(distribution: Distribution) -> str:
    """Which of our folders the distribution has files in, or ""."""
    try:
        # Its text is enough; parsing the records of a full environment takes 0.2 s.
        files = (distribution.read_text("RECORD") or "").splitlines()
    except (OSError, ValueError):
        return ""
    return next((folder for folder in _FOLDERS for file in files if file.startswith(f"{folder}/")), "")


for _command in (stats, entries, explain, feedback, purge, doctor, migrate, backup, export_, import_, warm, prefixes):
    main.add_command(_command)


if __name__ == "__main__":
    main()
