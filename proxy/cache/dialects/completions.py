"""`/v1/completions`: raw prompts, exact look-up only. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.cache.dialects.call import Json, NotCacheable, Reading
from proxy.cache.policy import Bypass


class _Completions:
    endpoint = "completions"
    paths = ("/v1/completions",)
    id_prefix = "cmpl-"

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        prompt = body.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        # A raw prompt holds rendered system prompts and history: nothing in it may be compared loosely.
        parts = [prompt] if isinstance(prompt, str) else [part for part in prompt if isinstance(part, str)]
        return Reading(None, (), {}, "\n".join(parts))

    def stream_object(self) -> str:
        return "text_completion"

    def whole_object(self) -> str:
        return "text_completion"

    def finish_choice(self, choice: dict[str, Json]) -> dict[str, Json]:
        return {"index": 0, "text": "", "logprobs": None, **choice}

    def split_choice(self, choice: Mapping[str, Json]) -> list[dict[str, Json]]:
        index = choice.get("index", 0)
        said = {"index": index, "text": choice.get("text", ""), "logprobs": choice.get("logprobs")}
        rest = {k: v for k, v in choice.items() if k not in {"index", "text", "logprobs", "finish_reason"}}
        last = {"index": index, "text": "", "logprobs": None, "finish_reason": choice.get("finish_reason")}
        return [{**said, "finish_reason": None}, {**last, **rest}]

    def is_empty(self, choice: Mapping[str, Json]) -> bool:
        return not self.text(choice).strip()

    def text(self, choice: Mapping[str, Json]) -> str:
        text = choice.get("text")
        return text if isinstance(text, str) else ""


COMPLETIONS = _Completions()
"""The completions dialect."""
