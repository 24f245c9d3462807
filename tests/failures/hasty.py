"""nearhit, as installed, with shorter pauses, so that a test need not wait for seconds.

Where the environment names a table in MOUNTINFO, that is what tells which file systems are mounted.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from proxy import cli
from proxy.web import services
from storage import sqlite, sqlite_file

PAUSE_S = 0.1


def main() -> None:
    for name in ("_WATCH_FILE_S", "_UPKEEP_S"):
        assert hasattr(services, name)
        setattr(services, name, PAUSE_S)
    if "MOUNTINFO" in os.environ:
        setattr(sqlite, "prepare", partial(sqlite_file.prepare, mountinfo=Path(os.environ["MOUNTINFO"])))  # noqa: B010 - mypy knows it as a constant
    cli.main()


if __name__ == "__main__":
    main()
