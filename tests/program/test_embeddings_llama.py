"""Vectors of a real llama.cpp through the installed program, asked by the official client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.llama_server import Flags, LlamaServer
from tests.program.test_llama_cpp import attempts, program, wait_until_confirmed

pytestmark = pytest.mark.model

TEXTS = ["A red apple.", "Ein roter Apfel.", "The sea at night."]


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    with LlamaServer(Flags(context=1024, embeddings=True)) as server:
        yield server.url


@pytest.fixture(scope="module")
def nearhit(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data = str(tmp_path_factory.mktemp("data"))
    with program("proxy", "serve", "--upstream", llama, "--port", "0", "--data-dir", data) as address:
        wait_until_confirmed(address)
        yield address


@pytest.fixture(scope="module")
def client(nearhit: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{nearhit}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def direct(llama: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{llama}/v1", api_key="unused", max_retries=0) as client:
        yield client


def embed(client: openai.OpenAI, given: Any, **more: Any) -> tuple[str, list[list[float]], Any]:
    """Outcome, vectors and the rest of the answer."""
    raw = client.embeddings.with_raw_response.create(model="tiny", input=given, **more)
    answer = raw.parse()
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    outcome = raw.headers.get("x-cache", "")
    status = raw.headers.get("cache-status", "")
    return f"{outcome} {status}", [list(one.embedding) for one in answer.data], answer


def eventually_known(client: openai.OpenAI, given: Any, **more: Any) -> tuple[list[list[float]], Any]:
    """Ask until all of it comes from the cache: it is stored a moment after it was given."""
    for _ in attempts():
        outcome, vectors, answer = embed(client, given, **more)
        if outcome.startswith("HIT"):
            return vectors, answer
    raise AssertionError("never a hit")


def tell(url: str, body: Any) -> tuple[Any, str]:
    """The answer as it is, and its outcome."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response), response.headers.get("X-Cache", "")


def test_a_batch_again_in_any_order_and_form_is_the_same_vectors(client: openai.OpenAI, direct: openai.OpenAI) -> None:
    # The client asks for base64 unless it is told otherwise.
    outcome, first, answer = embed(client, TEXTS)
    assert outcome == "MISS nearhit; fwd=miss"
    assert len({len(vector) for vector in first}) == 1
    again, repeated = eventually_known(client, TEXTS)
    assert (again, repeated.usage, repeated.model) == (first, answer.usage, answer.model)
    backwards, _ = eventually_known(client, TEXTS[::-1])
    assert backwards == first[::-1]
    numbers, _ = eventually_known(client, [TEXTS[1], TEXTS[1]], encoding_format="float")
    assert numbers == [first[1], first[1]]
    assert repeated.usage == embed(direct, TEXTS)[2].usage


def test_a_batch_that_overlaps_asks_for_the_rest_only(client: openai.OpenAI, direct: openai.OpenAI) -> None:
    known = embed(client, TEXTS)[1]
    eventually_known(client, TEXTS)
    outcome, vectors, answer = embed(client, [TEXTS[2], "A boat.", TEXTS[0]])
    assert outcome == "MISS nearhit; fwd=partial"
    assert (vectors[0], vectors[2]) == (known[2], known[0])
    told = embed(direct, ["A boat."])
    # How llama.cpp rounds depends on what it computes along.
    assert vectors[1] == pytest.approx(told[1][0], abs=1e-3)
    assert answer.usage.prompt_tokens > told[2].usage.prompt_tokens


def test_what_is_kept_of_numbers_is_what_the_server_prints(nearhit: str, llama: str) -> None:
    body = {"input": "Print me.", "encoding_format": "float"}
    first, _ = tell(f"{nearhit}/v1/embeddings", body)
    again, outcome = first, ""
    for _ in attempts():
        again, outcome = tell(f"{nearhit}/v1/embeddings", body)
        assert again["data"] == first["data"]
        if outcome == "HIT":
            break
    assert outcome == "HIT"
    assert again.keys() == tell(f"{llama}/v1/embeddings", body)[0].keys()


def test_tokens_are_items_as_well(client: openai.OpenAI) -> None:
    _, first, _ = embed(client, [[1, 2, 3], [4, 5]])
    known, _ = eventually_known(client, [4, 5])
    assert known == [first[1]]


def test_what_llama_cpp_refuses_is_refused(client: openai.OpenAI) -> None:
    for given in ("", [], ["a", ""]):
        with pytest.raises(openai.BadRequestError):
            embed(client, given)
    with pytest.raises(openai.BadRequestError):
        embed(client, "a", encoding_format="hex")


def test_its_own_endpoint_has_another_shape_and_passes_through(nearhit: str, llama: str) -> None:
    (told, _), (passed, _) = (tell(f"{url}/embeddings", {"input": "A boat."}) for url in (llama, nearhit))
    assert isinstance(told, list)
    assert [one.keys() for one in passed] == [one.keys() for one in told]


def test_a_server_that_tells_no_vectors_says_so(tmp_path: Path) -> None:
    with (
        LlamaServer(Flags(context=256)) as server,
        program("proxy", "serve", "--upstream", server.url, "--port", "0", "--data-dir", str(tmp_path)) as address,
    ):
        wait_until_confirmed(address)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
            for _ in range(2):
                with pytest.raises(openai.APIStatusError) as refused:
                    embed(client, TEXTS)
                assert refused.value.status_code == 501
                assert refused.value.response.headers["x-cache"] == "MISS"
