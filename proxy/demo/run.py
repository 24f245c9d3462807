"""The demo from start to end; whatever happens, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from proxy.demo.asking import Reply, ask, client_for
from proxy.demo.errors import DemoError
from proxy.demo.interrupts import Interrupts
from proxy.demo.parts import model_file
from proxy.demo.processes import Child, Children
from proxy.demo.screen import Screen
from proxy.demo.totals import Row, summary, totals
from proxy.demo.workload import Ask, Question, asks, messages

if TYPE_CHECKING:
    from openai import OpenAI

__all__ = ["DemoError", "run"]

_WARM_UP = [{"role": "user", "content": "Say hello."}]


def run(screen: Screen, rounds: int) -> dict[str, Any]:
    """Start both servers, ask every question once and `rounds` times again, show it, and stop them.

    Returns:
        Totals and one object for each request, fit for JSON; times in milliseconds.

    Raises:
        DemoError: a part is missing, a server did not start, or a request failed.
        KeyboardInterrupt: Ctrl-C; all is cleaned up by then.
        SystemExit: SIGTERM or SIGHUP, likewise.
    """
    model = model_file()
    try:
        rows = _with_servers(screen, model, rounds)
    except SystemExit:
        screen.tell("stopped; nothing is left running")
        raise
    screen.totals(totals(rows))
    screen.farewell()
    return {"model": model.stem, **summary(rows)}


def _with_servers(screen: Screen, model: Path, rounds: int) -> list[Row]:
    # From the outside in: until all is cleaned up, a signal waits or stops the innermost block only.
    with (
        Interrupts() as interrupts,
        screen.working(),
        TemporaryDirectory(prefix="nearhit-demo-") as folder,
        Children(Path(folder), interrupts) as children,
        interrupts.allowed(),
    ):
        rows = _demo(screen, children, model, Path(folder), rounds)
        screen.doing("stopping both servers")
    return rows


def _demo(screen: Screen, children: Children, model: Path, data: Path, rounds: int) -> list[Row]:
    screen.doing("starting llama.cpp")
    llama = children.start("llama.cpp", "proxy.demo.llama_server", str(model))
    upstream = llama.address()
    screen.tell(f"llama.cpp  {upstream}  {model.stem}")
    screen.doing("warming llama.cpp up")
    _warm_up(llama, upstream)
    screen.doing("starting nearhit")
    nearhit = _start_nearhit(children, upstream, data)
    url = nearhit.address()
    nearhit.ready(url, "/-/ready")
    screen.tell(f"nearhit    {url}  in front of it")
    return _replay(screen, nearhit, url, rounds)


def _start_nearhit(children: Children, upstream: str, data: Path) -> Child:
    return children.start(
        "nearhit", "proxy", "serve", "--upstream", upstream, "--port", "0", "--data-dir", str(data / "data")
    )


def _warm_up(llama: Child, upstream: str) -> None:
    """Ask llama.cpp once without nearhit, so that the first miss does not pay for first-time work."""
    from openai import OpenAIError

    try:
        with client_for(upstream) as client:
            ask(client, _WARM_UP, streamed=False)
    except OpenAIError as error:
        raise llama.failed(f"does not answer: {error}") from error


def _replay(screen: Screen, nearhit: Child, url: str, rounds: int) -> list[Row]:
    from openai import OpenAIError

    screen.heading()
    rows: list[Row] = []
    try:
        with client_for(url) as client:
            _ask_all(screen, client, rounds, rows)
    except OpenAIError as error:
        raise nearhit.failed(f"did not answer request {len(rows) + 1}: {error}") from error
    return rows


def _ask_all(screen: Screen, client: OpenAI, rounds: int, rows: list[Row]) -> None:
    answers: dict[Question, str] = {}
    todo = asks(rounds)
    for done, one in enumerate(todo):
        screen.asking(done, len(todo), one)
        reply = ask(client, messages(one.question, answers), streamed=one.streamed)
        answers[one.question] = reply.text
        rows.append(_row(done + 1, one, reply))
        screen.row(rows[-1])


def _row(number: int, one: Ask, reply: Reply) -> Row:
    question = one.question
    return Row(number, question.text, question.turn, one.form, reply.outcome, reply.first_token_ms, reply.total_ms)
