"""What goes over the wire: questions, answers and streams of realistic size."""

from __future__ import annotations

import functools
import json

MODEL = "tiny-1b-instruct"
ANSWER_BYTES = 600
STREAM_CHUNKS = 300

_SYSTEM = "You are a careful assistant. Answer in plain words, and say so when you do not know."
_PROSE = (
    "Water expands when it freezes because its molecules settle into a lattice that leaves more room between them "
    "than the liquid does. The ice is lighter than the water around it and floats, which keeps lakes alive in winter. "
)


def answer(size: int = ANSWER_BYTES) -> bytes:
    """A whole chat answer of exactly `size` bytes."""
    base = len(_whole(""))
    if size < base:
        raise ValueError(f"an answer takes at least {base} bytes")
    text = _PROSE * (1 + (size - base) // len(_PROSE))
    return _whole(text[: size - base])


@functools.cache
def events(chunks: int) -> tuple[bytes, ...]:
    """A chat stream: `chunks` events of about 250 bytes, then the finishing one and `[DONE]`."""
    words = _PROSE.split()
    said = [_event({"content": f" {words[i % len(words)]}"}, None) for i in range(chunks)]
    return (*said, _event({}, "stop"), b"data: [DONE]\n\n")


def question(text: str, *, stream: bool = False, max_tokens: int = STREAM_CHUNKS) -> bytes:
    """A whole HTTP request that asks for a chat completion; a streamed answer has `max_tokens` chunks."""
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **({"stream": True} if stream else {}),
    }
    content = _compact(body)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: application/json\r\n"
        f"Authorization: Bearer none\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def numbered(number: int) -> str:
    """A question like no other of another number."""
    return f"Please explain entry {number} of the catalogue, and why water expands when it freezes, in two sentences."


def _whole(content: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 52, "completion_tokens": 71, "total_tokens": 123}
    return _compact(
        {
            "id": "chatcmpl-5kQ0mLwT2vXc8RzYb3NfHj7P",
            "object": "chat.completion",
            "created": 1760000000,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }
    )


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    event = {
        "id": "chatcmpl-5kQ0mLwT2vXc8RzYb3NfHj7P",
        "object": "chat.completion.chunk",
        "created": 1760000000,
        "model": MODEL,
        "system_fingerprint": "b6912-1a2b3c4d5",
        "choices": [choice],
    }
    return b"data: " + _compact(event) + b"\n\n"


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
