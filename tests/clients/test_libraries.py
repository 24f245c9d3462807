"""What single libraries can do beside asking a question."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.clients.asking import Library
from tests.clients.serving import Served, repeated, serving
from tests.llama_server import Flags, LlamaServer

pytestmark = [pytest.mark.slow, pytest.mark.model]

QUESTION = "Name one fruit."


def only(*names: str) -> pytest.MarkDecorator:
    """For these libraries alone."""
    return pytest.mark.parametrize("sdk", names, indirect=True, scope="package")


# openai-python


@only("openai_python")
def test_openai_shows_where_an_answer_came_from(nearhit: Served, sdk: Library, system: str) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system}
    miss = sdk.run("raw", **order).said
    assert (miss["headers"]["x-cache"], nearhit.outcomes()) == ("MISS", ["MISS"])
    hit = repeated(nearhit, lambda: sdk.run("raw", **order)).said
    assert hit["text"] == miss["text"]
    assert hit["headers"]["cache-status"].startswith("nearhit; hit;")
    assert int(hit["headers"]["age"]) >= 0


@pytest.mark.parametrize(
    ("extra", "outcome"),
    [
        ({"extra_body": {"cache": {"no-cache": True}}}, "MISS"),
        ({"extra_body": {"cache": {"no-store": True}}}, "BYPASS"),
        ({"extra_headers": {"Cache-Control": "no-cache"}}, "MISS"),
        ({"extra_headers": {"Cache-Control": "no-store"}}, "BYPASS"),
        ({"extra_headers": {"Cache-Control": "max-age=600"}}, "HIT"),
    ],
    ids=["body no-cache", "body no-store", "no-cache", "no-store", "max-age"],
)
@only("openai_python")
def test_openai_can_steer_the_cache(
    nearhit: Served, sdk: Library, system: str, extra: dict[str, Any], outcome: str
) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system}
    sdk.run("raw", **order)
    nearhit.outcomes()
    repeated(nearhit, lambda: sdk.run("raw", **order))
    assert sdk.run("raw", **order, **extra).said["headers"]["x-cache"] == outcome
    nearhit.outcomes()


@only("openai_python")
def test_openai_is_told_that_an_answer_is_not_known(nearhit: Served, sdk: Library, system: str) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system}
    told = sdk.run("raw", **order, extra_headers={"Cache-Control": "only-if-cached"})
    assert "504" in told.error
    assert nearhit.outcomes(3) == ["MISS"] * 3, "it tries three times, as it does for every 504"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@only("openai_python")
def test_openai_gets_responses_from_the_cache(nearhit: Served, sdk: Library, system: str, stream: bool) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system}
    first = sdk.run("respond", stream=stream, **order)
    assert (first.error, nearhit.outcomes()) == ("", ["MISS"])
    assert repeated(nearhit, lambda: sdk.run("respond", stream=stream, **order)) == first
    assert sdk.run("respond", stream=not stream, **order) == first
    assert nearhit.outcomes() == ["HIT"]


# LangChain


@only("langchain")
def test_langchain_gets_a_batch_from_the_cache(nearhit: Served, sdk: Library, system: str) -> None:
    ask = partial(sdk.run, "batch", base=nearhit.url, system=system)
    questions = ["Name one fruit.", "Name one river."]
    first = [ask(questions=[question]).said[0] for question in questions]
    nearhit.outcomes(2)
    for question in questions:
        repeated(nearhit, partial(ask, questions=[question]))
    assert ask(questions=questions).said == first
    assert nearhit.outcomes(2) == ["HIT", "HIT"]


@only("langchain")
def test_langchain_counts_the_tokens_of_a_streamed_answer_from_the_cache(
    nearhit: Served, sdk: Library, system: str
) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system}
    first = sdk.run("usage", **order).said
    nearhit.outcomes()
    assert first["usage"]["output_tokens"] > 0
    assert repeated(nearhit, lambda: sdk.run("usage", **order)).said == first


# LiteLLM


@only("litellm")
def test_litellm_steers_the_cache_by_extra_body_alone(nearhit: Served, sdk: Library, system: str) -> None:
    order = {"base": nearhit.url, "question": QUESTION, "system": system, "stream": False}
    sdk.run("ask", **order)
    nearhit.outcomes()
    repeated(nearhit, lambda: sdk.run("ask", **order))
    sdk.run("ask", **order, extra_body={"cache": {"no-cache": True}})
    assert nearhit.outcomes() == ["MISS"]
    sdk.run("ask", **order, cache={"no-cache": True})
    assert nearhit.outcomes() == ["HIT"], "this is for LiteLLM's own cache, and not sent"


# Embeddings


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with (
        LlamaServer(Flags(embeddings=True)) as llama,
        serving(llama.url, tmp_path_factory.mktemp("embedder")) as served,
    ):
        served.confirmed()
        yield served


@only("openai_python", "langchain", "llama_index", "litellm")
def test_vectors_come_from_the_cache_one_by_one(embedder: Served, sdk: Library, system: str) -> None:
    texts = [f"{system} {number}" for number in ("One.", "Two.", "Three.")]
    first = sdk.run("embed", base=embedder.url, texts=texts[:2])
    assert (first.error, embedder.outcomes()) == ("", ["MISS"])
    assert repeated(embedder, lambda: sdk.run("embed", base=embedder.url, texts=texts[:2])) == first
    mixed = sdk.run("embed", base=embedder.url, texts=[texts[2], texts[1]]).said
    assert mixed[1] == first.said[1]
    assert mixed[0] not in first.said


@only("anthropic_python")
def test_what_was_warmed_is_known_to_anthropic(nearhit: Served, sdk: Library, system: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "tiny", "max_tokens": 12, "system": system, "messages": messages}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/messages", "body": body}
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "proxy", "warm", str(questions), "--url", nearhit.url, "--data-dir", str(tmp_path)]
    subprocess.run(command, check=True)
    nearhit.outcomes()
    sdk.ask(nearhit.url, QUESTION, system, stream=False)
    assert nearhit.outcomes() == ["HIT"]
