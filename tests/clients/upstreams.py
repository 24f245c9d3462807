"""What the fake model says where the small one cannot be made to: it calls a tool, in each dialect and form."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from tests.fake_model import chat_body, chunk, send, sse

ARGUMENTS = {"room": "attic"}
CALL = {"name": "switch_light", "arguments": ARGUMENTS}
"""The call as every program should understand it."""
PATHS = ("/v1/chat/completions", "/v1/messages")


async def calling(request: web.Request) -> web.StreamResponse | None:
    """Call the tool, whatever was asked."""
    if request.path not in PATHS:
        return None
    stream = (await request.json()).get("stream")
    if request.path == "/v1/messages":
        return await send(request, _message_events()) if stream else web.json_response(_message())
    return await send(request, _chat_events()) if stream else web.json_response(_chat())


def _chat() -> dict[str, Any]:
    function = {"name": CALL["name"], "arguments": json.dumps(ARGUMENTS)}
    call = {"id": "call_1", "type": "function", "function": function}
    return chat_body(None, message={"tool_calls": [call]}, finish_reason="tool_calls")


def _chat_events() -> list[bytes]:
    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": CALL["name"], "arguments": ""}}
    pieces = [begun, *({"index": 0, "function": {"arguments": text}} for text in _pieces())]
    deltas = [chunk({"role": "assistant", "content": None}), *(chunk({"tool_calls": [piece]}) for piece in pieces)]
    return [sse(event, done=False) for event in (*deltas, chunk({}, finish="tool_calls"))] + [sse()]


def _pieces() -> tuple[str, str]:
    text = json.dumps(ARGUMENTS)
    return text[:5], text[5:]


def _message(**changes: Any) -> dict[str, Any]:
    block = {"type": "tool_use", "id": "toolu_1", "name": CALL["name"], "input": ARGUMENTS}
    base = {"id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "content": [block]}
    usage = {"input_tokens": 9, "output_tokens": 4}
    return {**base, "stop_reason": "tool_use", "stop_sequence": None, "usage": usage, **changes}


def _message_events() -> list[bytes]:
    block = {"type": "tool_use", "id": "toolu_1", "name": CALL["name"], "input": {}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": _message(content=[], stop_reason=None)},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": text}}
            for text in _pieces()
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {"output_tokens": 4},
        },
        {"type": "message_stop"},
    ]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
