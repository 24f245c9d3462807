"""nearhit doctor, with and without a running nearhit: what it says, and that it changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import web

from proxy import __version__
from proxy.diagnosis.clock import clock, date_ms
from proxy.diagnosis.files import database, space
from proxy.finding import Severity
from storage.base import Put
from storage.migrate import shipped
from storage.sqlite import open_sqlite
from storage.sqlite_offline import Ahead
from tests.conftest import StartProxy
from tests.fake_model import FakeModel
from tests.program.test_cli import Ran, run, run_async
from tests.storage.engines import NOW, entry, near, sketch
from tests.storage.files import damage, damage_all_but_header, snapshot
from tests.web.test_explain import ask, asking
from tests.web.test_near import with_near

DATA = Path(__file__).parents[1] / "storage" / "data"
SCHEMA = len(shipped("sqlite"))
NOTE = "note: nearhit is not running at the configured address"
SMALL = {"NEARHIT_CACHE_MAX_BYTES": "1048576"}
"""So that no disk of a test machine is too small."""


async def doctor(home: Path, model: FakeModel, *arguments: str, **changes: str) -> Ran:
    """Without a running one: nobody listens on port 0."""
    place = ("--data-dir", str(home / "data"), "--port", "0", "--upstream", model.url)
    return await run_async(home, "doctor", *place, *arguments, **{**SMALL, **changes})


async def told(home: Path, model: FakeModel, *arguments: str, **changes: str) -> list[tuple[str, str]]:
    """What it says without a running one, but for the note that none runs."""
    ran = await doctor(home, model, "--json", *arguments, **changes)
    assert ran.err == ""
    found = json.loads(ran.out)
    assert all(set(one) == {"severity", "what", "advice"} for one in found)
    rest = [one for one in found if not NOTE.endswith(one["what"].partition(":")[0])]
    assert len(rest) == len(found) - 1
    assert ran.code == any(one["severity"] == "problem" for one in rest)
    return [(one["severity"], f"{one['what']}; {one['advice']}") for one in rest]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sound database with 20 entries in the data directory."""
    path = tmp_path / "data" / "nearhit.db"
    asyncio.run(fill(path))
    return path


async def fill(path: Path) -> None:
    async with open_sqlite(path) as store:
        await store.write([Put(near(n, answer=b"x" * 2000), sketch(n, n + 1)) for n in range(1, 21)])


def execute(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


# With a running one


async def test_a_running_one_that_is_well(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start)
    await ask(proxy, asking())
    port = proxy.url.rpartition(":")[2]
    settings = ("--port", port, "--data-dir", str(tmp_path), "--upstream", model.url)
    ran = await run_async(tmp_path, "doctor", *settings, **SMALL)
    assert (ran.code, ran.err) == (0, "")
    *examined, last = ran.out.splitlines()
    assert last == "all is well"
    assert [line[:4] for line in examined] == ["ok  "] * len(examined)
    for name in ("configuration", "data directory", "database file", "disk space", "schema", "contents", "clock"):
        assert any(f"ok  {name} " in line for line in examined)
    assert f"running nearhit  version {__version__}" in ran.out
    assert json.loads((await run_async(tmp_path, "doctor", *settings, "--json", **SMALL)).out) == []


async def test_what_the_running_one_says_is_told_beside_the_files(
    tmp_path: Path, start: StartProxy, model: FakeModel
) -> None:
    proxy = await with_near(start, url="http://127.0.0.1:9")
    port = proxy.url.rpartition(":")[2]
    settings = ("--port", port, "--data-dir", str(tmp_path), "--upstream", "http://127.0.0.1:9")
    ran = await run_async(tmp_path, "doctor", *settings, **SMALL)
    assert ran.code == 1
    # Once, not by both.
    assert ran.out.count("cannot be reached") == 1
    assert "nothing is cached" in ran.out
    assert "ok  schema" in ran.out
    assert "all is well" not in ran.out
    # A file that broke meanwhile is a problem, too.
    found = await run_async(tmp_path, "doctor", *settings[:4], "--upstream", model.url, "--json", **SMALL)
    assert any("it asks http://127.0.0.1:9" in one["what"] for one in json.loads(found.out))


async def test_a_running_one_that_lets_nobody_in_is_advice(tmp_path: Path, start: StartProxy, model: FakeModel) -> None:
    proxy = await with_near(start, admin__token="opensesame")
    port = proxy.url.rpartition(":")[2]
    settings = ("--port", port, "--upstream", model.url, "--json")
    ran = await run_async(tmp_path, "doctor", *settings, **SMALL)
    (advice,) = json.loads(ran.out)
    assert (ran.code, advice["severity"]) == (0, "advice")
    assert "send the admin token" in advice["what"]
    assert "NEARHIT_ADMIN_TOKEN" in advice["advice"]
    ran = await run_async(tmp_path, "doctor", *settings, NEARHIT_ADMIN_TOKEN="opensesame", **SMALL)
    assert json.loads(ran.out) == []


async def test_another_program_on_the_port_is_a_problem(tmp_path: Path, model: FakeModel) -> None:
    port = model.url.rpartition(":")[2]
    ran = await run_async(tmp_path, "doctor", "--port", port, "--upstream", model.url, **SMALL)
    assert ran.code == 1
    assert f"problem: port {port} is taken by something else than nearhit" in ran.out


async def test_another_version_is_told(tmp_path: Path, model: FakeModel) -> None:
    async def other(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/-/healthy":
            return web.json_response({"status": "ok", "version": "0.0.1"})
        if request.path == "/-/doctor":
            findings = [{"severity": "unheard-of", "what": "something new", "advice": ""}]
            return web.json_response({"version": "0.0.1", "findings": findings})
        return None

    model.extra = other
    port = model.url.rpartition(":")[2]
    ran = await run_async(tmp_path, "doctor", "--port", port, "--upstream", model.url, **SMALL)
    assert f"advice: the running nearhit is version 0.0.1, this program {__version__}" in ran.out
    assert "note: something new" in ran.out


# Without


async def test_without_a_running_one_the_rest_is_looked_at(tmp_path: Path, model: FakeModel) -> None:
    ran = await doctor(tmp_path, model)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(NOTE)
    assert f"ok  upstream         {model.url}, openai, tiny" in ran.out
    assert "to be made by the first start" in ran.out
    assert ran.out.endswith("all is well\n")
    assert await asyncio.to_thread(lambda: list(tmp_path.iterdir())) == []


async def test_an_upstream_that_is_down_is_a_problem(tmp_path: Path, model: FakeModel) -> None:
    ((severity, what),) = await told(tmp_path, model, "--upstream", "http://127.0.0.1:9")
    assert severity == "problem"
    assert "upstream http://127.0.0.1:9: the upstream cannot be reached" in what


async def test_an_upstream_that_wants_a_key_or_is_loading_is_a_problem(tmp_path: Path, model: FakeModel) -> None:
    model.key = "sk-upstream"
    ((severity, what),) = await told(tmp_path, model)
    assert (severity, "set upstream.api_key" in what) == ("problem", True)
    assert await told(tmp_path, model, NEARHIT_UPSTREAM_API_KEY="sk-upstream") == []
    model.loading = True
    ((severity, what),) = await told(tmp_path, model, NEARHIT_UPSTREAM_API_KEY="sk-upstream")
    assert (severity, "is loading its model" in what) == ("problem", True)


async def test_the_doctor_asks_for_no_answer_and_shows_no_key(tmp_path: Path, model: FakeModel) -> None:
    model.key = "sk-upstream"
    ran = await doctor(tmp_path, model, NEARHIT_UPSTREAM_API_KEY="sk-wrong")
    assert "sk-wrong" not in ran.out + ran.err
    assert {seen.method for seen in model.seen} == {"GET"}


async def test_warnings_of_the_configuration_are_advice(tmp_path: Path, model: FakeModel) -> None:
    (advice,) = await told(tmp_path, model, NEARHIT_CACHE_TTL_HOUR="1")
    assert advice[0] == "advice"
    assert "did you mean NEARHIT_CACHE_TTL_HOURS?" in advice[1]


def test_a_wrong_configuration_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    assert run(tmp_path, "doctor", "--port", "x") == Ran(2, "", "nearhit: flag: --port: found 'x', expected int\n")


async def test_answers_in_memory_need_no_file(tmp_path: Path, model: FakeModel) -> None:
    ran = await doctor(tmp_path, model, "--cache-persist", "off")
    assert "ok  database file    none: cache.persist is off" in ran.out
    assert "schema" not in ran.out


async def test_names_cannot_give_commands_to_the_terminal(tmp_path: Path, model: FakeModel) -> None:
    ran = await doctor(tmp_path, model, "--data-dir", f"{tmp_path}/\x1b[31m[bold]x")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "[bold]x" in ran.out


# The files


async def test_a_sound_file_is_well_and_left_as_it_was(tmp_path: Path, file: Path, model: FakeModel) -> None:
    before = await asyncio.to_thread(snapshot, file.parent)
    ran = await doctor(tmp_path, model)
    assert (ran.code, ran.err) == (0, "")
    assert f"ok  schema           {SCHEMA} of {SCHEMA}, 20 entries" in ran.out
    assert "ok  contents         every page and rule" in ran.out
    assert await told(tmp_path, model, "--quick") == []
    assert await asyncio.to_thread(snapshot, file.parent) == before


def a_lost_answer(path: Path) -> None:
    execute(path, "DELETE FROM body WHERE entry = 3")


def damaged_pages(path: Path) -> None:
    damage_all_but_header(path)


def a_damaged_header(path: Path) -> None:
    damage(path, 0, b"\xff" * 60)


def a_newer_schema(path: Path) -> None:
    execute(path, "INSERT INTO migration VALUES (99, '0099_later', 1)")


def a_diary(path: Path) -> None:
    path.write_text("my diary\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (a_lost_answer, "breaks a rule: 1 entries without an answer"),
        (damaged_pages, "nearhit.db is corrupt: "),
        (a_damaged_header, "nearhit.db is corrupt: "),
        (a_newer_schema, "the database has schema 99"),
        (a_diary, "is not a nearhit database"),
        (a_folder, "Is a directory"),
    ],
)
async def test_a_file_that_is_not_well_is_a_problem_and_left_alone(
    tmp_path: Path, file: Path, model: FakeModel, harm: Callable[[Path], None], what: str
) -> None:
    await asyncio.to_thread(harm, file)
    before = await asyncio.to_thread(snapshot, file.parent)
    found = await told(tmp_path, model)
    assert [severity for severity, _ in found] == ["problem"]
    assert what in found[0][1]
    assert await asyncio.to_thread(snapshot, file.parent) == before


async def test_a_quick_look_leaves_the_rules_out(tmp_path: Path, file: Path, model: FakeModel) -> None:
    await asyncio.to_thread(a_lost_answer, file)
    assert await told(tmp_path, model, "--quick") == []


async def test_an_old_file_is_noted(tmp_path: Path, file: Path, model: FakeModel) -> None:
    await asyncio.to_thread(shutil.copyfile, DATA / "v2.db", file)
    before = await asyncio.to_thread(snapshot, file.parent)
    ((severity, what),) = await told(tmp_path, model)
    assert severity == "note"
    assert f"schema 2, this nearhit makes it {SCHEMA}" in what
    assert "nearhit migrate" in what
    assert await asyncio.to_thread(snapshot, file.parent) == before


def open_to_all(file: Path) -> None:
    for name in ("admin.token", "secret"):
        file.with_name(name).write_text("x")
    for path, mode in ((file, 0o644), (file.with_name("admin.token"), 0o640), (file.with_name("secret"), 0o604)):
        path.chmod(mode)
    file.parent.chmod(0o755)


async def test_what_others_may_read_is_told_with_the_command_that_ends_it(
    tmp_path: Path, file: Path, model: FakeModel
) -> None:
    await asyncio.to_thread(open_to_all, file)
    found = await told(tmp_path, model)
    assert [severity for severity, _ in found] == ["advice"] * 4
    for mode, path in (
        (700, file.parent),
        (600, file),
        (600, file.parent / "admin.token"),
        (600, file.parent / "secret"),
    ):
        assert any(what.endswith(f"chmod {mode} {path}") for _, what in found)


async def test_a_place_where_nothing_can_be_made_is_a_problem(tmp_path: Path, model: FakeModel) -> None:
    await asyncio.to_thread((tmp_path / "diary").write_text, "x")
    found = await told(tmp_path, model, "--data-dir", str(tmp_path / "diary" / "data"))
    assert {severity for severity, _ in found} == {"problem"}
    assert f"{tmp_path}/diary is no folder" in found[0][1]


async def test_what_was_set_aside_is_noted(tmp_path: Path, file: Path, model: FakeModel) -> None:
    for suffix in ("", "-wal", "-shm"):
        await asyncio.to_thread(file.with_name(f"nearhit.db.corrupt-20260101T000000-1{suffix}").write_bytes, b"x")
    ((severity, what),) = await told(tmp_path, model)
    assert severity == "note"
    assert "1 corrupt databases were set aside" in what


async def test_a_log_that_grew_is_told(tmp_path: Path, file: Path, model: FakeModel) -> None:
    log = file.with_name("nearhit.db-wal")
    await asyncio.to_thread(log.touch)
    await asyncio.to_thread(os.truncate, log, 70 * 2**20)
    found = await told(tmp_path, model, NEARHIT_CACHE_MAX_BYTES=str(2**27))
    assert found[0][0] == "advice"
    assert "nearhit.db-wal has 70.0 MiB" in found[0][1]


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "9p"])
def test_a_file_on_a_network_mount_is_a_problem(tmp_path: Path, file: Path, kind: str) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:9 / {file.parent} rw - {kind} there rw\n")
    examined, _ = database(file, 2**20, table)
    (problem,) = [finding for one in examined for finding in one.findings]
    assert problem.severity is Severity.PROBLEM
    assert f"is on a network mount ({kind})" in problem.what
    assert "cache.file at a local disk" in problem.what


# Space


@pytest.mark.parametrize(
    ("free", "used", "bound", "said"),
    [
        (10**9, 0, 10**8, []),
        (10**9, 10**9, 2 * 10**9, []),
        (10**9, 0, 10**9 + 1, ["advice"]),
        (10**6, 10**8, 10**8, ["problem"]),
        (10**9, 10**8 + 1, 10**8, ["note"]),
    ],
)
def test_space_is_compared_with_what_the_store_may_take(free: int, used: int, bound: int, said: list[str]) -> None:
    assert [finding.severity for finding in space(free, used, bound)] == said


async def test_a_store_that_may_outgrow_its_disk_is_told(tmp_path: Path, model: FakeModel) -> None:
    ((severity, what),) = await told(tmp_path, model, NEARHIT_CACHE_MAX_BYTES=str(10**18))
    assert (severity, "lower cache.max_bytes" in what) == ("advice", True)


# The clock


HOUR = 3_600_000


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.mark.parametrize(
    ("now", "ahead", "upstream", "said"),
    [
        (NOW + 10**11, None, None, []),
        (NOW + 10**11, Ahead(0, 0), NOW + 10**11 - 59_000, []),
        (0, None, None, ["the clock of this machine says 1970-01-01 00:00:00 UTC: it is not set"]),
        (
            NOW + 10**11,
            Ahead(7, NOW + 10**11 + 3 * HOUR),
            None,
            ["7 entries have times of up to 3 hours from now"],
        ),
        (NOW + 10**11, None, NOW + 10**11 + 61_000, ["the clock of this machine is 61 seconds behind the upstream's"]),
        (NOW + 10**11, None, NOW + 10**11 - 72 * HOUR, ["the clock of this machine is 3 days ahead of the upstream's"]),
    ],
)
def test_a_clock_is_compared_with_what_it_was_and_with_the_upstream_s(
    now: int, ahead: Ahead | None, upstream: int | None, said: list[str]
) -> None:
    assert [finding.what for finding in clock(now, ahead, upstream).findings] == said


@pytest.mark.parametrize("field", [None, "", "yesterday", "Mon, 99 Jan 2026 00:00:00 GMT", "9" * 400])
def test_a_date_that_cannot_be_read_is_none(field: str | None) -> None:
    assert date_ms(field) is None


def test_a_date_is_read_to_the_second() -> None:
    assert date_ms("Tue, 14 Nov 2023 22:13:20 GMT") == NOW


async def test_entries_from_the_future_are_told(tmp_path: Path, file: Path, model: FakeModel) -> None:
    later = now_ms() + 5 * HOUR + 60_000
    async with open_sqlite(file) as store:
        await store.write([Put(entry(99, stored_ms=later, expires_ms=later + HOUR))])
    for arguments in ((), ("--quick",)):
        ((severity, what),) = await told(tmp_path, model, *arguments)
        assert severity == "advice"
        assert "1 entries have times of up to 5 hours from now" in what


async def test_an_upstream_with_another_time_is_told(tmp_path: Path, model: FakeModel) -> None:
    async def dated(request: web.Request) -> web.StreamResponse | None:
        listing = {"object": "list", "data": [{"id": "tiny"}]}
        date = {"Date": "Mon, 01 Jan 2024 00:00:00 GMT"}
        return web.json_response(listing, headers=date) if request.path == "/v1/models" else None

    model.extra = dated
    ((severity, what),) = await told(tmp_path, model)
    assert severity == "advice"
    assert "days ahead of the upstream's" in what


async def test_system_prompts_and_slot_folders_are_looked_at(tmp_path: Path, model: FakeModel) -> None:
    changes = {
        "NEARHIT_PREFIXES_SEEDS": "[{name: gone, file: /nowhere/system.txt}]",
        "NEARHIT_UPSTREAM_SLOT_DIR": "/nowhere/slots",
        "NEARHIT_UPSTREAMS": "[{name: more, url: 'http://127.0.0.1:9'}]",
    }
    found = await told(tmp_path, model, **changes)
    assert ("problem", "prefixes.seeds: gone: /nowhere/system.txt cannot be read: No such file or directory; ") in [
        (severity, text.partition("put it right")[0]) for severity, text in found
    ]
    assert any("upstream.slot_dir: /nowhere/slots is no folder" in text for _, text in found)
    assert any("upstream http://127.0.0.1:9: the upstream cannot be reached" in text for _, text in found)
