"""Which file system a path is on, as Linux tells in `/proc/self/mountinfo` (proc(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")

_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "coda", "ncpfs", "davfs", "davfs2"),
        *("ceph", "ceph-fuse", "glusterfs", "lustre", "beegfs", "gpfs", "pvfs2", "orangefs"),
        *(
            "sshfs",
            "rclone",
            "s3fs",
            "goofys",
            "gcsfuse",
            "blobfuse",
            "blobfuse2",
            "mountpoint-s3",
            "juicefs",
            "curlftpfs",
        ),
        # Folders of the host in a virtual machine: the host's programs do not see the guest's locks.
        *("9p", "drvfs", "vboxsf", "prl_fs", "vmhgfs", "vmhgfs-fuse", "grpcfuse", "osxfs"),
    }
)
_ESCAPED = re.compile(r"\\([0-7]{3})")


def file_system_of(path: str, mountinfo: str) -> str:
    """The type of the file system that an absolute path without symbolic links is on; empty where none holds it.

    `mountinfo` is the table as the kernel writes it. The mount point nearest to the path counts, and of two mounts on
    one point the later, which hides the other.
    """
    nearest, kind = "", ""
    for point, mounted in _mounts(mountinfo):
        if len(point) >= len(nearest) and _holds(point, path):
            nearest, kind = point, mounted
    return kind


def is_network(kind: str) -> bool:
    """Whether files of this type of file system are elsewhere, so that locks and shared memory cannot be relied on."""
    return kind.removeprefix("fuse.") in _NETWORK


def network_mount(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the network file system that `path` is on, which need not exist yet; empty where it is local.

    Without a readable table (another operating system), every path is local.
    """
    table = ""
    with suppress(OSError):
        table = os.fsdecode(mountinfo.read_bytes())
    kind = file_system_of(os.path.realpath(path), table)
    return kind if is_network(kind) else ""


def _mounts(mountinfo: str) -> Iterator[tuple[str, str]]:
    for line in mountinfo.split("\n"):
        # After six fields come optional ones of any number, then a dash, then type and source.
        fields, _, rest = line.partition(" - ")
        first, (kind, source, *_) = fields.split(" "), [*rest.split(" "), ""]
        if len(first) < 6 or not kind:
            continue
        is_dav = kind == "fuse" and source.startswith(("http://", "https://"))
        yield _ESCAPED.sub(lambda match: chr(int(match[1], 8)), first[4]), "davfs" if is_dav else kind


def _holds(point: str, path: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")
