"""The main job: a repeat comes from the cache, and only a repeat."""

from __future__ import annotations

from tests.conftest import Proxy
from tests.fake_model import FakeModel, numbered


async def test_a_repeat_is_answered_from_the_cache(proxy: Proxy, model: FakeModel) -> None:
    model.respond = numbered()
    first = await proxy.chat("What is a proxy?")
    await proxy.settled()
    second = await proxy.chat("What is a proxy?")
    assert (first.outcome, second.outcome) == ("MISS", "HIT")
    assert first.json["choices"] == second.json["choices"]
    assert len(model.generations) == 1
