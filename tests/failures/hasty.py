"""nearhit, as installed, with shorter pauses, so that a test need not wait for seconds."""

from __future__ import annotations

from proxy import cli
from proxy.web import services

PAUSE_S = 0.1


def main() -> None:
    for name in ("_WATCH_FILE_S", "_UPKEEP_S"):
        assert hasattr(services, name)
        setattr(services, name, PAUSE_S)
    cli.main()


if __name__ == "__main__":
    main()
