"""The command that asks questions before clients do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from proxy.commands.options import EXIT_CONFIG, Command, load_settings, stop, url_option, with_settings

_KEY_VARIABLE = "NEARHIT_WARM_KEY"
_PROMPTS_ONLY = ("model", "system", "temperature", "max_tokens")


class _Temperature(click.ParamType[float | None]):
    """A number as JSON spells it, for 0 and 0.0 are two requests; or none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """See click."""
        if value in (None, "none"):
            return None
        try:
            number = json.loads(str(value))
        except ValueError:
            number = None
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 100:
            self.fail(f"{value!r} is no number from 0 to 100, nor none", param, ctx)
        return number


_PROMPT_OPTIONS = (
    click.option("--model", help="For prompts: the model that clients ask for."),
    click.option("--system", metavar="TEXT|@FILE", help="For prompts: the system prompt that clients send."),
    click.option(
        "--temperature", type=_Temperature(), default="0", show_default=True, help="For prompts; none leaves it out."
    ),
    click.option("--max-tokens", type=click.IntRange(1), help="For prompts: the limit that clients set."),
)


def _with_prompt_options(command: Command) -> Command:
    for option in reversed(_PROMPT_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("file", metavar="FILE|-", type=click.Path(dir_okay=False, allow_dash=True))
@_with_prompt_options
@click.option("--concurrency", default=1, show_default=True, type=click.IntRange(1, 256), help="Questions at a time.")
@click.option("--api-key", envvar=_KEY_VARIABLE, default="", help=f"The LLM server's; or in {_KEY_VARIABLE}.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["auto", "export", "batch", "prompts"]),
    default="auto",
    show_default=True,
    help="What FILE holds.",
)
@click.option(
    "--give-up",
    "give_up_s",
    default=600.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to wait for an LLM server that is busy or away.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be asked.")
@with_settings
@url_option
@click.option("--json", "as_json", is_flag=True, help="Sum up for programs.")
def warm(
    file: str,
    kind: str,
    concurrency: int,
    api_key: str,
    give_up_s: float,
    config_file: Path | None,
    url: str | None,
    *,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Have answers ready before clients ask: from an export, an OpenAI batch file, or a list of prompts, one a line.

    Clients find such an answer only if they send the same fields: model, system prompt, temperature, and so on. What is
    known already is not asked again, so that an interrupted run can simply be repeated.

    Example: nearhit warm questions.txt --model tiny --max-tokens 200
    """
    form = {name: flags.pop(name) for name in _PROMPTS_ONLY}
    settings = load_settings(config_file, flags).settings
    form["system"] = _system(form["system"])
    if not all(_is_unicode(value) for value in (form["system"], form["model"])):
        stop("an argument is not valid UTF-8", EXIT_CONFIG)
    if not (api_key.isascii() and api_key.isprintable()):
        stop("--api-key goes into a header field: printable ASCII is expected", EXIT_CONFIG)
    from proxy.commands.sending import import_lines, readable
    from proxy.commands.warm_run import Run, kind_found
    from proxy.warming.questions import Form, Kind

    with readable(file, spooled=True) as lines:
        found = kind_found(lines) if kind == "auto" else Kind(kind)
        if found is not Kind.PROMPTS:
            _refuse_prompt_options(found.value)
        if found is Kind.EXPORT:
            if dry_run:
                stop("an export is imported, nothing is asked: nearhit import looks through it first", EXIT_CONFIG)
            import_lines(settings, url, file, lines, skip=False, from_line=1, as_json=as_json)
            return
        run = Run(settings, url, file, lines, found, Form(**form))
        if dry_run:
            run.tell_only(as_json=as_json)
        else:
            run.ask(api_key, concurrency, give_up_s, as_json=as_json)


def _system(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        stop(f"{given[1:]}: {getattr(error, 'strerror', None) or 'is not text in UTF-8'}", EXIT_CONFIG)


def _is_unicode(text: str | None) -> bool:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_prompt_options(found: str) -> None:
    context = click.get_current_context()
    for name in _PROMPTS_ONLY:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            stop(
                f"--{name.replace('_', '-')} goes with a list of prompts; this is a file of the kind {found}",
                EXIT_CONFIG,
            )
