"""`/v1/completions`: raw prompts, exact look-up only. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.cache.answer import Pieces
from proxy.cache.dialects.call import Json, NotCacheable, Reading
from proxy.cache.dialects.choices import Choices
from proxy.cache.policy import Bypass


class _Completions:
    endpoint = "completions"
    paths = ("/v1/completions",)
    id_prefix = "cmpl-"
    whole_object = stream_object = "text_completion"

    def read(self, body: Mapping[str, Json]) -> Reading | NotCacheable:
        prompt = body.get("prompt")
        if not isinstance(prompt, str | list) or not prompt:
            return NotCacheable(Bypass.NOT_UNDERSTOOD)
        # A raw prompt holds rendered system prompts and history: nothing in it may be compared loosely.
        parts = [prompt] if isinstance(prompt, str) else [part for part in prompt if isinstance(part, str)]
        return Reading(None, (), {}, "\n".join(parts))

    def finish_choice(self, choice: dict[str, Json]) -> dict[str, Json]:
        return {"index": 0, "text": "", "logprobs": None, **choice}

    def split_choice(self, choice: Mapping[str, Json], pieces: Pieces) -> list[dict[str, Json]]:
        index, text = choice.get("index", 0), choice.get("text", "")
        said = [{"index": index, "text": one, "logprobs": None, "finish_reason": None} for one in _cut(text, pieces)]
        said[-1]["logprobs"] = choice.get("logprobs")
        rest = {k: v for k, v in choice.items() if k not in {"index", "text", "logprobs", "finish_reason"}}
        last = {"index": index, "text": "", "logprobs": None, "finish_reason": choice.get("finish_reason")}
        return [*said, {**last, **rest}]

    def acts(self, choice: Mapping[str, Json]) -> bool:
        del choice
        return False

    def refusal(self, choice: Mapping[str, Json]) -> str:
        del choice
        return ""

    def reasoning(self, choice: Mapping[str, Json]) -> str:
        del choice
        return ""

    def text(self, choice: Mapping[str, Json]) -> str:
        text = choice.get("text")
        return text if isinstance(text, str) else ""


def _cut(text: Json, pieces: Pieces) -> Sequence[Json]:
    return (pieces(text) if isinstance(text, str) else ()) or (text,)


COMPLETIONS = Choices(_Completions())
"""The completions dialect."""
