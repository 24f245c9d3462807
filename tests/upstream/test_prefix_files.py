"""What is on disk about prefixes: in real folders, after people's hands, crashes and full disks."""

from __future__ import annotations

import json
import logging
import os
import resource
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.upstream.prefix_files import GRACE_S, PrefixFiles, PrefixFilesError
from proxy.upstream.prefix_record import (
    Record,
    Ring,
    ServerNames,
    decode_name,
    encode_name,
    is_server_file,
    name_beside,
)

NAMES = ServerNames(b"secret")
MODEL = "Qwen3-0.6B"


class Place:
    """A data folder and a server's folder, and nearhits that start on them."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "prefixes"
        self.slots = root / "slots"
        self.slots.mkdir()

    def files(self, *, sees: bool = True, max_bytes: int = 10**9, **options: Any) -> PrefixFiles:
        return PrefixFiles(self.folder, self.slots if sees else None, max_bytes, names=NAMES, **options)

    def saved(self, name: str, size: int = 1000) -> str:
        """Save a prefix as the server would; its name."""
        file = NAMES.of(name.encode())
        (self.slots / file).write_bytes(name.encode().ljust(size, b"."))
        return file

    def kept(self, name: str = "support", size: int = 1000, files: PrefixFiles | None = None, **fields: Any) -> Record:
        return (files or self.files()).keep(record(name, file=self.saved(name, size), **fields))

    def json(self, name: str = "support", model: str = MODEL) -> Path:
        return self.folder / encode_name(model) / f"{encode_name(name)}.json"

    def bin(self, name: str = "support", model: str = MODEL) -> Path:
        return self.json(name, model).with_suffix(".bin")

    def everything(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder.parent)) for p in self.folder.parent.rglob("*") if p.is_file())


def record(name: str = "support", **fields: Any) -> Record:
    told: dict[str, Any] = {
        "cache_name": name,
        "model_name": MODEL,
        "created_at": 100.0,
        "modified_at": 100.0,
        "used_at": 100.0,
        "content_length": 2000,
        "source": "config",
        "tokens": 700,
        "upstream": "http://127.0.0.1:8080",
        "body": {"messages": [{"role": "system", "content": "You help."}]},
    }
    return Record(**{**told, **fields})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def later() -> float:
    return time.time() + 2 * GRACE_S


@contextmanager
def disk_full(after: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_kept_is_there_after_a_restart(place: Place) -> None:
    kept = place.kept(size=4321)
    assert kept.bytes == 4321
    assert place.files().load() == [kept]
    assert place.json().stat().st_mode & 0o777 == 0o600
    assert place.folder.stat().st_mode & 0o777 == 0o700
    assert place.json().parent.stat().st_mode & 0o777 == 0o700
    assert place.bin().samefile(place.slots / kept.file), "no bytes twice"
    shown = json.loads(place.json().read_text())
    assert shown["cache_name"] == "support"
    assert shown["version"] == 1
    assert not [name for name in place.everything() if ".tmp" in name]


def test_a_server_whose_folder_is_not_seen_has_only_records(place: Place) -> None:
    kept = place.files(sees=False).keep(record(file=NAMES.of(b"x"), bytes=77))
    assert kept.bytes == 77
    assert not place.bin().exists()
    assert place.files(sees=False).load() == [kept]


def test_a_server_whose_folder_is_on_another_disk(tmp_path: Path) -> None:
    """Memory is another disk nearly everywhere; where it is not, this tests less."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        place = Place(tmp_path)
        place.slots = Path(shm)
        file = place.saved("support")
        (place.slots / file).chmod(0o640)
        kept = place.files().keep(record(file=file))
        whole = (place.slots / file).read_bytes()
        assert place.bin().read_bytes() == whole
        (place.slots / file).unlink()
        assert place.files().load() == [kept]
        assert (place.slots / file).read_bytes() == whole
        assert (place.slots / file).stat().st_mode & 0o777 == 0o640
        files = place.files(max_bytes=kept.bytes)
        files.load()
        assert files.prune() == [kept]
        assert not list(place.slots.iterdir())


def test_a_record_without_a_body_is_kept(place: Place) -> None:
    place.files().keep(record(body=None, effective=False))
    (found,) = place.files().load()
    assert found.body is None
    assert found.effective is False


def test_the_servers_file_is_brought_back(place: Place) -> None:
    kept = place.kept()
    (place.slots / kept.file).unlink()
    assert place.files().load() == [kept]
    assert (place.slots / kept.file).read_bytes().startswith(b"support")


def test_a_file_that_is_gone_leaves_its_record(place: Place) -> None:
    kept = place.kept()
    (place.slots / kept.file).unlink()
    place.bin().unlink()
    assert place.files().load() == [replace(kept, file="", bytes=0)]


def test_a_file_that_was_cut_is_not_believed(place: Place) -> None:
    kept = place.kept()
    whole = place.bin().read_bytes()
    (place.slots / kept.file).unlink()
    (place.slots / kept.file).write_bytes(b"half")
    assert place.files().load() == [kept]
    assert (place.slots / kept.file).read_bytes() == whole
    os.truncate(place.bin(), 10)
    assert place.files().load() == [replace(kept, file="", bytes=0)]


def test_a_folder_that_is_not_mounted_costs_nothing(place: Place) -> None:
    kept = place.kept()
    place.slots.rename(place.slots.with_name("away"))
    assert place.files().load() == [kept]
    assert not place.files().appeared(kept.file, 0)
    assert place.files().keep(replace(kept, used_at=200.0)).file == kept.file
    assert place.bin().exists()


def test_renaming_by_hand_renames(place: Place) -> None:
    kept = place.kept()
    place.json().rename(place.json("my own name"))
    place.bin().rename(place.bin("my own name"))
    place.json().parent.rename(place.folder / "Other model")
    (found,) = place.files().load()
    assert found == replace(kept, cache_name="my own name", model_name="Other model")
    files = place.files()
    files.load()
    files.keep(replace(found, tokens=1))
    assert len(list(place.folder.rglob("*.json"))) == 1, "kept where the hand put it"
    assert files.remove(found)
    assert not list(place.folder.rglob("*.*"))


def test_renaming_the_json_alone_makes_a_new_bin_in_time(place: Place) -> None:
    kept = place.kept()
    place.json().rename(place.json("new"))
    assert [found.cache_name for found in place.files().load()] == ["new"]
    assert place.bin("new").samefile(place.slots / kept.file)
    assert place.bin().exists()
    place.files(clock=later).load()
    assert not place.bin().exists()


def test_deleting_the_json_by_hand_deletes_the_prefix(place: Place) -> None:
    place.kept()
    place.json().unlink()
    assert place.files().load() == []
    assert place.bin().exists(), "another process may be about to write the record"
    place.files(clock=later).load()
    assert place.everything() == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b'{"name": "package", "version": "1.0.0"}',
        b"\xff\xfe",
    ],
)
def test_what_cannot_be_read_is_told_once_and_left(
    place: Place, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    kept = place.kept()
    lost = NAMES.of(b"named by the bad file only")
    (place.slots / lost).write_bytes(b"x")
    place.json("bad").write_bytes(content)
    place.bin("bad").write_bytes(b"x")
    files = place.files(clock=later)
    with caplog.at_level(logging.WARNING, logger="nearhit.prefixes"):
        assert files.load() == [kept]
        assert files.load() == [kept]
    assert len(caplog.records) == 1
    assert "bad.json" in caplog.text
    assert place.json("bad").read_bytes() == content
    assert place.bin("bad").exists()
    assert (place.slots / lost).exists(), "the file that cannot be read may name it"
    with pytest.raises(PrefixFilesError, match="in the way"):
        files.keep(record("bad"))
    assert place.json("bad").read_bytes() == content


def test_a_newer_version_is_left_alone(place: Place) -> None:
    place.kept()
    told = json.loads(place.json().read_text())
    place.json().write_text(json.dumps({**told, "version": 2}))
    assert place.files().load() == []
    assert place.json().exists()


def test_things_that_are_no_files(place: Place) -> None:
    kept = place.kept()
    os.mkfifo(place.json("pipe"))
    place.json("folder").mkdir()
    place.json("link").symlink_to("/nowhere")
    (place.folder / "stray.txt").write_text("hello")
    (place.folder / ".hidden").mkdir()
    assert place.files().load() == [kept]
    assert PrefixFiles(place.folder / "none", None, 0, names=NAMES).load() == []


def test_two_files_of_one_name(place: Place) -> None:
    kept = place.kept("a b")
    (place.json().parent / "a b.json").write_bytes(place.json("a b").read_bytes())
    (found,) = place.files().load()
    assert found.cache_name == kept.cache_name
    assert len(list(place.folder.rglob("*.json"))) == 2


def test_what_a_crash_left_is_swept_and_the_fresh_is_not(place: Place) -> None:
    kept = place.kept()
    temps = [folder / f".nearhit-{'0' * 16}.tmp" for folder in (place.folder, place.json().parent, place.slots)]
    saved_and_never_kept = place.slots / NAMES.of(b"lost")
    foreign = [place.slots / f"{'ab' * 16}.kv", place.slots / "mine.kv", place.slots / ServerNames(b"2").of(b"x")]
    for path in (*temps, saved_and_never_kept, *foreign):
        path.write_bytes(b"half")
    before = place.everything()
    assert place.files().load() == [kept]
    assert place.everything() == before
    assert place.files(clock=later).load() == [kept]
    assert not any(path.exists() for path in (*temps, saved_and_never_kept))
    assert all(path.exists() for path in foreign)


def test_seeding_again_replaces_the_file(place: Place) -> None:
    files = place.files()
    first = place.kept(files=files)
    new = place.saved("again", 50)
    second = files.keep(replace(first, file=new))
    assert second.bytes == 50
    assert place.bin().samefile(place.slots / new)
    assert not (place.slots / first.file).exists()
    files.keep(replace(second, file="", bytes=0))
    assert not place.bin().exists()
    assert not (place.slots / new).exists()
    assert place.json().exists()


def test_removing(place: Place) -> None:
    files = place.files()
    kept, other = place.kept(files=files), place.kept("other", files=files)
    assert files.remove(kept)
    assert not files.remove(kept)
    assert files.load() == [other]
    assert not (place.slots / kept.file).exists()
    place.json("other").unlink()
    assert not files.remove(other), "a hand was faster"
    assert not (place.slots / other.file).exists()


def test_a_file_that_another_record_names_stays(place: Place) -> None:
    files = place.files()
    one = place.kept(files=files)
    two = files.keep(replace(one, cache_name="two"))
    files.remove(one)
    assert (place.slots / two.file).exists()
    files.remove(two)
    assert not (place.slots / two.file).exists()


@pytest.mark.parametrize("file", ["../../victim", "/etc/passwd", "victim", "a" * 32 + ".kv.txt", ".."])
def test_nothing_but_our_files_is_ever_deleted(place: Place, file: str) -> None:
    victim = place.folder.parent / "victim"
    victim.write_text("precious")
    (place.slots / "victim").write_text("precious")
    files = place.files(max_bytes=0)
    kept = files.keep(record(file=file))
    assert files.load() == [kept]
    assert files.prune() == [kept]
    assert victim.exists()
    assert (place.slots / "victim").exists()


def test_the_files_of_another_installation_are_never_touched(place: Place) -> None:
    theirs = ServerNames(b"another").of(b"x")
    (place.slots / theirs).write_bytes(b"precious")
    files = place.files(max_bytes=0)
    kept = files.keep(record(file=theirs, bytes=8))
    assert files.keep(replace(kept, file=place.saved("mine"))).file != theirs
    files.keep(record(file=theirs, bytes=8))
    assert not place.bin().exists()
    loaded = place.files(max_bytes=0)
    assert [one.file for one in loaded.load()] == [""], "what they save there is not known here"
    loaded.prune()
    assert (place.slots / theirs).read_bytes() == b"precious"


def test_a_copied_folder_brings_its_files(place: Place) -> None:
    fingerprint, lead = b"f" * 32, b"l" * 32
    kept = place.kept(fingerprint=fingerprint.hex(), lead=lead.hex())
    (place.slots / kept.file).unlink()
    names = ServerNames(b"another machine")
    (found,) = PrefixFiles(place.folder, place.slots, 10**9, names=names).load()
    assert found == replace(kept, file=names.of(fingerprint, lead))
    assert place.bin().samefile(place.slots / found.file)
    (unseen,) = PrefixFiles(place.folder, None, 10**9, names=ServerNames(b"a third")).load()
    assert unseen.file == "", "their names mean other prefixes by now"


def test_what_is_overwritten_is_named_by_no_record_any_more(place: Place) -> None:
    file = NAMES.of(b"ring")
    files = place.files(sees=False)
    one, two = files.keep(record("one", file=file)), files.keep(record("two", file=file, model_name="other"))
    three = files.keep(record("three", file=NAMES.of(b"ring 2")))
    files.release(file)
    found = place.files(sees=False).load()
    assert sorted(found, key=str) == sorted([replace(one, file=""), replace(two, file=""), three], key=str)
    place.json("three").parent.rename(place.folder / "away")
    (place.folder / MODEL).write_text("in the way")
    with pytest.raises(PrefixFilesError, match="cannot forget"):
        files.release(three.file)


def test_names_that_are_used_again_are_one_process(place: Place) -> None:
    first, second = place.files(sees=False, upstream="a"), place.files(sees=False, upstream="a")
    other = place.files(sees=False, upstream="b")
    assert [first.own(), first.own(), second.own(), other.own()] == [True, True, False, True]
    kept = first.keep(record(file=NAMES.of(b"ring"), upstream="a", bytes=5))
    assert second.load() == [replace(kept, file="", bytes=0)], "it may be overwritten at any time"
    first.close()
    first.close()
    assert second.own()
    assert second.load() == [kept]
    second.close()
    other.close()
    nowhere = PrefixFiles(place.slots / NAMES.of(b"x") / "prefixes", None, 0, names=NAMES)
    place.saved("x")
    assert not nowhere.own()


def test_a_link_in_the_servers_folder_is_not_followed(place: Place) -> None:
    victim = place.folder.parent / "victim"
    victim.write_text("precious")
    file = NAMES.of(b"link")
    (place.slots / file).symlink_to(victim)
    files = place.files()
    kept = files.keep(record(file=file))
    assert not place.bin().exists()
    files.remove(kept)
    assert victim.read_text() == "precious"


def test_pruning_takes_what_was_used_longest_ago(place: Place) -> None:
    files = place.files(max_bytes=25_000)
    kept = [place.kept(f"p{n}", 10_000, files, used_at=float(n)) for n in range(4)]
    files.touch(kept[0], 50.0)
    gone = files.prune(lambda r: r.cache_name == "p1")
    assert gone == [kept[2], kept[3]]
    assert {found.cache_name for found in files.load()} == {"p0", "p1"}
    assert sum(path.stat().st_size for path in place.slots.iterdir()) <= 25_000
    assert files.prune() == []


def test_pruning_counts_no_disk_that_is_not_seen(place: Place) -> None:
    files = place.files(sees=False, max_bytes=5_000)
    files.keep(record(file=NAMES.of(b"x"), bytes=10**12))
    assert files.prune() == []


def test_use_is_written_when_asked(place: Place) -> None:
    files = place.files()
    kept = files.keep(record())
    files.touch(kept, 500.0)
    assert place.files().load() == [kept]
    files.touch(kept, 700.0)
    files.flush()
    files.touch(kept, 650.0)
    files.touch(record("unknown"), 1.0)
    files.flush()
    assert place.files().load() == [replace(kept, used_at=700.0)]


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_changes_nothing(place: Place, room: int) -> None:
    files = place.files()
    kept = place.kept(files=files)
    before = place.everything()
    with disk_full(room):
        with pytest.raises(PrefixFilesError, match="cannot keep the prefix 'support': File too large"):
            files.keep(replace(kept, tokens=1))
        with pytest.raises(PrefixFilesError):
            files.keep(record("new", file=kept.file))
        files.touch(kept, 900.0)
        with pytest.raises(PrefixFilesError):
            files.flush()
    assert place.everything() == before
    assert place.files().load() == [kept]
    files.flush()
    assert place.files().load() == [replace(kept, used_at=900.0)]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = PrefixFiles(tmp_path / "file" / "prefixes", None, 0, names=NAMES)
    with pytest.raises(PrefixFilesError, match="Not a directory"):
        files.keep(record())


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_names_that_are_none(place: Place, name: str) -> None:
    with pytest.raises(PrefixFilesError):
        place.files().keep(record(name))


def test_renaming_a_model(place: Place) -> None:
    files = place.files()
    one = place.kept("one", files=files)
    mine = place.kept("both", files=files)
    theirs = files.keep(record("both", model_name="new"))
    assert files.rename_model(MODEL, "new") == [replace(one, model_name="new")]
    assert sorted(files.load(), key=str) == sorted([theirs, mine, replace(one, model_name="new")], key=str)
    assert place.bin("one", "new").samefile(place.slots / one.file)
    assert files.rename_model("unknown", "x") == []


def test_upstreams_share_a_folder(place: Place) -> None:
    a, b = place.files(upstream="a"), place.files(upstream="b", clock=later)
    kept_a = place.kept("one", files=a, upstream="a")
    kept_b = place.kept("two", files=b, upstream="b")
    assert a.load() == [kept_a]
    assert b.load() == [kept_b]
    assert (place.slots / kept_a.file).exists(), "not an orphan"
    beside = b.keep(record("one", upstream="b"))
    assert beside.cache_name == name_beside("one", "b")
    again = b.keep(record("one", upstream="b", tokens=5))
    assert sorted(b.load(), key=str) == sorted([again, kept_b], key=str)
    assert b.remove(again)
    assert a.load() == [kept_a]
    anybodys = b.keep(record("three", upstream=""))
    assert anybodys in a.load()


def test_whether_a_saved_file_appeared(place: Place) -> None:
    file = place.saved("x")
    assert place.files().appeared(file)
    assert not place.files().appeared(NAMES.of(b"elsewhere"), within_s=0.05)
    assert not place.files(sees=False).appeared(file)
    assert not place.files().appeared("../x")


def test_names_on_the_server() -> None:
    names = {NAMES.of(b"a", b"bc"), NAMES.of(b"ab", b"c"), ServerNames(b"other").of(b"a", b"bc")}
    assert len(names) == 3
    assert all(is_server_file(name) for name in names)
    assert sum(NAMES.ours(name) for name in names) == 2
    assert not NAMES.ours("x.kv")


def test_a_ring_takes_the_oldest_again() -> None:
    ring = Ring(3, NAMES, "http://a")
    used: dict[str, float] = {}
    for moment in range(3):
        used[ring.take(used)] = float(moment)
    assert set(used) == set(ring.files)
    assert ring.take(used) == min(used, key=lambda file: used[file])
    used[ring.take(used)] = 9.0
    assert ring.take(used) == min(used, key=lambda file: used[file])
    assert not set(ring.files) & set(Ring(3, ServerNames(b"other"), "http://a").files)
    assert not set(ring.files) & set(Ring(3, NAMES, "http://b").files)
    assert Ring(3, NAMES, "http://a").files == ring.files
    with pytest.raises(ValueError):
        Ring(0, NAMES).take({})


NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
DEVICES = ("con", "prn", "aux", "nul", "com1", "lpt1")


@settings(deadline=None)
@given(NAME, st.booleans())
@example("..", False)
@example("con.json", False)
@example("x" * 300, False)
@example("Ü" * 100, True)
def test_any_name_is_a_safe_file_name(name: str, fold: bool) -> None:
    encoded = encode_name(name, fold=fold)
    assert 0 < len(encoded.encode()) <= 240
    assert encoded.isascii()
    assert not set(encoded) & set('/\\:*?"<>| ')
    assert all(unicodedata.category(c) != "Cc" for c in encoded)
    assert not encoded.startswith(".")
    assert not encoded.endswith(".")
    assert encoded.split(".")[0].lower() not in DEVICES
    if "~" not in encoded:
        assert decode_name(encoded) == name


@settings(deadline=None)
@given(NAME, NAME)
@example("a", "A")
@example("x" * 300, "x" * 301)
@example("x" * 300, "X" * 300)
def test_two_names_are_two_files(one: str, other: str) -> None:
    assert (encode_name(one) == encode_name(other)) == (one == other)
    folded = encode_name(one, fold=True).casefold() == encode_name(other, fold=True).casefold()
    assert folded == (one == other)


@pytest.mark.parametrize("name", ["../../x", "Ü" * 200, "con", ".", "100%", "a/b:c", "%41", "tab\there", "nul\0"])
def test_names_survive_the_disk(place: Place, name: str) -> None:
    kept = place.files().keep(record(name, model_name=name))
    assert place.files().load() == [kept]
    assert {path.parent.parent for path in place.folder.rglob("*.json")} == {place.folder}


def test_names_of_bytes_that_are_no_text(place: Place) -> None:
    kept = place.kept()
    (place.json().parent / os.fsdecode(b"\xff.json")).write_bytes(place.json().read_bytes())
    assert place.files().load() == [kept]
