"""What the tests have LlamaIndex do."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

from tests.clients.programs.orders import obey


@cache
def model(base: str) -> Any:
    return OpenAILike(
        model="tiny",
        api_base=f"{base}/v1",
        api_key="unused",
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=12,
    )


def last(pieces: Any) -> Any:
    """LlamaIndex gives with each piece all that came so far."""
    return deque(pieces, maxlen=1).pop()


def ask(base: str, question: str, system: str, stream: bool) -> str:
    asked = [ChatMessage(role="system", content=system), ChatMessage(role="user", content=question)]
    said = last(model(base).stream_chat(asked)) if stream else model(base).chat(asked)
    return str(said.message.content)


def switch_light(room: str) -> str:
    """Switch a light."""
    return room


def call_tool(base: str, question: str, stream: bool) -> dict[str, Any]:
    tools = [FunctionTool.from_defaults(fn=switch_light)]
    if stream:
        said = last(model(base).stream_chat_with_tools(tools, user_msg=question))
    else:
        said = model(base).chat_with_tools(tools, user_msg=question)
    (call,) = model(base).get_tool_calls_from_response(said)
    return {"name": call.tool_name, "arguments": call.tool_kwargs}


def embed(base: str, texts: list[str]) -> Any:
    return OpenAILikeEmbedding(model_name="tiny", api_base=f"{base}/v1", api_key="unused").get_text_embedding_batch(
        texts
    )


if __name__ == "__main__":
    obey({"ask": ask, "call_tool": call_tool, "embed": embed})
