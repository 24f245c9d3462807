"""`python -m proxy.demo.llama_server MODEL`: llama.cpp's server on a free port of 127.0.0.1, until SIGTERM.

One line with the address goes to standard output, llama.cpp's own log to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

CONTEXT_TOKENS = 4096
SLOTS = 2


def main(model: str) -> None:
    """Load the model, say where the server listens, and serve."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.n_parallel = SLOTS
    parameters.port = 0
    parameters.cpuparams.n_threads = threads()
    server = xllamacpp.Server(parameters)
    signal.signal(signal.SIGTERM, _end)
    # In one write, so that llama.cpp's threads cannot get between.
    sys.stdout.write(f"llama.cpp listens on {server.listening_address}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


def threads() -> int:
    """Half of the cores, 4 at most.

    llama.cpp's threads wait for each other by spinning: with one for every core, whatever else runs slows it tenfold.
    """
    return max(1, min(4, (os.cpu_count() or 2) // 2))


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
