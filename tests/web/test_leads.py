"""What the prompts of calls begin with, on every endpoint: the chat that llama.cpp itself makes of them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.dialects import DIALECTS
from proxy.upstream.prefix import Lead, lead_of_prompt
from proxy.web.leads import lead_in
from tests.llama_server import Flags, LlamaServer
from tests.program.test_prefixes_llama import SERVICES, get, is_ready, nearhit, rows, states, until

SCHEMA = {"type": "object", "properties": {"lamp": {"type": "string"}}, "required": ["lamp"]}
HI = {"role": "user", "content": "hi"}
CLAUDE = "x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=%s;"
FUNCTION = {"type": "function", "name": "dim", "description": "Dim a lamp.", "parameters": SCHEMA}
TOOL = {"name": "dim", "description": "Dim a lamp.", "input_schema": SCHEMA}
TALK = [HI, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and now?"}]


def found(endpoint: str, **body: Any) -> Lead | None:
    return lead_in(endpoint)(json.dumps(body).encode())


def messages(**fields: Any) -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [HI], **fields}


def response(**fields: Any) -> dict[str, Any]:
    return {"max_output_tokens": 1, "input": "hi", **fields}


def system_message(*texts: str, kind: str = "input_text", **fields: Any) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": kind, "text": text} for text in texts], **fields}


# Which there are


def test_a_system_prompt_is_the_same_lead_on_every_endpoint() -> None:
    text = "You switch lamps."
    chat = found("chat", messages=[{"role": "system", "content": text}, HI])
    assert chat == found("messages", **messages(system=text)) == found("responses", **response(instructions=text))
    assert chat == found("messages", **messages(system=[{"type": "text", "text": text, "cache_control": {"x": 1}}]))
    assert chat == found("responses", **response(instructions=text, input=TALK))
    assert chat == lead_of_prompt(text)
    assert chat != found("messages", **messages(system=text + "!"))


def test_leads_know_the_model_and_whether_the_model_has_spoken() -> None:
    for lead in (
        found("messages", **messages(system="S", model="tiny")),
        found("responses", **response(instructions="S", model="tiny")),
    ):
        assert lead is not None
        assert (lead.model, lead.continued, lead.chars) == ("tiny", False, 1)
    called = {"type": "function_call", "name": "dim", "call_id": "1", "arguments": "{}"}
    for lead in (
        found("messages", **messages(system="S", messages=TALK)),
        found("responses", **response(instructions="S", input=TALK)),
        found("responses", **response(instructions="S", input=[HI, called])),
    ):
        assert lead is not None
        assert lead.continued


def test_the_number_that_claude_code_changes_in_every_call_makes_no_new_lead() -> None:
    def of(stamp: str) -> Lead | None:
        blocks = [{"type": "text", "text": CLAUDE % stamp}, {"type": "text", "text": "You are Claude Code."}]
        return found("messages", **messages(system=blocks))

    assert of("a5145") == of("00c0d") != None  # noqa: E711 - one expression tells all three
    assert of("a5145") != of("a51450")


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("messages", messages()),
        ("messages", messages(system=["S"])),
        ("messages", messages(system=[{"type": "image", "source": {}}])),
        ("messages", messages(system={"text": "S"})),
        ("messages", messages(system="S", tools=[{"type": "bash_20250124", "name": "bash"}])),
        ("messages", messages(system="S", tools=[{"input_schema": SCHEMA}])),
        ("messages", messages(system="S", tools=5)),
        ("messages", messages(system="S", messages=[{"role": "system", "content": []}, HI])),
        ("messages", messages(system="S", messages="hi")),
        ("messages", messages(system="S", messages=["hi"])),
        ("messages", messages(system="S", lora=[{"id": 0, "scale": 1}])),
        ("responses", response()),
        ("responses", response(instructions=None)),
        ("responses", response(instructions=[system_message("S")])),
        ("responses", response(instructions="S", input={"role": "user", "content": "hi"})),
        ("responses", response(instructions="S", input=["hi"])),
        ("responses", response(instructions="S", input=[system_message("D", kind="text"), HI])),
        ("responses", response(instructions="S", tools=[{"type": "web_search"}])),
        ("responses", response(instructions="S", tools=[FUNCTION], tool_choice={"type": "function", "name": "dim"})),
        ("responses", response(instructions="S", text={"format": {"type": "json_schema", "schema": SCHEMA}})),
        ("responses", response(instructions="S", text="json")),
        ("responses", response(instructions="S", reasoning="low")),
        ("responses", response(instructions="S", reasoning={"effort": "low"}, reasoning_effort="high")),
        ("responses", response(instructions="S", previous_response_id="resp_1")),
        ("responses", response(instructions="S", conversation="conv_1")),
        ("responses", response(instructions="S", prompt={"id": "pmpt_1"})),
        ("responses", response(instructions="S", lora=[{"id": 0, "scale": 1}])),
        ("completions", {"prompt": "S"}),
        ("embeddings", {"input": "S"}),
        ("unheard-of", {"messages": [{"role": "system", "content": "S"}]}),
    ],
)
def test_where_it_is_not_plain_what_is_rendered_there_is_none(endpoint: str, body: dict[str, Any]) -> None:
    assert found(endpoint, **body) is None


@pytest.mark.parametrize("endpoint", ["chat", "messages", "responses", "completions", "embeddings"])
@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nothing", b'{"messages": [' + b"[" * 100_000, b'"\xff"', b'{"system": "' + b"s" * (5 << 20)]
)
def test_no_body_is_an_error(endpoint: str, body: bytes) -> None:
    assert lead_in(endpoint)(body) is None


def test_every_dialect_is_thought_of() -> None:
    bodies = {
        "chat": {"messages": [{"role": "system", "content": "S"}, HI]},
        "messages": messages(system="S"),
        "responses": response(instructions="S"),
        "completions": None,
        "embeddings": None,
    }
    for dialect in DIALECTS:
        body = bodies[dialect.endpoint]
        assert body is None or found(dialect.endpoint, **body) is not None


# What llama.cpp renders

TEMPLATE = """EFFORT {{ reasoning_effort }} MODE {{ mode }}
{% if tools %}<|im_start|>system
TOOLS{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501 - a line break would be rendered
"""Shows whatever the server hands to a template, and in which form."""


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def shown() -> Iterator[str]:
    """The address of a server that shows the prompts in its slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_SERVER_SLOTS_DEBUG", "1")
        with LlamaServer(Flags(slots=1, context=1024, chat_template=TEMPLATE)) as server:
            yield server.url


RENDERED = [
    ("messages", messages(system="S.")),
    ("messages", messages(system=[{"type": "text", "text": "A."}, {"type": "text", "text": "B."}])),
    ("messages", messages(system=[{"type": "text", "text": CLAUDE % "a5145"}, {"type": "text", "text": "You are."}])),
    ("messages", messages(system="S.", messages=[{"role": "system", "content": "D."}, HI])),
    ("messages", messages(system="S.", messages=[system_message("D.", "E.", kind="text"), HI])),
    ("messages", messages(messages=[{"role": "developer", "content": "D."}, HI])),
    ("messages", messages(system="S.", tools=[TOOL, {"name": "off", "cache_control": {"type": "ephemeral"}}])),
    ("messages", messages(tools=[{**TOOL, "type": "custom"}], tool_choice={"type": "any"})),
    ("messages", messages(system="S.", tools=[TOOL], tool_choice={"type": "none"})),
    ("messages", messages(system="S.", thinking={"type": "enabled", "budget_tokens": 1024})),
    ("messages", messages(system="S.", thinking={"type": "disabled"}, reasoning_effort="low", response_format={})),
    ("messages", messages(system="S.", chat_template_kwargs={"mode": "short"})),
    ("responses", response(instructions="S.")),
    ("responses", response(instructions="S.", input=[{"role": "developer", "content": "D."}, HI])),
    ("responses", response(input=[system_message("D.", "E.", type="message", status="completed"), HI])),
    ("responses", response(instructions="", input=[{"role": "system", "content": "D."}, HI])),
    ("responses", response(instructions="S.", tools=[FUNCTION, {"type": "function", "name": "off", "strict": False}])),
    ("responses", response(tools=[FUNCTION], tool_choice="required", parallel_tool_calls=True)),
    ("responses", response(instructions="S.", reasoning={"effort": "low", "summary": "auto"})),
    ("responses", response(instructions="S.", reasoning={"effort": "none"})),
    ("responses", response(instructions="S.", reasoning={"effort": None}, text={"verbosity": "low"})),
    ("responses", response(instructions="S.", reasoning_effort="high", text={"format": {"type": "text"}})),
    ("responses", response(instructions="S.", chat_template_kwargs={"mode": "short"}, store=False)),
]


@pytest.mark.model
@pytest.mark.parametrize(("endpoint", "body"), RENDERED)
def test_a_lead_is_rendered_as_the_server_renders_the_call(shown: str, endpoint: str, body: dict[str, Any]) -> None:
    lead = found(endpoint, **body)
    assert lead is not None
    post(f"{shown}/v1/{endpoint}", {**body, "temperature": 0})
    (slot,) = get(f"{shown}/slots")
    prompts = [post(f"{shown}/apply-template", lead.with_user(text))["prompt"] for text in ("a", "z")]
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False)))
    assert "system" in shared
    assert slot["prompt"].startswith(shared)


# What it saves

WITH_TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LAMPS = SERVICES["lights"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LlamaServer]:
    (tmp_path / "slots").mkdir()
    flags = Flags(slots=2, context=2048, slot_save_path=f"{tmp_path}/slots/", chat_template=WITH_TOOLS)
    with LlamaServer(flags) as running:
        yield running


def reused(address: str, endpoint: str, body: dict[str, Any]) -> int:
    """The tokens of a call's prompt that the server found in its KV cache."""
    usage = post(f"{address}/v1/{endpoint}", {**body, "temperature": 0})["usage"]
    details = {"cached_tokens": usage.get("cache_read_input_tokens"), **usage.get("input_tokens_details", {})}
    return int(details["cached_tokens"])


def restarted(server: LlamaServer, address: str) -> None:
    server.restart()
    until(lambda: is_ready(address))


@pytest.mark.model
def test_a_prompt_that_was_computed_ahead_is_reused_on_every_endpoint(tmp_path: Path, server: LlamaServer) -> None:
    with nearhit(tmp_path, server.url, seeds=["lights"], learn_after=0) as address:
        until(lambda: is_ready(address))
        tokens = rows(address)["lights"]["tokens"]
        for endpoint, body in (("messages", messages(system=LAMPS)), ("responses", response(instructions=LAMPS))):
            restarted(server, address)
            assert reused(address, endpoint, body) >= tokens
        # It is counted once the answers have told what they found.
        until(lambda: rows(address)["lights"]["restores"] == 2)
        assert rows(address)["lights"]["effective"] is True


@pytest.mark.model
def test_tools_are_learned_with_the_prompt_for_every_endpoint(tmp_path: Path, server: LlamaServer) -> None:
    with nearhit(tmp_path, server.url, seeds=[], learn_after=1) as address:
        until(lambda: is_ready(address))
        reused(address, "messages", messages(system=LAMPS, tools=[TOOL]))
        until(lambda: list(states(address).values()) == ["seeded"])
        (row,) = rows(address).values()
        restarted(server, address)
        asked = messages(system=LAMPS, tools=[TOOL], messages=[{"role": "user", "content": "Dim the lamp."}])
        assert reused(address, "messages", asked) >= row["tokens"] > 100
        restarted(server, address)
        assert reused(address, "responses", response(instructions=LAMPS, tools=[FUNCTION])) >= row["tokens"]
        assert len(rows(address)) == 1
