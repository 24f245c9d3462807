"""Answers as FastAPI writes them."""

from __future__ import annotations

import json

from aiohttp import web

from tests.emulators import Json


def invalid_chat(asked: Json) -> web.Response | None:
    """The 422 for what its schema refuses."""
    if not isinstance(asked, dict):
        return invalid("body", "json_invalid")
    messages = asked.get("messages")
    if not isinstance(messages, list):
        return invalid("messages", "missing")
    roles = ("system", "user", "assistant", "tool")
    if any(m.get("role") not in roles or not isinstance(m.get("content"), str) for m in messages):
        return invalid("messages", "enum")
    if asked.get("n") not in (None, 1) or asked.get("top_k") == 0:
        return invalid("n", "less_than_equal")
    return None


def invalid(field_: str, kind: str) -> web.Response:
    return fast({"detail": [{"type": kind, "loc": ["body", field_], "msg": "Field required", "input": {}}]}, 422)


def detail(status: int, text: str) -> web.Response:
    return fast({"detail": text}, status)


def fast(body: Json, status: int = 200) -> web.Response:
    """JSON as FastAPI writes it."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    headers = {"Server": "uvicorn", "Access-Control-Allow-Origin": "*"}
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)
