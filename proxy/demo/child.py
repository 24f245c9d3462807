"""`python -m proxy.demo.child MODULE ARGUMENT...`: run a module as a program until standard input ends.

The demo holds the other end of that pipe. The kernel closes it when the demo ends, even by SIGKILL, so nothing is left.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

_GRACE_S = 5.0
"""Seconds for an orderly end."""


def main(arguments: list[str]) -> None:
    """Run the module named first with the other arguments."""
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def _end_with_standard_input() -> None:
    # Not sys.stdin: a thread inside its lock would make the interpreter abort at the end.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
