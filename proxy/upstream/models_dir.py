"""Names for models from a folder of folders: `models/<name>/<file>.gguf|.rkllm`. Blocking."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ENDINGS = (".gguf", ".rkllm")


@dataclass(frozen=True, slots=True)
class Folders:
    """File names by folder name, and what a person should know."""

    files: dict[str, str]
    warnings: tuple[str, ...] = ()


def read_models_dir(folder: Path) -> Folders:
    """Look at the folders in `folder`; the first model file of each counts, in the order of their names."""
    files: dict[str, str] = {}
    warnings: list[str] = []
    try:
        places = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    except OSError as error:
        return Folders({}, (f"models_dir {folder}: {error.strerror}: its names are not known",))
    for place in places:
        try:
            found = sorted(file.name for file in place.iterdir() if file.suffix.lower() in _ENDINGS and file.is_file())
        except OSError as error:
            warnings.append(f"models_dir: {place}: {error.strerror}")
            continue
        if not found:
            continue
        if len(found) > 1:
            warnings.append(f"models_dir: {place} holds {len(found)} models; {found[0]} is called {place.name!r}")
        if found[0] in files.values():
            warnings.append(f"models_dir: {place}: another folder holds a {found[0]}, too; that one gives the name")
            continue
        files[place.name] = found[0]
    return Folders(files, tuple(warnings))
