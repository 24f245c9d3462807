"""Export and import over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.importing import BATCH
from proxy.web.transfer import EXPORTS
from storage.base import Put
from storage.listing import Which
from storage.renewal import RenewableStore
from tests.cache.test_transfer import line_of, stored
from tests.conftest import Answer, Proxy, StartProxy, eventually, running_proxy, settings_for
from tests.fake_model import FakeModel, chat_body, numbered

Row = dict[str, Any]


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def row(number: int, **changes: Any) -> Row:
    """An entry's line, as the fields that it has."""
    now = now_ms()
    entry = stored(
        key=number.to_bytes(32, "big"),
        words=f"question {number}",
        stored_ms=now - 1000,
        expires_ms=now + 3_600_000,
    )
    return {**json.loads(line_of(entry)), "mark": number, **changes}


def lines(*rows: Mapping[str, Any] | str) -> bytes:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows).encode()


def whole(*rows: Mapping[str, Any]) -> bytes:
    """A file with these entries."""
    return lines({"nearhit_export": 1}, *rows, {"end": True, "entries": len(rows)})


async def export(proxy: Proxy, query: str = "") -> list[Row]:
    answer = await proxy.send("GET", f"/-/export{query}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/x-ndjson")
    assert answer.body.endswith(b"\n")
    return [json.loads(line) for line in answer.body.splitlines()]


async def bring(proxy: Proxy, body: Any, query: str = "") -> Answer:
    return await proxy.post(f"/-/import{query}", data=BytesIO(body) if isinstance(body, bytes) else body)


async def filled(proxy: Proxy, *rows: Mapping[str, Any]) -> Proxy:
    answer = await bring(proxy, whole(*rows))
    assert (answer.status, answer.json["imported"]) == (200, len(rows)), answer.body
    return proxy


def counts(answer: Answer) -> dict[str, Any]:
    """What became of the lines, where that is not zero."""
    told = answer.json if answer.status == 200 else answer.json["import"]
    names = ("imported", "replaced", "known", "expired", "evicted", "bad_count", "complete")
    return {name: told[name] for name in names if told[name]}


def chat_of(size: int) -> Row:
    return chat_body("x" * size)


def without_marks(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in one.items() if name != "mark"} for one in rows if "key" in one]


@contextmanager
def no_store(proxy: Proxy) -> Iterator[None]:
    """Between two stores, there is none."""
    renewable = proxy.services.store
    assert isinstance(renewable, RenewableStore)
    renewable.current, before = None, renewable.current
    try:
        yield
    finally:
        renewable.current = before


# Export


async def test_an_export_has_a_header_every_entry_and_an_end(proxy: Proxy) -> None:
    for question in ("one", "two", "three"):
        await proxy.chat(question)
    await proxy.settled()
    header, *entries, end = await export(proxy)
    assert (header["nearhit_export"], header["filters"]) == (1, {})
    assert header["exported"].endswith("+00:00")
    assert [entry["words"] for entry in entries] == ["one", "two", "three"]
    assert entries[0]["answer"]["choices"][0]["message"]["content"] == "Hello there."
    assert end == {"end": True, "entries": 3}


async def test_an_empty_store_is_exported_as_one(proxy: Proxy) -> None:
    assert [*(await export(proxy))[1:]] == [{"end": True, "entries": 0}]


async def test_an_export_goes_on_after_a_mark(proxy: Proxy) -> None:
    await filled(proxy, *(row(n) for n in range(1, 6)))
    every = (await export(proxy))[1:-1]
    rest = await export(proxy, f"?after={every[2]['mark']}")
    assert rest[1:] == [*every[3:], {"end": True, "entries": 2}]


async def test_an_export_of_what_is_meant(proxy: Proxy) -> None:
    rows = [row(1, model="a"), row(2, model="b"), row(3, model="a", words="Über uns")]
    await filled(proxy, *rows)
    header, *entries, end = await export(proxy, "?model=a&text=%C3%BCBER")
    assert header["filters"] == {"model": "a", "text": "üBER"}
    assert [entry["key"] for entry in entries] == [rows[2]["key"]]
    assert end["entries"] == 1


async def test_an_export_of_many_entries_is_whole(proxy: Proxy) -> None:
    rows = [row(n) for n in range(1, 1300)]
    await filled(proxy, *rows)
    assert [entry["key"] for entry in (await export(proxy))[1:-1]] == [one["key"] for one in rows]


@pytest.mark.parametrize(
    "query", ["?after=-1", "?after=x", "?after=1&after=2", "?limit=5", "?order=newest", "?colour=red", "?endpoint=x"]
)
async def test_an_export_says_what_is_wrong_with_its_query(proxy: Proxy, query: str) -> None:
    answer = await proxy.send("GET", f"/-/export{query}")
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_selection")
    assert answer.json["error"]["message"].startswith(query[1:].partition("=")[0])


async def test_a_damaged_entry_does_not_end_an_export(proxy: Proxy) -> None:
    await filled(proxy, row(1), row(2))
    page = await proxy.services.store.select(Which(), 0, 1, answers=True)
    damaged = replace(page.listed[0].entry, answer=b"{")
    await proxy.services.store.write([Put(damaged)])
    _, *entries, end = await export(proxy)
    assert ([entry["words"] for entry in entries], end["entries"]) == (["question 2"], 1)


async def test_an_export_that_cannot_begin_is_an_error(proxy: Proxy) -> None:
    with no_store(proxy):
        answer = await proxy.send("GET", "/-/export")
    assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")


async def test_an_export_whose_store_fails_in_the_middle_has_no_end(start: StartProxy, tmp_path: Path) -> None:
    proxy = await start()
    await filled(proxy, *(row(n, answer=chat_of(100_000)) for n in range(1, 400)))
    async with proxy.session.get(f"{proxy.url}/-/export") as response:
        first = await response.content.readline()
        # The client reads no further for now, so that the server has to wait in the middle.
        with no_store(proxy):
            rest = await response.content.read()
    assert json.loads(first)["nearhit_export"] == 1
    assert rest.endswith(b"\n")
    whole_lines = [json.loads(line) for line in rest.splitlines()]
    assert 0 < len(whole_lines) < 399
    assert "end" not in whole_lines[-1]
    missing = await export(proxy, f"?after={whole_lines[-1]['mark']}")
    assert len(whole_lines) + missing[-1]["entries"] == 399


async def test_a_client_that_leaves_ends_the_export(start: StartProxy) -> None:
    proxy = await start()
    await filled(proxy, *(row(n, answer=chat_of(100_000)) for n in range(1, 200)))
    async with proxy.session.get(f"{proxy.url}/-/export") as response:
        await response.content.readline()
        response.close()
    assert (await export(proxy))[-1]["entries"] == 199


# Import


async def test_what_is_imported_is_served(start: StartProxy, tmp_path: Path, model: FakeModel) -> None:
    model.respond = numbered()
    first = await start()
    said = [(await first.chat(question)).json["choices"] for question in ("one", "two")]
    await first.settled()
    taken = (await first.send("GET", "/-/export")).body
    async with running_proxy(settings_for(tmp_path / "other", model.url)) as second:
        answer = await bring(second, taken)
        assert (answer.status, counts(answer)) == (200, {"imported": 2, "complete": True})
        assert without_marks(await export(second)) == without_marks([json.loads(one) for one in taken.splitlines()])
        for question, expected in zip(("one", "two"), said, strict=True):
            hit = await second.chat(question)
            assert (hit.outcome, hit.json["choices"]) == ("HIT", expected)
            assert (await second.chat(question, stream=True)).outcome == "HIT"


async def test_what_is_imported_is_found_in_other_words(start: StartProxy, tmp_path: Path, model: FakeModel) -> None:
    first = await start()
    await first.chat("How do I reset the router in the living room?")
    await first.settled()
    taken = (await first.send("GET", "/-/export")).body
    async with running_proxy(settings_for(tmp_path / "other", model.url)) as second:
        await bring(second, taken)
        await eventually(lambda: second.services.near is not None)
        alike = "hey, how can I reset the router in the living room? thanks!"
        async with asyncio.timeout(60):
            while (await second.chat(alike, headers={"Cache-Control": "only-if-cached"})).outcome != "NEAR":
                await asyncio.sleep(0.05)


async def test_importing_again_changes_nothing(proxy: Proxy) -> None:
    body = whole(*(row(n, hits=n) for n in range(1, 4)))
    await bring(proxy, body)
    before = await export(proxy)
    again = await bring(proxy, body)
    assert (again.status, counts(again)) == (200, {"known": 3, "complete": True})
    assert (await export(proxy))[1:] == before[1:]
    assert [entry["hits"] for entry in before[1:-1]] == [1, 2, 3]


async def test_the_newer_of_two_stays(proxy: Proxy) -> None:
    now = now_ms()
    old, new = row(1, stored_ms=now - 5000, model="old"), row(1, stored_ms=now - 4000, model="new")
    assert counts(await bring(proxy, whole(old)))["imported"] == 1
    assert counts(await bring(proxy, whole(new)))["replaced"] == 1
    assert counts(await bring(proxy, whole(old)))["known"] == 1
    assert [entry["model"] for entry in (await export(proxy))[1:-1]] == ["new"]
    both = await bring(proxy, whole(row(2, stored_ms=now - 9), row(2, stored_ms=now - 8), row(2, stored_ms=now - 10)))
    assert counts(both) == {"imported": 1, "replaced": 1, "known": 1, "complete": True}


async def test_a_replaced_answer_is_not_served_any_more(proxy: Proxy, model: FakeModel) -> None:
    await proxy.chat("one")
    await proxy.settled()
    assert (await proxy.chat("one")).outcome == "HIT"
    (entry,) = (await export(proxy))[1:-1]
    entry["answer"]["choices"][0]["message"]["content"] = "Newer."
    entry["stored_ms"] += 1
    assert counts(await bring(proxy, whole(entry)))["replaced"] == 1
    hit = await proxy.chat("one")
    assert (hit.outcome, hit.json["choices"][0]["message"]["content"]) == ("HIT", "Newer.")


async def test_new_entries_are_found_though_they_came_with_some_that_took_places(
    start: StartProxy, tmp_path: Path, model: FakeModel
) -> None:
    questions = [f"question {number}" for number in range(8)]
    first = await start()
    for question in questions:
        await first.chat(question)
    await first.settled()
    entries = (await export(first))[1:-1]
    async with running_proxy(settings_for(tmp_path / "other", model.url)) as second:
        for question in questions[4:]:
            await second.chat(question)
        await second.settled()
        assert (await export(second))[-1]["entries"] == 4
        now = now_ms()
        # All are newer, and the new ones come first: they get the places in the file that the old ones leave.
        answer = await bring(second, whole(*({**entry, "stored_ms": now} for entry in entries)))
        assert counts(answer) == {"imported": 4, "replaced": 4, "complete": True}
        assert {(await second.chat(question)).outcome for question in questions} == {"HIT"}


async def test_what_has_expired_is_passed_over_unless_it_is_kept_for_a_while(proxy: Proxy) -> None:
    now = now_ms()
    old = {"stored_ms": now - 9000, "expires_ms": now - 5000}
    answer = await bring(proxy, whole(row(1, **old), row(2, **old, grace_ms=1000), row(3, **old, grace_ms=60_000)))
    assert counts(answer) == {"imported": 1, "expired": 2, "complete": True}


async def test_entries_of_another_model_are_told(proxy: Proxy) -> None:
    await proxy.chat("one")
    await proxy.settled()
    (mine,) = (await export(proxy))[1:-1]
    upstream, fingerprint = mine["upstream"], mine["fingerprint"]
    here = row(1, upstream=upstream, fingerprint=fingerprint)
    elsewhere = [row(2, upstream=upstream), row(3, fingerprint=fingerprint)]
    assert (await bring(proxy, whole(here, *elsewhere))).json["other_upstream"] == 2


async def test_bounds_hold_while_much_is_imported(start: StartProxy) -> None:
    proxy = await start(cache__max_entries=100)
    answer = await bring(proxy, whole(*(row(n) for n in range(1, 1001))))
    assert counts(answer) == {"imported": 1000, "evicted": 900, "complete": True}
    assert (await proxy.stats())["cache.size"] == 100


async def test_nothing_readable_is_imported_where_nothing_readable_may_be_kept(start: StartProxy) -> None:
    proxy = await start(cache__store_words="digest")
    answer = await bring(proxy, whole(row(1)))
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_line")
    assert "cache.store_words" in answer.json["error"]["message"]


# Bad lines


async def test_a_bad_line_ends_an_import_and_what_came_before_is_in(proxy: Proxy) -> None:
    body = lines({"nearhit_export": 1}, row(1), "", row(2, cost_ms=-1), row(3))
    answer = await bring(proxy, body)
    assert answer.status == 400
    error = answer.json["error"]
    assert (error["code"], error["type"]) == ("bad_line", "invalid_request_error")
    assert error["message"].startswith("line 4: cost_ms: expected `int` >= 0; the lines before it are in")
    assert answer.json["import"]["lines"] == 3
    assert [entry["words"] for entry in (await export(proxy))[1:-1]] == ["question 1"]


async def test_bad_lines_can_be_skipped(proxy: Proxy) -> None:
    bad: list[Row | str] = ['{"x"', row(5, key="zz"), "\ufeff{}", "[]", row(6, answer={"choices": []})]
    answer = await bring(proxy, lines(row(1), *bad, row(2)), "?bad=skip&first=11")
    assert counts(answer) == {"imported": 2, "bad_count": 5}
    assert [one["line"] for one in answer.json["bad"]] == [12, 13, 14, 15, 16]
    assert answer.json["bad"][1]["why"] == "key: expected 64 hexadecimal digits"
    assert answer.json["lines"] == 7


async def test_no_more_than_a_hundred_bad_lines_are_told(proxy: Proxy) -> None:
    answer = await bring(proxy, b"x\n" * (3 * BATCH), "?bad=skip")
    assert (answer.json["bad_count"], len(answer.json["bad"])) == (3 * BATCH, 100)


async def test_a_file_of_another_format_is_refused_whatever_is_asked(proxy: Proxy) -> None:
    answer = await bring(proxy, lines({"nearhit_export": 2}, row(1)), "?bad=skip")
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_line")
    assert (await export(proxy))[-1]["entries"] == 0


async def test_a_line_that_is_too_long_is_bad_and_the_next_one_good(start: StartProxy) -> None:
    proxy = await start(cache__max_answer_bytes=1024)

    async def sent() -> AsyncIterator[bytes]:
        yield lines(row(1))
        for _ in range(20):
            yield b"x" * 1_000_000
        yield b"\n" + lines(row(2))

    answer = await bring(proxy, sent(), "?bad=skip")
    assert counts(answer) == {"imported": 2, "bad_count": 1}
    assert answer.json["bad"][0]["line"] == 2


async def test_a_file_that_is_cut_off_is_told(proxy: Proxy) -> None:
    body = whole(row(1), row(2))
    assert (await bring(proxy, body)).json["complete"] is True
    for cut in (lines({"nearhit_export": 1}, row(1)), lines(row(1), {"end": True, "entries": 2}), body + lines(row(3))):
        answer = await bring(proxy, cut)
        assert (answer.status, answer.json["complete"]) == (200, False)


async def test_an_import_of_nothing(proxy: Proxy) -> None:
    for body in (b"", b"\n\n \n"):
        answer = await bring(proxy, body)
        assert (answer.status, counts(answer)) == (200, {})


@pytest.mark.parametrize("query", ["?bad=maybe", "?first=0", "?first=x", "?first=-1", "?first=" + "9" * 40, "?first=²"])
async def test_an_import_says_what_is_wrong_with_its_query(proxy: Proxy, query: str) -> None:
    answer = await bring(proxy, whole(row(1)), query)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_query")


async def test_an_import_while_the_store_is_away_says_where_to_go_on(proxy: Proxy) -> None:
    with no_store(proxy):
        answer = await bring(proxy, whole(row(1)), "?first=7")
    assert (answer.status, answer.json["error"]["code"]) == (503, "storage_unavailable")
    assert answer.json["error"]["message"].endswith("go on with line 7")


async def test_an_import_that_comes_too_slowly_is_ended(start: StartProxy) -> None:
    proxy = await start(limits__request_timeout_s=2)
    over = asyncio.Event()

    async def sent() -> AsyncIterator[bytes]:
        yield lines(*(row(n) for n in range(1, BATCH + 1)))
        await over.wait()

    answer = await bring(proxy, sent())
    over.set()
    assert (answer.status, answer.json["error"]["code"]) == (408, "request_timeout")
    assert answer.json["import"]["imported"] == BATCH


async def test_of_a_line_that_broke_off_nothing_is_taken(proxy: Proxy) -> None:
    body = lines(*(row(n) for n in range(1, BATCH + 1)))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    head = f"POST /-/import HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body) + 5000}\r\n\r\n"
    writer.write(head.encode() + body + lines(row(9999))[:-1])
    await writer.drain()
    async with asyncio.timeout(60):
        while (await proxy.stats())["cache.size"] != BATCH:
            await asyncio.sleep(0.01)
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    assert (await export(proxy))[-1]["entries"] == BATCH


# Who may


@pytest.mark.parametrize(("method", "path"), [("GET", "/-/export"), ("POST", "/-/import")])
async def test_only_an_admin_may(start: StartProxy, method: str, path: str) -> None:
    proxy = await start(admin__token="opensesame")
    assert (await proxy.send(method, path)).status == 403
    assert (await proxy.send(method, path, headers={"X-Nearhit-Admin": "opensesame"})).status == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/-/export"), ("POST", "/-/import")])
async def test_where_callers_are_told_apart_this_machine_needs_a_token_too(
    start: StartProxy, method: str, path: str
) -> None:
    proxy = await start(sharing="per-credential")
    assert (await proxy.send(method, path)).status == 403
    headers = {"X-Nearhit-Admin": proxy.services.local_token}
    assert (await proxy.send(method, path, headers=headers)).status == 200


async def test_only_some_exports_run_at_a_time(start: StartProxy) -> None:
    proxy = await start()
    async with AsyncExitStack() as stack:
        # Held open by a reader that has not come to the end.
        semaphore = proxy.app[EXPORTS]
        for _ in range(4):
            await stack.enter_async_context(semaphore)
        refused = await proxy.send("GET", "/-/export")
        assert (refused.status, refused.json["error"]["code"]) == (503, "storage_unavailable")
    assert (await proxy.send("GET", "/-/export")).status == 200
