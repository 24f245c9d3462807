"""Which file system a path is on, and that no database is opened on one that is elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.base import NotLocal, StorageUnavailable
from storage.mounts import file_system_of, is_network, network_mount
from storage.sqlite_file import prepare

# As a kernel writes it: the root is not the first, a bind mount of one folder, optional fields, nested mounts.
TABLE = """22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / /home rw,relatime shared:7 - nfs4 server:/home rw,vers=4.2
41 40 254:0 /local/ada /home/ada/local rw,relatime shared:1 master:2 propagate_from:3 - ext4 /dev/vda rw
42 27 0:51 / /mnt/my\\040share rw,relatime - cifs //server/my\\040share rw
43 27 0:52 / /mnt/back\\134slash rw - fuse.sshfs me@there: rw
44 27 0:53 / /srv rw,relatime - nfs server:/srv rw
45 44 0:54 / /srv rw,relatime - tmpfs tmpfs rw
46 27 0:55 / /data rw,relatime - xfs /dev/vdb rw
47 46 0:56 / /data rw,relatime - nfs server:/data rw
48 27 0:57 / /dav rw - fuse https://cloud.example/dav rw
49 27 0:58 / /mnt/caf\u00e9 rw - fuse.rclone remote: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib/nearhit/nearhit.db", "ext4"),
        ("/proc/self", "proc"),
        ("/home", "nfs4"),
        ("/home/ada/.local/share/nearhit", "nfs4"),
        # Nested, and a bind mount of a local folder.
        ("/home/ada/local/nearhit.db", "ext4"),
        ("/home/ada/locality/nearhit.db", "nfs4"),
        ("/homes/ada", "ext4"),
        # Escaped.
        ("/mnt/my share/nearhit.db", "cifs"),
        ("/mnt/my", "ext4"),
        ("/mnt/back\\slash/x", "fuse.sshfs"),
        ("/mnt/caf\u00e9/x", "fuse.rclone"),
        # The later hides the earlier.
        ("/srv/nearhit.db", "tmpfs"),
        ("/data/nearhit.db", "nfs"),
        ("/dav/nearhit.db", "davfs"),
    ],
)
def test_the_nearest_and_latest_mount_counts(path: str, kind: str) -> None:
    assert file_system_of(path, TABLE) == kind


@pytest.mark.parametrize("table", ["", "\n\n", "nonsense\n", "1 2 3:4 / / rw\n", "1 2 3:4 / / rw - \n", "- - -\n"])
def test_a_table_that_says_nothing_names_nothing(table: str) -> None:
    assert file_system_of("/home", table) == ""


def test_lines_that_cannot_be_read_are_passed_over() -> None:
    assert file_system_of("/home/x", f"nonsense\n{TABLE}garbage - x") == "nfs4"


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse.sshfs", "fuse.glusterfs", "fuse.rclone", "lustre", "davfs"],
)
def test_what_is_elsewhere_is_a_network_mount(kind: str) -> None:
    assert is_network(kind)


@pytest.mark.parametrize(
    "kind", ["", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "fuse", "fuse.mergerfs", "vfat", "f2fs"]
)
def test_what_is_here_is_none(kind: str) -> None:
    assert not is_network(kind)


def test_the_system_s_own_table_says_that_a_scratch_folder_is_local(tmp_path: Path) -> None:
    assert network_mount(tmp_path / "not" / "there") == ""


def test_without_a_table_every_path_is_local(tmp_path: Path) -> None:
    assert network_mount(tmp_path, tmp_path / "missing") == ""
    assert network_mount(tmp_path, tmp_path) == ""


# The database


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A table that has a network mount at tmp_path/share."""
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {tmp_path / 'share'} rw - nfs4 server:/x rw\n")
    return table


def test_a_database_on_a_network_mount_is_not_opened_and_nothing_is_made(tmp_path: Path, elsewhere: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    with pytest.raises(
        NotLocal, match=r"network mount \(nfs4\).*point data_dir or cache\.file at a local disk"
    ) as told:
        prepare(share / "nearhit" / "nearhit.db", mountinfo=elsewhere)
    # A start goes on with answers in memory.
    assert isinstance(told.value, StorageUnavailable)
    assert list(share.iterdir()) == []


def test_a_symbolic_link_does_not_hide_a_network_mount(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "link").symlink_to("share")
    (tmp_path / "nearhit.db").symlink_to(tmp_path / "share" / "nearhit.db")
    for path in (tmp_path / "link" / "nearhit.db", tmp_path / "nearhit.db"):
        with pytest.raises(NotLocal):
            prepare(path, mountinfo=elsewhere)


def test_a_link_to_a_local_disk_is_followed(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "share" / "data").symlink_to(tmp_path / "local")
    prepare(tmp_path / "share" / "data" / "nearhit.db", mountinfo=elsewhere)
    assert (tmp_path / "local" / "nearhit.db").stat().st_size > 0
