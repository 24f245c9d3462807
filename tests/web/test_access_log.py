"""The access log: one line for each request, whatever clients send, and nothing that people wrote."""

from __future__ import annotations

import asyncio
import io
import json
import re
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from proxy.lines import lines
from proxy.web.accesslog import AccessLog, Exchange, access_log
from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel, chat_events, reply, sse, streamed

TEXT_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?P<peer>\S+) (?P<method>\S+) (?P<path>\S+) (?P<status>\d+)"
    r" (?P<outcome>[A-Z]+)(?: \((?P<reason>[\w-]+)\))? \d+\.\d ms (?P<bytes>\d+) B"
)


def exchange(path: str = "/v1/models", **changes: object) -> Exchange:
    noted = Exchange("GET", quote(path, errors="surrogateescape"), "127.0.0.1", status=200, sent=12, seconds=0.0123)
    for name, value in changes.items():
        setattr(noted, name, value)
    return noted


def lines_of(format_name: str, *exchanges: Exchange) -> list[str]:
    out = io.StringIO()
    with lines(out) as waiting:
        log = AccessLog(format_name, waiting)
        for one in exchanges:
            log.add(one)
        log.write()
    return out.getvalue().splitlines()


def test_a_text_line() -> None:
    (line,) = lines_of("text", exchange(outcome="MISS", reason="absent"))
    assert line.partition(" ")[2] == "127.0.0.1 GET /v1/models 200 MISS (absent) 12.3 ms 12 B"
    assert TEXT_LINE.fullmatch(line)


def test_a_json_line() -> None:
    (line,) = lines_of("json", exchange(outcome="HIT"))
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {
        "peer": "127.0.0.1",
        "method": "GET",
        "path": "/v1/models",
        "status": 200,
        "outcome": "HIT",
        "reason": "",
        "ms": 12.3,
        "bytes": 12,
    }


@pytest.mark.parametrize(
    "path",
    ["/a\nb", "/a\r\nb", "/a\x1b[31mb", "/\u2028", "/\x85", "/a b", "/a 200 HIT 1.0 ms 1 B", "/\udcff", "/\u202e"],
)
def test_a_path_cannot_break_or_fake_a_text_line(path: str) -> None:
    (line,) = lines_of("text", exchange(path))
    match = TEXT_LINE.fullmatch(line)
    assert match
    assert match["outcome"] == "PASS"
    assert line.isprintable()


def test_a_readable_path_stays_readable() -> None:
    (line,) = lines_of("text", exchange("/v1/modèles"))
    assert "/v1/modèles" in line


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_path_makes_one_line(path: str) -> None:
    (line,) = lines_of("text", exchange(path))
    assert TEXT_LINE.fullmatch(line)
    (line,) = lines_of("json", exchange(path))
    assert json.loads(line)["path"] == path


class Closed(io.StringIO):
    """What stderr is when the program that read it has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_has_gone_costs_lines_and_no_request() -> None:
    with lines(Closed()) as waiting:
        log = AccessLog("text", waiting)
        for _ in range(2500):
            log.add(exchange())
        log.write()


async def test_leaving_writes_what_waits() -> None:
    out = io.StringIO()
    async with access_log("text", out) as log:
        log.add(exchange())
    assert len(out.getvalue().splitlines()) == 1


async def test_leaving_works_when_the_reader_has_gone() -> None:
    async with access_log("text", Closed()) as log:
        log.add(exchange())


def test_many_lines_do_not_pile_up() -> None:
    out = io.StringIO()
    with lines(out) as waiting:
        log = AccessLog("text", waiting)
        for _ in range(1000):
            log.add(exchange())
    assert len(out.getvalue().splitlines()) == 1000


# With a proxy


async def told_of(proxy: Proxy, capsys: pytest.CaptureFixture[str], count: int) -> str:
    """What the log says, once it has that many lines."""
    proxy.services.access.write()
    text = ""
    async with asyncio.timeout(60):
        while text.count("\n") < count:
            await asyncio.sleep(0.005)
            text += capsys.readouterr().err
    return text


SECRETS = ("sk-client-key", "sk-upstream-key", "opensesame", "planted-prompt", "planted-answer", "planted-query")


@pytest.mark.parametrize("format_name", ["text", "json"])
async def test_nothing_that_people_wrote_is_logged(
    start: StartProxy,
    model: FakeModel,
    format_name: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "nearhit")
    model.respond = reply("planted-answer")
    proxy = await start(upstream__api_key="sk-upstream-key", admin__token="opensesame", log__format=format_name)
    headers = {"Authorization": "Bearer sk-client-key", "Cookie": "a=sk-client-key", "X-Nearhit-Admin": "opensesame"}
    for stream in (False, True, False):
        await proxy.chat("planted-prompt", headers=headers, stream=stream, user="planted-prompt")
        await proxy.settled()
    await proxy.send("GET", "/v1/models?key=planted-query", headers=headers)
    await proxy.send("POST", "/v1/chat/completions?key=planted-query", data=b"planted-prompt", headers=headers)
    await proxy.send("GET", "/-/stats?key=planted-query", headers=headers)
    logged = await told_of(proxy, capsys, 6) + caplog.text
    assert logged.count("/v1/chat/completions") == 4
    assert not [secret for secret in (*SECRETS, proxy.services.local_token) if secret in logged]


async def test_each_request_has_its_outcome_and_reason(start: StartProxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = await start(log__format="json")
    await proxy.chat()
    await proxy.settled()
    hit = await proxy.chat()
    await proxy.chat(headers={"Cache-Control": "no-store"})
    await proxy.send("GET", "/v1/models")
    told = [json.loads(line) for line in (await told_of(proxy, capsys, 4)).splitlines()]
    assert [(t["outcome"], t["reason"], t["status"]) for t in told] == [
        ("MISS", "absent", 200),
        ("HIT", "", 200),
        ("BYPASS", "no-store", 200),
        ("PASS", "", 200),
    ]
    assert told[1]["bytes"] == len(hit.body)
    assert all(t["peer"] == "127.0.0.1" and t["ms"] > 0 for t in told)


async def test_line_breaks_in_a_path_stay_in_their_line(start: StartProxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = await start()
    await proxy.send("GET", "/-/a%0Ab%1B%5B31m%20200%20HIT")
    await proxy.send("GET", "/v1/a%0D%0Ab")
    told = (await told_of(proxy, capsys, 2)).splitlines()
    assert len(told) == 2
    assert all(TEXT_LINE.fullmatch(line) for line in told)


async def test_the_access_log_can_be_switched_off(start: StartProxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = await start(log__access="false")
    await proxy.chat()
    proxy.services.access.write()
    assert capsys.readouterr().err == ""


async def test_who_leaves_while_being_written_to_is_logged_as_gone(
    start: StartProxy, model: FakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await start(log__format="json")
    model.respond = streamed(sse(*chat_events("a", "b")[:2], done=False), sse(*chat_events("a", "b")[2:]), hold_after=1)
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "stream": True}
    async with proxy.session.post(f"{proxy.url}/v1/chat/completions", json=body) as leader:
        assert await leader.content.readany()
        prepare = web.StreamResponse.prepare

        async def left_behind(response: web.StreamResponse, request: web.BaseRequest) -> Any:
            writer = await prepare(response, request)
            if "X-Cache" in response.headers and request.transport is not None:
                request.transport.abort()
            return writer

        with monkeypatch.context() as patch:
            # The connection breaks between the head and what there is of the body: nothing has told the handler.
            patch.setattr(web.StreamResponse, "prepare", left_behind)
            with pytest.raises(aiohttp.ClientError):
                await proxy.chat(stream=True)
        model.release.set()
        await leader.read()
    told = [json.loads(line) for line in (await told_of(proxy, capsys, 2)).splitlines()]
    assert [(t["outcome"], t["status"]) for t in told] == [("JOINED", 499), ("MISS", 200)]
