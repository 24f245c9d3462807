"""The data directory is on a network mount: answers are kept in memory, and no database is opened there."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import pytest

from proxy.web import services
from storage.sqlite import open_sqlite
from tests.conftest import running_proxy, settings_for
from tests.fake_model import FakeModel

LOCAL = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n"


@pytest.fixture
def share(tmp_path: Path) -> Path:
    (tmp_path / "my share").mkdir()
    return tmp_path / "my share"


def mounted(monkeypatch: pytest.MonkeyPatch, point: Path, kind: str) -> None:
    """Let the system tell that such a file system is mounted there."""
    table = point.with_name("mountinfo")
    shown = str(point).replace(" ", "\\040")
    table.write_text(f"{LOCAL}22 21 0:40 / {shown} rw - {kind} server:/share rw\n")
    monkeypatch.setattr(services, "open_sqlite", partial(open_sqlite, mountinfo=table))


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
async def test_it_starts_and_says_what_to_do(
    share: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    await asyncio.to_thread(mounted, monkeypatch, share, kind)
    monkeypatch.setattr(services, "_WATCH_FILE_S", 0.05)
    async with running_proxy(settings_for(share, model.url, cache__mode="exact")) as proxy:
        assert (await proxy.chat("x")).outcome == "MISS"
        await proxy.settled()
        # Longer than any of its pauses.
        await asyncio.sleep(0.5)
        assert (await proxy.chat("x")).outcome == "HIT"
        assert (await proxy.send("GET", "/-/ready")).json["storage"]["standing"] == "closed"
        (problem,) = (await proxy.send("GET", "/-/doctor")).json["findings"]
    assert f"network mount ({kind})" in problem["what"]
    (told,) = [r.getMessage() for r in caplog.records if "answers are kept in memory only" in r.getMessage()]
    assert f"{share}/nearhit.db is on a network mount ({kind})" in told
    assert "point data_dir or cache.file at a local disk" in told
    # These need no database.
    assert set(await asyncio.to_thread(os.listdir, share)) == {"admin.token", "secret", "prefixes"}


async def test_a_database_on_a_local_disk_is_used(
    share: Path, tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(mounted, monkeypatch, share, "nfs4")
    settings = settings_for(share, model.url, cache__mode="exact", cache__file=str(tmp_path / "local" / "answers.db"))
    for outcome in ("MISS", "HIT"):
        async with running_proxy(settings) as proxy:
            assert (await proxy.chat("x")).outcome == outcome
            await proxy.settled()
