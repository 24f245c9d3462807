"""Paths that are spelled otherwise: they lead nowhere that the usual spelling does not, and tell the log no secrets."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Proxy, StartProxy
from tests.fake_model import FakeModel
from tests.web.test_access import raw_exchange
from tests.web.test_access_log import told_of
from tests.web.test_clients import KEYS, named

__all__ = ["named"]


async def exchange(proxy: Proxy, method: str, target: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer to a request whose target is taken to the letter."""
    fields = {"Host": "127.0.0.1", "Content-Length": "0", "Connection": "close", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    answer = await raw_exchange(proxy, f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode())
    told, _, body = answer.partition(b"\r\n\r\n")
    return int(told.split()[1]), body


DECODED = ["/v1%2Fcache/tiny/a", "/v1/cache%2Ftiny/a", "/v1%2fc%61che", "http://h/v1/cache%2Ftiny", "/v1/cache%2F?x=1"]
"""Servers that decode a path before they look at it (uvicorn, RockchipLlama's) take these for their own `/v1/cache`."""


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("target", DECODED)
async def test_the_servers_own_prefix_caches_are_behind_no_other_spelling(
    named: Proxy, model: FakeModel, method: str, target: str
) -> None:
    status, body = await exchange(named, method, target, Authorization=f"Bearer {KEYS['reader']}")
    assert (status, json.loads(body)["error"]["code"]) == (400, "bad_path")
    assert not [seen.target for seen in model.seen if "ache" in seen.target]


@pytest.mark.parametrize("target", DECODED)
async def test_nor_where_no_clients_are_named(proxy: Proxy, model: FakeModel, target: str) -> None:
    assert (await exchange(proxy, "DELETE", target))[0] == 400
    assert not [seen.target for seen in model.seen if "ache" in seen.target]


@pytest.mark.parametrize("target", ["/v1%2Fcaches", "/v1%2Fmodels", "/v1/cache-info%2Fx", "/x/v1%2Fcache"])
async def test_an_encoded_slash_elsewhere_goes_upstream_as_it_came(proxy: Proxy, model: FakeModel, target: str) -> None:
    await exchange(proxy, "GET", target)
    assert target in [seen.target for seen in model.seen]


@pytest.mark.parametrize("target", ["/v1/cache/tiny", "/v1/c%61che/tiny", "/%76%31/cache/tiny/", "/v1/%63ache/t%69ny"])
async def test_prefix_caches_are_found_in_every_spelling_of_their_letters(proxy: Proxy, target: str) -> None:
    status, body = await exchange(proxy, "GET", target, X_Nearhit_Admin=proxy.services.local_token)
    assert (status, json.loads(body)["model"]) == (200, "tiny")


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_of_a_whole_url_the_log_shows_the_path_alone(
    start: StartProxy, capsys: pytest.CaptureFixture[str], log_format: str
) -> None:
    proxy = await start(log__format=log_format)
    targets = (
        "http://me:planted@h/v1/models",
        "http://planted@h/v1/models?key=planted",
        "/v1/models#access_token=planted",
        "http://me:planted@h/-/healthy#planted",
    )
    for target in targets:
        await exchange(proxy, "GET", target)
    logged = await told_of(proxy, capsys, len(targets))
    assert "planted" not in logged
    assert logged.count("/v1/models") == 3
