"""The commands around the near tier, as people and programs run them: explain, feedback, doctor, eval."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel
from tests.program.test_cli import PROGRAM, Ran, environment, run, run_async
from tests.web.test_explain import ask, asking
from tests.web.test_near import ALIKE, ASKED, OTHER, with_near

SECRET = "xyzzy-plugh"


async def write(path: Path, content: Any) -> str:
    """The name of a file with this content, JSON where it is no text."""
    text = content if isinstance(content, str) else json.dumps(content)
    await asyncio.to_thread(path.write_text, text)
    return str(path)


def lines(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


async def explain(home: Path, proxy: Proxy, *arguments: str) -> Ran:
    return await run_async(home, "explain", *arguments, "--url", proxy.url)


@pytest.mark.parametrize("command", ["explain", "feedback", "doctor", "eval"])
def test_help_has_an_example(tmp_path: Path, command: str) -> None:
    ran = run(tmp_path, command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert re.search(rf"Example: nearhit {command}\b", ran.out)


# nearhit explain


async def test_explain_a_file_as_a_table(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(system="Be brief."))
    file = await write(tmp_path / "request.json", asking(OTHER, "Be brief."))
    ran = await explain(tmp_path, proxy, file)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("MISS  absent  (chat)")
    for told in ("system prompt", "Be brief.", "refused by content-word", "[-living-] {+dining+}", "ttl_s 259200"):
        assert told in ran.out
    assert len(model.generations) == 1


async def test_explain_a_near_hit_as_a_table(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    ran = await explain(tmp_path, proxy, await write(tmp_path / "request.json", asking(ALIKE)))
    assert ran.out.startswith("NEAR  equal  (chat)")
    assert "1.000 same by equal" in ran.out


async def test_explain_names_what_keeps_calls_apart(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking(system="It is 10:41 now. Be brief."))
    file = await write(tmp_path / "request.json", asking(system="It is 10:47 now. Be brief."))
    ran = await explain(tmp_path, proxy, file)
    assert "system prompt, characters 6 to 11, which looks like a time of day" in ran.out
    assert "here: 10:47" in ran.out
    assert "there: 10:41" in ran.out


async def test_explain_what_is_not_cached(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    ran = await explain(tmp_path, proxy, await write(tmp_path / "request.json", {"messages": []}))
    assert ran == Ran(0, "BYPASS  not-understood  (chat)\n  assumed: it is for /v1/chat/completions\n", "")


async def test_explain_for_programs(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    file = await write(tmp_path / "request.json", asking(ALIKE))
    ran = await explain(tmp_path, proxy, file, "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert (told["outcome"], told["near"]["candidates"][0]["words"]) == ("NEAR", ASKED)


async def test_explain_reads_standard_input(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())

    def piped() -> subprocess.CompletedProcess[str]:
        command = [str(PROGRAM), "explain", "-", "--json", "--url", proxy.url]
        return subprocess.run(
            command,
            input=json.dumps(asking(ALIKE)),
            env=environment(tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    done = await asyncio.to_thread(piped)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outcome"] == "NEAR"


async def test_explain_a_question_alone(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    ran = await explain(tmp_path, proxy, "--ask", ALIKE, "--json")
    assert (ran.code, json.loads(ran.out)["outcome"]) == (0, "NEAR")
    assert json.loads((await explain(tmp_path, proxy, "--ask", OTHER, "--json")).out)["outcome"] == "MISS"


async def test_explain_says_what_is_wrong_with_its_arguments(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    file = await write(tmp_path / "request.json", asking())
    broken = await write(tmp_path / "broken.json", "{")
    binary = tmp_path / "binary.json"
    await asyncio.to_thread(binary.write_bytes, b"\xff\xfe\x00")
    deep = await write(tmp_path / "deep.json", "[" * 100_000)
    for arguments in ((), (file, "--ask", "x"), (broken,), (str(binary),), (deep,), ("missing.json",)):
        ran = await explain(tmp_path, proxy, *arguments)
        assert (ran.code, ran.out) == (2, ""), arguments
        assert "Traceback" not in ran.err


async def test_explain_what_is_no_body(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    ran = await explain(tmp_path, proxy, await write(tmp_path / "list.json", [1]))
    assert ran == Ran(1, "", f"nearhit: {proxy.url} refused: the body is not a JSON object\n")


async def test_prompts_cannot_give_commands_to_the_terminal(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    nasty = "\x1b[31m[/x] [bold]:smile: \x07\u202e\ud83d"
    await ask(proxy, asking(f"{nasty} {ASKED}", f"a {nasty} b"))
    file = await write(tmp_path / "request.json", asking(f"{nasty} {OTHER}", f"c {nasty} d"))
    ran = await explain(tmp_path, proxy, file)
    assert (ran.code, ran.err) == (0, "")
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.out)
    assert "[/x]" in ran.out


@pytest.mark.parametrize("name", ["[/x]", "\x1b[31m", "\ud83d"])
async def test_names_of_fields_cannot_either(tmp_path: Path, start: StartProxy, name: str) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    ran = await explain(tmp_path, proxy, await write(tmp_path / "request.json", {**asking(), name: 1}))
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out


# nearhit feedback


async def test_feedback_takes_an_answer_out(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    shown = (await proxy.chat(ALIKE)).headers["X-Nearhit-Entry"]
    ran = await run_async(tmp_path, "feedback", shown[:16], "wrong", "--url", proxy.url)
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(rf"removed {shown}; \d+ pairings will not match again\n", ran.out)
    assert (await ask(proxy, asking())).outcome == "MISS"
    assert (await ask(proxy, asking(ALIKE))).outcome == "MISS"


@pytest.mark.parametrize(("shown", "message"), [("00" * 16, "no entry has this id"), ("xyz", "an id is the first 8")])
async def test_feedback_on_nothing_is_one_line_and_exit_code_1(
    tmp_path: Path, start: StartProxy, shown: str, message: str
) -> None:
    proxy = await start()
    ran = await run_async(tmp_path, "feedback", shown, "wrong", "--url", proxy.url)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"nearhit: {proxy.url} refused: {message}")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("00000000",), ("00000000", "right")])
def test_feedback_wants_an_id_and_a_verdict(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, "feedback", *arguments)
    assert (ran.code, ran.out) == (2, "")


# nearhit doctor


async def test_doctor_of_a_healthy_one(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    assert await run_async(tmp_path, "doctor", "--url", proxy.url) == Ran(0, "all is well\n", "")
    ran = await run_async(tmp_path, "doctor", "--url", proxy.url, "--json")
    assert (ran.code, json.loads(ran.out)) == (0, [])


async def test_advice_is_no_failure_and_stats_warn_of_it(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start)
    for minute in range(41, 46):
        await ask(proxy, asking(f"question {minute}", f"{SECRET}: it is 10:{minute} now. Be brief."))
    ran = await run_async(tmp_path, "doctor", "--url", proxy.url)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("advice: the system prompt was another one")
    assert "which look like a time of day" in ran.out
    (found,) = json.loads((await run_async(tmp_path, "doctor", "--url", proxy.url, "--json")).out)
    assert found["severity"] == "advice"
    stats = await run_async(tmp_path, "stats", "--url", proxy.url)
    assert stats.code == 0
    assert stats.err.startswith("warning: the system prompt was another one")
    assert SECRET not in ran.out + stats.out + stats.err


@pytest.mark.parametrize("more", [(), ("--json",)])
async def test_a_problem_is_exit_code_1(tmp_path: Path, start: StartProxy, more: tuple[str, ...]) -> None:
    proxy = await with_near(start, url="http://127.0.0.1:9")
    ran = await run_async(tmp_path, "doctor", "--url", proxy.url, *more)
    assert (ran.code, ran.err) == (1, "")
    assert "problem" in ran.out
    assert "the upstream cannot be reached" in ran.out


@pytest.mark.parametrize("command", [("doctor",), ("explain", "--ask", "x"), ("feedback", "00000000", "wrong")])
def test_without_a_running_one_every_command_says_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    ran = run(tmp_path, *command, "--url", "http://127.0.0.1:9")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: no nearhit answers at http://127.0.0.1:9 (")
    assert ran.err.count("\n") == 1


async def test_every_command_shows_its_token(tmp_path: Path, start: StartProxy) -> None:
    proxy = await with_near(start, admin__token="opensesame")
    for command in (("doctor",), ("explain", "--ask", "x")):
        asked = (*command, "--url", proxy.url)
        assert (await run_async(tmp_path, *asked, NEARHIT_ADMIN_TOKEN="opensesame")).code == 0
        elsewhere = await run_async(tmp_path, *asked, "--data-dir", str(tmp_path / "elsewhere"))
        assert elsewhere == Ran(1, "", f"nearhit: {proxy.url} refused: send the admin token as X-Nearhit-Admin\n")


# nearhit eval


RIGHT = {"a": ASKED, "b": ALIKE, "same": True}
REFUSED = {"a": ASKED, "b": OTHER, "same": False}
FALSE = {"a": ASKED, "b": ALIKE, "same": False}


def evaluated(home: Path, rows: str, *arguments: str) -> Ran:
    (home / "rows.jsonl").write_text(rows)
    return run(home, "eval", "rows.jsonl", *arguments)


def test_eval_for_programs(tmp_path: Path) -> None:
    ran = evaluated(tmp_path, lines(RIGHT, REFUSED), "--json", "--form", "pair", "--max-false", "0")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["policy"]["threshold"] == 0.6
    (figures,) = told["sets"]
    assert (figures["file"], figures["form"]) == ("rows.jsonl", "pair")


def test_eval_for_people(tmp_path: Path) -> None:
    ran = evaluated(tmp_path, lines(RIGHT, REFUSED))
    assert ran.code == 0, ran.err
    assert next(line.split()[:2] for line in ran.out.splitlines() if line.startswith("rows ")) == ["rows", "pair"]


@pytest.mark.parametrize(("limit", "code"), [((), 0), (("--max-false", "0"), 1), (("--max-false", "1"), 0)])
def test_more_false_hits_than_allowed_are_exit_code_1(tmp_path: Path, limit: tuple[str, ...], code: int) -> None:
    ran = evaluated(tmp_path, lines(FALSE, REFUSED), "--form", "pair", *limit)
    assert (ran.code, bool(ran.out)) == (code, True)


def test_eval_reads_a_log(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "cls": cls} for prompt, cls in ((ASKED, "r"), (ALIKE, "r"), (OTHER, "d"))]
    ran = evaluated(tmp_path, lines(*rows), "--json", "--max-false", "0")
    assert ran.code == 0, ran.err
    assert [one["form"] for one in json.loads(ran.out)["sets"]] == ["trace"]


@pytest.mark.parametrize("rows", ["", "{", "[1]\n", '{"a": "x"}\n', '{"a": 1, "b": "x", "same": true}\n', "{}\n"])
def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path: Path, rows: str) -> None:
    ran = evaluated(tmp_path, rows)
    assert (ran.code, ran.out) == (2, "")
    assert "nearhit: rows.jsonl" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    "arguments", [("missing.jsonl",), ("rows.jsonl", "--threshold", "0.1"), ("rows.jsonl", "--form", "x"), ()]
)
def test_wrong_usage_of_eval_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "rows.jsonl").write_text(lines(RIGHT))
    ran = run(tmp_path, "eval", *arguments)
    assert (ran.code, ran.out) == (2, "")
