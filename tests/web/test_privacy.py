"""With `cache.store_words: digest`, whoever gets at the files reads neither questions nor answers; secrets, nobody."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from proxy.cache.dialects import DIALECTS
from proxy.web.scope import Scopes
from storage.base import StorageBusy
from storage.listing import Which
from storage.sqlite_store import SqliteStore
from tests.conftest import Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, reply
from tests.program.test_cli import run
from tests.program.test_serve import serving
from tests.web.test_access import raw_exchange
from tests.web.test_sharing import keyed

QUESTION = "Where did I bury the treasure of Captain Flint?"
SECRET = "Under the third palm tree of Spyglass Island."


def everything_at_rest(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def ask(proxy: Proxy, model: FakeModel) -> list[str]:
    model.respond = reply(SECRET)
    outcomes = []
    for _ in range(2):
        outcomes.append((await proxy.chat(QUESTION)).outcome)
        await proxy.settled()
    await proxy.services.buffer.flush()
    return outcomes


async def test_nothing_can_be_read_at_rest(start: StartProxy, model: FakeModel, tmp_path: Path) -> None:
    proxy = await start(cache__store_words="digest")
    assert await ask(proxy, model) == ["MISS", "HIT"]
    stored = await asyncio.to_thread(everything_at_rest, tmp_path)
    for text in (QUESTION, SECRET, "treasure", "Spyglass"):
        assert text.encode() not in stored
        assert text.lower().encode() not in stored


async def test_answers_are_there_after_a_restart(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__store_words="digest")
    async with running_proxy(settings) as proxy:
        first = await ask(proxy, model)
    async with running_proxy(settings) as proxy:
        answer = await proxy.chat(QUESTION)
        streamed = await proxy.chat(QUESTION, stream=True)
    assert (first, answer.outcome, streamed.outcome) == (["MISS", "HIT"], "HIT", "HIT")
    assert answer.json["choices"][0]["message"]["content"] == SECRET


async def test_other_words_are_not_compared(start: StartProxy, model: FakeModel) -> None:
    proxy = await start(cache__store_words="digest")
    await ask(proxy, model)
    assert (await proxy.chat(f"please {QUESTION}")).outcome == "MISS"
    assert (await proxy.stats())["near"]["state"] == "off"


async def test_what_was_readable_before_goes(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await ask(proxy, model)
    assert SECRET.encode() in await asyncio.to_thread(everything_at_rest, tmp_path)
    async with running_proxy(settings_for(tmp_path, model.url, cache__store_words="digest")) as proxy:
        async with asyncio.timeout(60):
            while (await proxy.services.store.select(Which(sealed=False), 0, 1)).listed:
                await asyncio.sleep(0.02)
        assert (await proxy.chat(QUESTION)).outcome == "MISS"
        await proxy.settled()
    stored = await asyncio.to_thread(everything_at_rest, tmp_path)
    assert SECRET.encode() not in stored
    assert b"treasure" not in stored


async def test_traces_are_wiped_though_it_was_interrupted(
    tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        await ask(proxy, model)
    wiped: list[str] = []

    async def interrupted(_: SqliteStore) -> None:
        wiped.append("interrupted")
        raise StorageBusy("stopped in the middle")

    rewrite = SqliteStore.rewrite
    private = settings_for(tmp_path, model.url, cache__store_words="digest")
    monkeypatch.setattr(SqliteStore, "rewrite", interrupted)
    async with running_proxy(private):
        await eventually(lambda: bool(wiped))

    async def whole(store: SqliteStore) -> None:
        await rewrite(store)
        wiped.append("whole")

    monkeypatch.setattr(SqliteStore, "rewrite", whole)
    async with running_proxy(private):
        await eventually(lambda: wiped[-1] == "whole")
    async with running_proxy(private) as proxy:
        assert await ask(proxy, model) == ["MISS", "HIT"]
    assert wiped == ["interrupted", "whole"]


async def test_back_to_full_both_kinds_are_served(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, cache__store_words="digest")) as proxy:
        await ask(proxy, model)
    async with running_proxy(settings_for(tmp_path, model.url)) as proxy:
        assert (await proxy.chat(QUESTION)).outcome == "HIT"
        await proxy.chat("another one")
        await proxy.settled()
        assert (await proxy.chat("another one")).outcome == "HIT"


async def test_a_damaged_answer_is_a_miss(tmp_path: Path, model: FakeModel) -> None:
    settings = settings_for(tmp_path, model.url, cache__store_words="digest")
    async with running_proxy(settings) as proxy:
        await ask(proxy, model)
    for damage in ("zeroblob(40)", "x'00'", "CAST(answer || x'00' AS BLOB)"):
        await asyncio.to_thread(damage_answers, tmp_path / "nearhit.db", damage)
        async with running_proxy(settings) as proxy:
            assert await ask(proxy, model) == ["MISS", "HIT"]


def damage_answers(path: Path, value: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE body SET answer = {value}")


async def test_files_are_for_their_owner_only(proxy: Proxy, model: FakeModel, tmp_path: Path) -> None:
    await ask(proxy, model)
    modes = await asyncio.to_thread(
        lambda: {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()}
    )
    assert set(modes.values()) == {0o600}, modes


async def test_with_secure_delete_nothing_stays_of_what_was_removed(tmp_path: Path, model: FakeModel) -> None:
    async with running_proxy(settings_for(tmp_path, model.url, cache__secure_delete=True)) as proxy:
        for number in range(30):
            await proxy.chat(f"{QUESTION} {number}", max_tokens=number + 1)
            await ask(proxy, model)
        await proxy.settled()
        answer = await proxy.post("/-/purge", json={"all": True})
        assert answer.status == 200, answer.body
        await proxy.services.store.give_back(1 << 30)
        assert SECRET.encode() not in await asyncio.to_thread(everything_at_rest, tmp_path)


# Secrets: everything that the tests plant has this in it

PLANTED = "planted"
OWN_KEY = "planted-key-of-nearhit"
TOKEN = "planted-admin-token"
NAMED: list[dict[str, Any]] = [
    {"name": "ann", "key": "planted-key-of-ann", "namespace": "home"},
    {"name": "bob", "key": "planted-key-of-bob", "namespace": "home"},
    {"name": "cat", "key": "planted-key-of-cat", "requests_per_minute": 1},
]
BESIDE = {
    "Cookie": "session=planted-cookie",
    "X-Session-Token": "planted-session",
    "Proxy-Authorization": "Basic planted-proxy-key",
    "OpenAI-Organization": "planted-organization",
    "Referer": "http://page.example/?key=planted-referer",
}
QUERY = "?api_key=planted-query&key=planted-second-query"
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": QUESTION}],
    "prompt": QUESTION,
    "input": QUESTION,
    "max_tokens": 9,
    "temperature": 0,
}


class Sender:
    """Sends requests full of secrets and keeps everything that comes back."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self.told = b""
        self.statuses: set[int] = set()

    async def send(self, method: str, path: str, headers: dict[str, str], body: Any = None) -> None:
        headers = {**BESIDE, **headers}
        async with self._session.request(method, self._url + path, headers=headers, json=body) as response:
            self.told += repr(response.raw_headers).encode() + await response.read()
            self.statuses.add(response.status)

    async def everything(self) -> None:
        """Calls on all paths of all dialects, what only passes, what is refused, and what tells of them."""
        ann, bob, cat = ({"Authorization": f"Bearer {one['key']}"} for one in NAMED)
        plain = {"X-Api-Key": NAMED[1]["key"]}
        for path in (path for dialect in DIALECTS for path in dialect.paths):
            for key in (ann, ann, bob, plain, {"Authorization": "Bearer planted-unknown-key"}, {}):
                await self.send("POST", path + QUERY, key, BODY)
        for key in (cat, cat):
            await self.send("POST", "/v1/chat/completions", key, BODY)
        for path in (f"/v1/models{QUERY}", "/v1/cache", f"/props{QUERY}", f"/x?key={NAMED[0]['key']}"):
            await self.send("GET", path, ann)
        await self.send("POST", "/v1/chat/completions", {**ann, "X-Api-Key": "planted-other-key"}, BODY)
        for changed in (BODY, {**BODY, "seed": 7}, {**BODY, "messages": [{"role": "user", "content": "another"}]}):
            for key in (ann, bob, {"X-Nearhit-Admin": TOKEN}, {"X-Nearhit-Admin": "planted-wrong-token"}):
                await self.send("POST", f"/-/explain{QUERY}", key, changed)
                await self.send("POST", "/-/explain?endpoint=chat", key, changed)
        await self.send("POST", "/-/feedback", ann, {"id": "planted", "verdict": "wrong"})
        for path in ("/metrics", "/-/ready", "/-/stats", "/-/doctor", "/-/entries", "/-/export", "/-/nothing"):
            await self.send("GET", path, {"X-Nearhit-Admin": TOKEN})


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_no_secret_of_named_clients_is_at_rest_in_print_or_in_what_is_told(
    tmp_path: Path, model: FakeModel, log_format: str
) -> None:
    model.extra, model.respond = keyed(OWN_KEY), reply(SECRET)
    home, config = tmp_path / "home", tmp_path / "config.yaml"
    upstream, admin = {"api_key": OWN_KEY}, {"token": TOKEN}
    sections = {"upstream": upstream, "admin": admin, "sharing": "clients", "clients": NAMED}
    await asyncio.to_thread(prepare, home, config, sections)
    flags = ("--config", str(config), "--log-format", log_format, "--log-level", "debug")
    async with (
        serving(home, model.url, *flags, PYTHONFAULTHANDLER="1") as nearhit,
        aiohttp.ClientSession() as session,
    ):
        sender = Sender(nearhit.url, session)
        await sender.everything()
        # The access log and the file are written a few times a second; a crash takes with it what waits.
        await eventually(lambda: any("/-/nothing" in line for line in nearhit.lines))
        async with asyncio.timeout(60):
            while SECRET.encode() not in await asyncio.to_thread(everything_at_rest, home):
                await asyncio.sleep(0.02)
        nearhit.send(signal.SIGABRT)
        await nearhit.ended()
    assert {200, 400, 401, 403, 404, 429} <= sender.statuses
    printed = "\n".join(nearhit.lines)
    assert "Current thread" in printed
    assert sum("401" in line for line in nearhit.lines) >= 2 * len(DIALECTS)
    shown = await asyncio.to_thread(run, home, "config", "--config", str(config))
    stored = await asyncio.to_thread(everything_at_rest, home)
    assert SECRET.encode() in stored
    assert SECRET.encode() in sender.told
    for where, text in (("printed", printed), ("config", shown.out + shown.err)):
        assert PLANTED not in text, (where, around(text))
    assert PLANTED not in sender.told.decode("utf-8", "replace"), around(sender.told.decode("utf-8", "replace"))
    assert PLANTED.encode() not in stored
    heard = repr([(seen.target, seen.raw_headers) for seen in model.seen]).replace(OWN_KEY, "")
    # What is in a query and is no client's key was meant for the upstream; so was a page's address.
    for meant in ("planted-query", "planted-second-query", "planted-referer"):
        heard = heard.replace(meant, "")
    assert PLANTED not in heard, around(heard)


def prepare(home: Path, config: Path, sections: dict[str, Any]) -> None:
    home.mkdir()
    config.write_text(yaml.safe_dump(sections))


def around(text: str) -> str:
    at = text.find(PLANTED)
    return text[max(0, at - 200) : at + 100]


async def test_a_fault_of_ours_shows_no_secret(
    start: StartProxy,
    model: FakeModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(_scopes: Scopes, _call: object, headers: object, *_more: object) -> None:
        raise ValueError(f"planted: {headers!r}")

    caplog.set_level("DEBUG")
    proxy = await start(sharing="clients", clients=NAMED)
    monkeypatch.setattr(Scopes, "of", broken)
    answer = await proxy.chat("planted question", headers={"Authorization": "Bearer planted-key-of-ann"})
    proxy.services.access.write()
    await eventually(lambda: "POST" in capsys.readouterr().err)
    assert answer.status == 500
    assert answer.json["error"]["code"] == "internal_error"
    assert PLANTED not in answer.body.decode() + caplog.text


async def test_a_request_that_is_no_http_shows_no_secret(
    start: StartProxy, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    proxy = await start(sharing="clients", clients=NAMED)
    for wrong in (
        b"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer planted-key-of-ann\0\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization planted-key-of-ann\r\n\r\n",
        b"GET /?k=planted-key-of-ann HTTP/9\r\nHost: x\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: x\r\nX-Api-Key: planted-key-of-ann\r\nContent-Length: planted\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer planted" + b"x" * 40_000 + b"\r\n\r\n",
    ):
        assert (await raw_exchange(proxy, wrong)).startswith(b"HTTP/1.0 400 ")
    proxy.services.access.write()
    assert PLANTED not in caplog.text + "".join(capsys.readouterr())
