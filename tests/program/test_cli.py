"""The command line: help, exit codes, tables for people and JSON for programs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from proxy import __version__, cli
from proxy.config import flat
from proxy.settings import FLAGS, OPTIONS, SECRET_PATHS, Settings
from tests.conftest import StartProxy
from tests.fake_model import FakeModel

PROGRAM = Path(sys.executable).with_name("nearhit")
ROOT = Path(__file__).parents[2]
COMMANDS = sorted(cli.main.commands)


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(home: Path, **changes: str) -> dict[str, str]:
    """This process's environment, without settings of nearhit's and with another home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEARHIT_", "XDG_"))}
    return {**kept, "HOME": str(home), "COLUMNS": "100", **changes}


def run(home: Path, *arguments: str, program: tuple[str, ...] = (str(PROGRAM),), **changes: str) -> Ran:
    """Run the installed program to its end."""
    done = subprocess.run(
        [*program, *arguments],
        env=environment(home, **changes),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


async def run_async(home: Path, *arguments: str, **changes: str) -> Ran:
    """Run the installed program while the test's own servers go on."""
    return await asyncio.to_thread(lambda: run(home, *arguments, program=(str(PROGRAM),), **changes))


# Help


def test_help_names_every_command(tmp_path: Path) -> None:
    ran = run(tmp_path, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert all(f"\n  {command} " in ran.out for command in COMMANDS)
    assert "nearhit serve --upstream http://" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(tmp_path: Path, command: str) -> None:
    ran = run(tmp_path, command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: nearhit {command}" in ran.out


def test_every_example_is_understood(tmp_path: Path) -> None:
    for command in COMMANDS:
        help_text = cli.main.commands[command].help or ""
        example = help_text.partition("Example: nearhit ")[2].splitlines()[0].split()
        context = cli.main.make_context("nearhit", example, resilient_parsing=True)
        _, found, rest = cli.main.resolve_command(context, example)
        assert found is cli.main.commands[command]
        assert not [word for word in rest if word.startswith("--") and word not in _option_names(command)]


def _option_names(command: str) -> set[str]:
    return {name for parameter in cli.main.commands[command].params for name in parameter.opts}


@pytest.mark.parametrize("command", ["serve", "config", "stats"])
def test_every_flag_of_settings_is_known_to_the_settings(command: str) -> None:
    assert set(FLAGS.values()) <= _option_names(command)
    assert set(FLAGS) <= set(OPTIONS)


def test_the_version_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").out == f"nearhit, version {__version__}\n"


def test_the_package_can_be_run_as_a_module(tmp_path: Path) -> None:
    ran = run(tmp_path, "--version", program=(sys.executable, "-m", "proxy"))
    assert (ran.code, ran.out) == (0, f"nearhit, version {__version__}\n")


# Exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "abc"), "nearhit: flag: --port: found 'abc', expected int\n"),
        (("--port", "99999"), "nearhit: flag: --port: found '99999', expected int <= 65535\n"),
        (("--cache-persist", "yes"), "nearhit: flag: --cache-persist: found 'yes', expected on or off\n"),
        (
            ("--cache-threshold=0.4",),
            "nearhit: flag: --cache-threshold: found '0.4', expected float >= 0.5\n",
        ),
        (
            ("--upstream", "localhost:8080"),
            "nearhit: flag: --upstream: found 'localhost:8080', expected a URL like http://127.0.0.1:8080\n",
        ),
        (
            ("--upstream", "http://me:hunter2@localhost"),
            "nearhit: flag: --upstream: found 'http://...@localhost', expected a URL without credentials; "
            "use upstream.api_key\n",
        ),
        (("--host", "a..b"), "nearhit: flag: --host: found 'a..b', expected a host name or an IP address\n"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert run(tmp_path, "config", *arguments) == Ran(2, "", message)


@pytest.mark.parametrize("command", ["serve", "stats"])
def test_every_command_refuses_a_wrong_flag(tmp_path: Path, command: str) -> None:
    message = "nearhit: flag: --port: found 'abc', expected int\n"
    assert run(tmp_path, command, "--port", "abc") == Ran(2, "", message)


def test_a_wrong_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("listen: {port: abc}")
    ran = run(tmp_path, "serve", "--config", "my.yaml")
    assert ran == Ran(2, "", "nearhit: my.yaml: listen.port: found 'abc' (str), expected int\n")


def test_a_wrong_variable_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    ran = run(tmp_path, "serve", NEARHIT_LISTEN_PORT="abc")
    assert ran == Ran(2, "", "nearhit: environment: NEARHIT_LISTEN_PORT: found 'abc', expected int\n")


@pytest.mark.parametrize("arguments", [("serve", "--config", "missing.yaml"), ("serve", "--prot", "1"), ("nothing",)])
def test_wrong_usage_is_exit_code_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Error: " in ran.err


def test_a_port_in_use_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ran = run(tmp_path, "serve", "--port", str(port), "--log-level", "error")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"nearhit: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_host_that_does_not_exist_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    ran = run(tmp_path, "serve", "--host", "192.0.2.77", "--port", "0", "--log-level", "error")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: cannot listen on 192.0.2.77:0: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"my diary", "is not a nearhit database: it is left alone; point cache.file at another path"),
        (b'{"a": 1}\n', "looks like JSON Lines"),
    ],
)
def test_a_foreign_database_file_is_one_line_and_exit_code_2(tmp_path: Path, content: bytes, hint: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    ran = run(tmp_path, "serve", "--port", "0", "--cache-file", str(file))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"nearhit: {file} ")
    assert hint in ran.err
    assert ran.err.count("\n") == 1
    assert file.read_bytes() == content


# nearhit config


def test_the_annotated_default_can_be_written_to_a_file_and_read_again(tmp_path: Path) -> None:
    printed = run(tmp_path, "config", "--default")
    assert (printed.code, printed.err) == (0, "")
    (tmp_path / "config.yaml").write_text(printed.out, encoding="utf-8")
    shown = json.loads(run(tmp_path, "config", "--config", "config.yaml", "--json").out)
    assert {path: row["value"] for path, row in shown.items()} == flat(Settings())
    assert {row["from"] for row in shown.values()} == {"config.yaml"}


def test_config_shows_every_value_and_its_origin(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("cache: {ttl_hours: 1}\nlog: {level: debug}")
    arguments = ("config", "--config", "my.yaml", "--port", "1234")
    rows = json.loads(run(tmp_path, *arguments, "--json", NEARHIT_CACHE_TTL_HOURS="2").out)
    assert list(rows) == list(OPTIONS)
    assert rows["cache.ttl_hours"] == {"value": 2.0, "from": "environment"}
    assert rows["log.level"] == {"value": "debug", "from": "my.yaml"}
    assert rows["listen.port"] == {"value": 1234, "from": "flag"}
    assert rows["sharing"] == {"value": "auto", "from": "default"}
    table = run(tmp_path, *arguments, NEARHIT_CACHE_TTL_HOURS="2").out
    told = [line.split() for line in table.splitlines()[1:]]
    assert [row[0] for row in told] == list(OPTIONS)
    assert ["cache.ttl_hours", "2.0", "environment"] in told
    assert ["listen.port", "1234", "flag"] in told


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_config_never_shows_a_secret(tmp_path: Path, more: tuple[str, ...]) -> None:
    (tmp_path / "my.yaml").write_text("upstream: {api_key: hunter2}")
    ran = run(tmp_path, "config", "--config", "my.yaml", *more, NEARHIT_ADMIN_TOKEN="hunter2")
    assert ran.code == 0
    assert "hunter2" not in ran.out + ran.err
    assert ran.out.count("(set)") == len(SECRET_PATHS)


def test_config_shows_values_as_they_are(tmp_path: Path) -> None:
    for value in ("/tmp/[/x]", "/tmp/[bold]x:smile:", "/tmp/" + "x" * 300, "/tmp/\x1b[31m"):
        ran = run(tmp_path, "config", "--data-dir", value)
        assert (ran.code, ran.err) == (0, "")
        assert f"data_dir {json.dumps(value)} flag" in " ".join(ran.out.split())


def test_unknown_variables_are_told_and_do_not_stop(tmp_path: Path) -> None:
    ran = run(tmp_path, "config", "--json", NEARHIT_CACHE_TTL_HOUR="1")
    expected = "nearhit: NEARHIT_CACHE_TTL_HOUR: no such option; did you mean NEARHIT_CACHE_TTL_HOURS?; ignored\n"
    assert (ran.code, ran.err) == (0, expected)
    assert json.loads(ran.out)


# nearhit stats


async def test_stats_of_a_running_one(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start()
    await proxy.chat()
    await proxy.settled()
    await proxy.chat()
    port = proxy.url.rpartition(":")[2]
    told = await run_async(tmp_path, "stats", "--port", port, "--data-dir", str(tmp_path), "--json")
    assert (told.code, told.err) == (0, "")
    assert json.loads(told.out)["cache.hit_exact"] == 1
    table = await run_async(tmp_path, "stats", "--url", proxy.url + "/", "--data-dir", str(tmp_path))
    assert (table.code, table.err) == (0, "")
    rows = dict(f"{line} -".split(maxsplit=1) for line in table.out.splitlines()[1:])
    assert rows["cache.hit_exact"].split()[0] == "1"
    assert rows["requests.HIT"].split()[0] == "1"
    assert rows["misses.absent"].split()[0] == "1"
    assert rows["upstream.models"].split()[0] == "tiny"


async def test_stats_with_the_set_token_the_local_one_and_none(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    stats = ("stats", "--url", proxy.url)
    assert (await run_async(tmp_path, *stats, NEARHIT_ADMIN_TOKEN="opensesame")).code == 0
    assert (await run_async(tmp_path, *stats, "--data-dir", str(tmp_path))).code == 0
    elsewhere = await run_async(tmp_path, *stats, "--data-dir", str(tmp_path / "elsewhere"))
    message = f"nearhit: {proxy.url} refused: send the admin token as X-Nearhit-Admin\n"
    assert elsewhere == Ran(1, "", message)
    wrong = await run_async(tmp_path, *stats, NEARHIT_ADMIN_TOKEN="wrong")
    assert wrong == Ran(1, "", f"nearhit: {proxy.url} refused: the token in X-Nearhit-Admin is wrong\n")


async def test_stats_do_not_go_through_a_proxy_of_the_environment(tmp_path: Path, start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    elsewhere = {"http_proxy": "http://127.0.0.1:9", "NEARHIT_ADMIN_TOKEN": "opensesame"}
    assert (await run_async(tmp_path, "stats", "--url", proxy.url, **elsewhere)).code == 0


async def test_names_of_models_cannot_dress_up_the_table(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    model.models = ["[/x]", "a\x1b[31mb", ":smile:", "[red]"]
    proxy = await start()
    ran = await run_async(tmp_path, "stats", "--url", proxy.url)
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out
    assert all(name in ran.out for name in ("[/x]", ":smile:", "[red]"))


async def test_stats_of_one_whose_token_another_start_has_replaced(tmp_path: Path, start: StartProxy) -> None:
    first, second = await start(), await start()
    for proxy in (first, second):
        assert (await run_async(tmp_path, "stats", "--url", proxy.url, "--data-dir", str(tmp_path))).code == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_stats_without_a_running_one_say_so(tmp_path: Path) -> None:
    port = str(_free_port())
    ran = run(tmp_path, "stats", "--port", port)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        f"nearhit: no nearhit answers at http://127.0.0.1:{port} (Connection refused); "
        "is it running, and on this port?\n"
    )


@pytest.mark.parametrize(
    ("host", "shown"), [("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("localhost", "localhost")]
)
def test_stats_ask_at_the_address_that_is_listened_on(tmp_path: Path, host: str, shown: str) -> None:
    port = _free_port()
    ran = run(tmp_path, "stats", "--host", host, "--port", str(port))
    assert ran.code == 1
    assert f"no nearhit answers at http://{shown}:{port} (" in ran.err
    assert "Invalid" not in ran.err


@pytest.mark.parametrize("url", ["localhost:8090", "ftp://localhost", "http://", "http://a b", "http://x:port", "/-/"])
def test_stats_of_a_bad_url_are_one_line_and_exit_code_1(tmp_path: Path, url: str) -> None:
    ran = run(tmp_path, "stats", "--url", url)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: ")
    assert ran.err.count("\n") == 1


@contextmanager
def other_server(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Something that is no nearhit; the list fills with the targets asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b"\xff"), (200, b"1"), (404, b"{}"), (404, b'{"error": "x"}')],
)
def test_stats_of_another_server_are_one_line_and_exit_code_1(tmp_path: Path, status: int, body: bytes) -> None:
    with other_server(status, body) as (url, _):
        ran = run(tmp_path, "stats", "--url", url)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: ")
    assert ran.err.count("\n") == 1


def test_stats_follow_no_redirect_with_the_token(tmp_path: Path) -> None:
    with (
        other_server(200, b"{}") as (elsewhere, asked),
        other_server(302, b"", {"Location": f"{elsewhere}/x"}) as (url, _),
    ):
        ran = run(tmp_path, "stats", "--url", url, NEARHIT_ADMIN_TOKEN="opensesame")
    assert (ran.code, asked) == (1, [])


def test_stats_of_what_does_not_speak_http_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        ran = run(tmp_path, "stats", "--port", str(server.getsockname()[1]))
        thread.join()
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("nearhit: no nearhit answers at ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"with\nline breaks\n"])
def test_a_damaged_local_token_is_no_reason_to_crash(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admin.token").write_bytes(content)
    ran = run(tmp_path, "stats", "--port", str(_free_port()), "--data-dir", str(tmp_path))
    assert (ran.code, ran.out) == (1, "")
    assert "(Connection refused)" in ran.err


# Another distribution in our folders


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The packages in a folder of their own, as pip puts them into an environment."""
    for package in ("proxy", "storage"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "migrations", tmp_path / "site" / "storage" / "migrations", dirs_exist_ok=True)
    shutil.copy(ROOT / "config.yaml", tmp_path / "site" / "proxy" / "config.yaml")
    return tmp_path / "site"


def run_copy(site: Path, *arguments: str) -> Ran:
    return run(site.parent, *arguments, program=(sys.executable, "-m", "proxy"), PYTHONPATH=str(site))


def distribute(site: Path, name: str, record: str, metadata: str | None = None) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata or f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(record)


def test_another_package_in_our_folder_is_refused_in_one_line(copied: Path) -> None:
    distribute(copied, "proxy_tools", "proxy/x.py,,\nproxy_tools-1.0.dist-info/RECORD,,\n")
    for command in ("config", "stats", "serve"):
        message = f"nearhit: the package proxy_tools shares the folder {copied / 'proxy'}: "
        expected = message + "install nearhit in an environment of its own\n"
        assert run_copy(copied, command) == Ran(1, "", expected)


def test_another_package_in_our_storage_folder_is_refused(copied: Path) -> None:
    distribute(copied, "storage", "storage/x.py,,\n")
    ran = run_copy(copied, "config")
    assert (ran.code, ran.out) == (1, "")
    assert f"the package storage shares the folder {copied / 'storage'}" in ran.err


def test_our_own_and_unrelated_packages_are_no_reason_to_stop(copied: Path) -> None:
    distribute(copied, "nearhit", "proxy/cli.py,,\nstorage/base.py,,\n")
    distribute(copied, "unrelated", "unrelated/proxy/x.py,,\nunrelated/storage.py,,\n")
    distribute(copied, "nameless", "nameless.py,,\n", "Metadata-Version: 2.1\n")
    (copied / "~left-1.0.dist-info").mkdir()
    (copied / "broken-1.0.egg-info").write_bytes(b"\xff\xfe")
    ran = run_copy(copied, "config", "--json")
    assert (ran.code, ran.err) == (0, "")


def test_an_installed_copy_prints_the_annotated_default(copied: Path) -> None:
    assert yaml.safe_load(run_copy(copied, "config", "--default").out)
