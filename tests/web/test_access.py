"""Who may use the admin routes: the rules one by one, then over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from multidict import CIMultiDict

from proxy.web.access import TOKEN_HEADER, Policy, refusal
from tests.conftest import Proxy, StartProxy, running_proxy, settings_for
from tests.fake_model import FakeModel

OPEN = Policy(token="", local_token="local-secret")
LOCKED = Policy(token="set-secret", local_token="local-secret")
HOST = "127.0.0.1:8090"


def why(
    policy: Policy = OPEN,
    headers: Mapping[str, str] | None = None,
    peer: str | None = "127.0.0.1",
    *,
    shows_text: bool = False,
    shared: bool = True,
) -> str | None:
    fields = CIMultiDict({"Host": HOST, **(headers or {})})
    return refusal(policy, fields, peer, shows_text=shows_text, shared=shared)


# Without a token: this machine only


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host", [HOST, "127.0.0.1", "localhost", "LocalHost:8090", "[::1]:8090", "127.9.9.9:1", "[::ffff:127.0.0.1]:1"]
)
def test_this_machine_may_ask_at_a_loopback_address(peer: str, host: str) -> None:
    assert why(headers={"Host": host}, peer=peer) is None


@pytest.mark.parametrize(
    "peer",
    ["192.168.1.7", "10.0.0.1", "0.0.0.0", "8.8.8.8", "fe80::1%eth0", "::ffff:10.0.0.1", "2001:db8::1", "", None],
)
def test_another_machine_may_not(peer: str | None) -> None:
    assert "only this machine" in (why(peer=peer) or "")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8090",
        "localhost.evil.example",
        "127.0.0.1.evil.example:8090",
        "192.168.1.7:8090",
        "0.0.0.0:8090",
        "[::ffff:192.168.1.7]:8090",
        "[2001:db8::1]",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1",
        "127.0.0.1/evil.example",
        "127.0.0.1?evil.example",
        "[::1",
        "[127.0.0.1]x",
        "",
    ],
)
def test_a_page_that_had_its_name_point_here_may_not(host: str) -> None:
    assert "only this machine" in (why(headers={"Host": host}) or "")


def test_a_request_without_a_host_may_not() -> None:
    assert refusal(OPEN, CIMultiDict({}), "127.0.0.1", shows_text=False, shared=True) is not None


@pytest.mark.parametrize(
    "name",
    [
        "Forwarded",
        "forwarded",
        "Via",
        "VIA",
        "X-Forwarded-For",
        "x-forwarded-for",
        "X-FORWARDED-HOST",
        "X-Forwarded-Proto",
        "X-Forwarded-Server",
        "X-Forwarded-Anything",
    ],
)
@pytest.mark.parametrize("value", ["127.0.0.1", ""])
def test_what_came_through_a_proxy_may_not(name: str, value: str) -> None:
    assert "only this machine" in (why(headers={name: value}) or "")


# Pages of other sites


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost:3000",
        "http://127.0.0.1",
        "http://127.0.0.1:8091",
        "http://127.0.0.1:80900",
        "null",
        "",
        "file://",
        "http://[",
        "http://a℀b",
        "\udcff",
    ],
)
@pytest.mark.parametrize("policy", [OPEN, LOCKED])
@pytest.mark.parametrize("token", [None, "local-secret", "set-secret"])
def test_a_page_of_another_site_may_never(origin: str, policy: Policy, token: str | None) -> None:
    headers = {"Origin": origin} | ({TOKEN_HEADER: token} if token else {})
    assert why(policy, headers) == "requests from other sites' pages are refused"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_request_that_a_browser_marks_as_foreign_may_never(site: str) -> None:
    assert why(headers={"Sec-Fetch-Site": site}) == "requests from other sites' pages are refused"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": f"http://{HOST}"},
        {"Origin": "HTTP://LOCALHOST:8090", "Host": "localhost:8090"},
        {"Origin": "http://[::1]:8090", "Host": "[::1]:8090"},
        {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
def test_our_own_page_may(headers: dict[str, str]) -> None:
    assert why(headers=headers) is None


# Tokens


@pytest.mark.parametrize(
    ("policy", "token"), [(OPEN, "local-secret"), (LOCKED, "local-secret"), (LOCKED, "set-secret")]
)
@pytest.mark.parametrize("peer", ["127.0.0.1", "192.168.1.7", None])
@pytest.mark.parametrize("more", [{}, {"Host": "nearhit.example"}, {"X-Forwarded-For": "8.8.8.8"}, {"Via": "1.1 x"}])
def test_whoever_shows_a_token_may_from_anywhere(
    policy: Policy, token: str, peer: str | None, more: dict[str, str]
) -> None:
    assert why(policy, {TOKEN_HEADER: token, **more}, peer, shows_text=True, shared=False) is None


@pytest.mark.parametrize("peer", ["127.0.0.1", "192.168.1.7"])
def test_once_a_token_is_set_everybody_needs_it(peer: str) -> None:
    assert why(LOCKED, peer=peer) == f"send the admin token as {TOKEN_HEADER}"


@pytest.mark.parametrize(
    "wrong", ["", " ", "set-secret ", "SET-SECRET", "set-secre", "set-secret-and-more", "é", "\udcff", "\U0001f511"]
)
@pytest.mark.parametrize("policy", [OPEN, LOCKED, Policy("", ""), Policy("sésame", "")])
def test_a_wrong_token_is_refused_even_on_this_machine(policy: Policy, wrong: str) -> None:
    assert why(policy, {TOKEN_HEADER: wrong}) == f"the token in {TOKEN_HEADER} is wrong"


def test_an_empty_token_opens_nothing() -> None:
    assert why(Policy("", ""), {TOKEN_HEADER: ""}) is not None


# Routes that show text


@pytest.mark.parametrize(("shows_text", "shared"), [(False, False), (False, True), (True, True)])
def test_this_machine_sees_what_belongs_to_all(shows_text: bool, shared: bool) -> None:
    assert why(shows_text=shows_text, shared=shared) is None


def test_text_of_separate_callers_needs_a_token_even_here() -> None:
    assert "callers have answers of their own" in (why(shows_text=True, shared=False) or "")


# Over HTTP


async def ask(proxy: Proxy, path: str = "/-/stats", **headers: str) -> tuple[int, str]:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await proxy.send("GET", path, headers=fields)
    return answer.status, answer.json.get("error", {}).get("message", "")


async def test_a_refusal_says_what_to_do_in_the_openai_shape(proxy: Proxy) -> None:
    answer = await proxy.send("GET", "/-/stats", headers={"Host": "evil.example"})
    assert answer.status == 403
    assert answer.json == {
        "error": {
            "message": "without admin.token only this machine may ask, at a loopback address; "
            "else send X-Nearhit-Admin",
            "type": "permission_error",
            "code": "admin_refused",
        }
    }


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://["},
        {"Host": "evil.example"},
        {"X_Forwarded_For": "127.0.0.1"},
        {"Via": "1.1 x"},
        {"X_Nearhit_Admin": "wrong"},
        {"X_Nearhit_Admin": "é"},
        {"Sec_Fetch_Site": "cross-site"},
    ],
)
async def test_refused_requests_get_403(proxy: Proxy, headers: dict[str, str]) -> None:
    assert (await ask(proxy, **headers))[0] == 403


async def test_a_token_that_is_no_text_gets_403(proxy: Proxy) -> None:
    request = b"GET /-/stats HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Nearhit-Admin: \xff\xfe\r\nConnection: close\r\n\r\n"
    assert (await raw_exchange(proxy, request)).startswith(b"HTTP/1.1 403 ")


async def raw_exchange(proxy: Proxy, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
    try:
        writer.write(request)
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_the_set_token_and_the_local_one_open_the_door(start: StartProxy) -> None:
    proxy = await start(admin__token="opensesame")
    assert (await ask(proxy))[0] == 403
    assert (await ask(proxy, X_Nearhit_Admin="opensesame"))[0] == 200
    assert (await ask(proxy, X_Nearhit_Admin=proxy.services.local_token))[0] == 200
    assert (await ask(proxy, X_Nearhit_Admin="opensesame", Origin="https://evil.example"))[0] == 403


@pytest.mark.parametrize("path", ["/-/healthy", "/-/ready"])
async def test_health_needs_no_token(start: StartProxy, path: str) -> None:
    proxy = await start(admin__token="opensesame")
    assert (await ask(proxy, path, Host="nearhit.example", X_Forwarded_For="8.8.8.8"))[0] == 200


@pytest.mark.parametrize("path", ["/-/", "/-/nothing", "/-/entries/", "/-/stats/", "/-/..%2Fv1", "/-/healthy/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_unknown_admin_paths_are_guarded_and_never_go_upstream(
    start: StartProxy, model: FakeModel, path: str, method: str
) -> None:
    proxy = await start(admin__token="opensesame")
    before = len(model.seen)
    refused = await proxy.send(method, path)
    allowed = await proxy.send(method, path, headers={"X-Nearhit-Admin": "opensesame"})
    assert (refused.status, allowed.status) == (403, 404)
    assert not [seen for seen in model.seen[before:] if "/-" in seen.target]


def test_the_local_token_is_in_a_private_file(tmp_path: Path) -> None:
    async def token() -> str:
        async with running_proxy(settings_for(tmp_path, "http://127.0.0.1:9")) as proxy:
            return proxy.services.local_token

    shown = asyncio.run(token())
    file = tmp_path / "admin.token"
    assert file.read_text(encoding="ascii") == shown
    assert len(shown) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
