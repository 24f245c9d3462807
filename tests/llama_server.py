"""A real llama.cpp server as a program of its own, for tests: started, stopped, killed, started again on its port.

    with LlamaServer(Flags(slots=2, slot_save_path="/tmp/slots/")) as server:
        get(server.url + "/health")
        server.restart()

In async code: `async with`, and `asyncio.to_thread` for the rest.

`python -m tests.llama_server FLAGS` is that program; `FLAGS` is JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from proxy.demo.llama_server import threads
from proxy.demo.parts import model_file

_KV_TYPES = {"f16": "GGML_TYPE_F16", "q8_0": "GGML_TYPE_Q8_0"}


@dataclass(frozen=True, slots=True)
class Flags:
    """What the server is started with.

    `context` are tokens of all slots together. `cache_ram_mib` bounds the server's own cache of prompts in memory, 0:
    none, which is what makes reuse predictable. Slot files need a `slot_save_path`, which ends in a
    slash. `kv_type` is "f16" or "q8_0". `chat_template` replaces the model's own. With `embeddings`,
    it tells vectors, the mean of those of the tokens. `port` 0 takes a free one.
    """

    model: str = ""
    slots: int = 2
    context: int = 4096
    slot_save_path: str = ""
    cache_ram_mib: int = 0
    kv_unified: bool = False
    kv_type: str = "f16"
    alias: str = ""
    api_key: str = ""
    chat_template: str = ""
    show_slots: bool = True
    similarity: float = 0.1
    embeddings: bool = False
    port: int = 0


class LlamaServer:
    """One address at which a server runs while the block does; it ends with this process at the latest."""

    def __init__(self, flags: Flags | None = None) -> None:
        """Nothing runs yet."""
        self.flags = flags or Flags()
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    def start(self, flags: Flags | None = None) -> None:
        """Start, perhaps with other flags, on the port it had before; returns once the model is loaded."""
        assert self._process is None, "it runs already"
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self.flags = flags or self.flags
        chosen = replace(self.flags, model=self.flags.model or str(model_file()), port=self.flags.port or port)
        command = [sys.executable, "-m", "proxy.demo.child", "tests.llama_server", json.dumps(asdict(chosen))]
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            assert isinstance(self._process.stdout, BufferedReader)
            words = self._process.stdout.readline().decode().split()
            if not words:
                self.stop()
                log.seek(0)
                raise AssertionError(log.read().decode(errors="replace")[-2000:])
        self.url = words[-1]

    def stop(self) -> None:
        """An orderly end; nothing happens where it does not run."""
        self._end(kill=False)

    def kill(self) -> None:
        """An end without warning."""
        self._end(kill=True)

    def restart(self, flags: Flags | None = None) -> None:
        """Kill it and start it again at the same address, perhaps with other flags."""
        self.kill()
        self.start(flags)

    def pause(self) -> None:
        """Let it keep its connections and answer nothing, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # Its threads may work on for a moment.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        process.communicate(timeout=120)


def patched(model: Path, target: Path, factor: float = 1.1) -> Path:
    """Write a copy of a GGUF file in which one norm's weights are multiplied: other answers, same shapes and size.

    Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    content = bytearray(model.read_bytes())
    start, count = _norm(content)
    weights = struct.unpack_from(f"<{count}f", content, start)
    struct.pack_into(f"<{count}f", content, start, *(weight * factor for weight in weights))
    target.write_bytes(content)
    return target


def _norm(content: bytearray) -> tuple[int, int]:
    """Offset and count of the 32-bit floats of the first layer's norm in a GGUF file."""
    magic, _, tensors, pairs = struct.unpack_from("<4sIQQ", content, 0)
    assert magic == b"GGUF"
    at, alignment = 24, 32
    for _ in range(pairs):
        name, at = _text(content, at)
        (kind,) = struct.unpack_from("<I", content, at)
        if name == b"general.alignment":
            (alignment,) = struct.unpack_from("<I", content, at + 4)
        at = _after_value(content, at + 4, kind)
    found: tuple[int, int] | None = None
    for _ in range(tensors):
        name, at = _text(content, at)
        (dimensions,) = struct.unpack_from("<I", content, at)
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", content, at + 4)
        at += 4 + 8 * dimensions + 12
        if name == b"blk.0.attn_norm.weight":
            assert (kind, dimensions) == (0, 1), "32-bit floats in one row"
            found = (offset, shape[0])
    assert found is not None, "no such norm"
    data = -(-at // alignment) * alignment
    return data + found[0], found[1]


_FIXED_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def _text(content: bytearray, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", content, at)
    return bytes(content[at + 8 : at + 8 + length]), at + 8 + length


def _after_value(content: bytearray, at: int, kind: int) -> int:
    if kind == _STRING:
        return _text(content, at)[1]
    if kind != _ARRAY:
        return at + _FIXED_SIZES[kind]
    item: int
    count: int
    item, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if item in _FIXED_SIZES:
        return at + count * _FIXED_SIZES[item]
    for _ in range(count):
        at = _after_value(content, at, item)
    return at


def main(flags: Flags) -> None:
    """Load the model, say where the server listens in one line on standard output, and serve until SIGTERM."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = flags.model
    parameters.n_ctx = flags.context
    parameters.n_parallel = flags.slots
    parameters.port = flags.port
    parameters.slot_save_path = flags.slot_save_path
    parameters.cache_ram_mib = flags.cache_ram_mib
    parameters.kv_unified = flags.kv_unified
    parameters.cache_type_k = parameters.cache_type_v = getattr(xllamacpp.ggml_type, _KV_TYPES[flags.kv_type])
    parameters.endpoint_slots = flags.show_slots
    parameters.slot_prompt_similarity = flags.similarity
    parameters.embedding = flags.embeddings
    if flags.embeddings:
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    parameters.warmup = False
    parameters.cpuparams.n_threads = threads()
    if flags.alias:
        parameters.model_alias = {flags.alias}
    if flags.api_key:
        parameters.api_keys = [flags.api_key]
    if flags.chat_template:
        parameters.chat_template = flags.chat_template
    server = xllamacpp.Server(parameters)
    signal.signal(signal.SIGTERM, _end)
    # In one write, so that llama.cpp's threads cannot get between.
    sys.stdout.write(f"llama.cpp listens on {server.listening_address}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


def _end(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main(Flags(**json.loads(sys.argv[1])))
