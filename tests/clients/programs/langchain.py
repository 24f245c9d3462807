"""What the tests have LangChain do."""

from __future__ import annotations

from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.programs.orders import obey
from tests.clients.programs.tools import LIGHT


def model(base: str, **options: Any) -> Any:
    place = {"base_url": f"{base}/v1", "api_key": "unused"} if base else {}
    return ChatOpenAI(model="tiny", **place, max_tokens=12, **options)


def whole(pieces: Any) -> Any:
    """The message that a stream's pieces make; LangChain adds them up."""
    first, *rest = pieces
    for piece in rest:
        first = first + piece
    return first


def ask(base: str, question: str, system: str, stream: bool) -> str:
    asked = [("system", system), ("human", question)]
    said = whole(model(base).stream(asked)) if stream else model(base).invoke(asked)
    return str(said.content)


def call_tool(base: str, question: str, stream: bool) -> dict[str, Any]:
    bound = model(base).bind_tools([LIGHT])
    (call,) = (whole(bound.stream(question)) if stream else bound.invoke(question)).tool_calls
    return {"name": call["name"], "arguments": call["args"]}


def batch(base: str, questions: list[str], system: str) -> list[str]:
    return [said.content for said in model(base).batch([[("system", system), ("human", q)] for q in questions])]


def usage(base: str, question: str, system: str) -> dict[str, Any]:
    """What a stream tells of its tokens when it is told to."""
    said = whole(model(base, stream_usage=True).stream([("system", system), ("human", question)]))
    return {"text": said.content, "usage": said.usage_metadata}


def embed(base: str, texts: list[str]) -> Any:
    return OpenAIEmbeddings(
        model="tiny", base_url=f"{base}/v1", api_key="unused", check_embedding_ctx_length=False
    ).embed_documents(texts)


if __name__ == "__main__":
    obey({"ask": ask, "call_tool": call_tool, "batch": batch, "usage": usage, "embed": embed})
