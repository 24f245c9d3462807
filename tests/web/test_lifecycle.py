"""Starting and stopping leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

from proxy.settings import Settings
from tests.conftest import running_proxy, settings_for
from tests.fake_model import fake_model

TIMES = 20


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def _one_life(settings: Settings) -> str:
    async with running_proxy(settings) as proxy:
        answer = await proxy.chat()
        await proxy.settled()
        return answer.outcome


async def _lives(folder: Path) -> list[str]:
    async with fake_model() as model:
        settings = settings_for(folder, model.url)
        return [await _one_life(settings) for _ in range(TIMES)]


def test_opening_and_closing_leaves_no_files_and_no_threads(tmp_path: Path) -> None:
    asyncio.run(_lives(tmp_path))
    gc.collect()
    files, threads = _open_files(), threading.active_count()
    outcomes = asyncio.run(_lives(tmp_path))
    gc.collect()
    # Another life with another model at another port begins with a miss; all later ones know the answer.
    assert outcomes == ["MISS"] + ["HIT"] * (TIMES - 1)
    assert _open_files() <= files
    assert threading.active_count() <= threads


def test_a_start_that_fails_leaves_no_files_and_no_threads(tmp_path: Path) -> None:
    (tmp_path / "nearhit.db").write_bytes(b"somebody else's")
    settings = settings_for(tmp_path, "http://127.0.0.1:9")

    def fails() -> None:
        try:
            asyncio.run(_one_life(settings))
        except Exception as error:  # noqa: BLE001 - looked at below
            assert "not a nearhit database" in str(error)  # noqa: PT017 - the loop matters, not the error
        else:
            raise AssertionError("a foreign file was taken")

    fails()
    gc.collect()
    files, threads = _open_files(), threading.active_count()
    for _ in range(5):
        fails()
    gc.collect()
    assert _open_files() <= files
    assert threading.active_count() <= threads
    assert (tmp_path / "nearhit.db").read_bytes() == b"somebody else's"
