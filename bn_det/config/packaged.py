"""The config files that come with the package, found by name where the current folder has none."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from ..errors import shown

FOLDER = "configs"


def packaged_configs() -> Path:
    """The folder: inside of the installed package, and beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / FOLDER
    return inside if inside.is_dir() else package.parent / FOLDER


def find_config(path: str) -> str:
    """The path of a file, or of the packaged one of that name: configs/NAME, or NAME.

    A path that leads to neither is given back as it is.
    """
    if not os.path.exists(path) and _is_name(path):
        found = packaged_configs() / path.removeprefix(f"{FOLDER}/")
        if found.is_file():
            return str(found)
    return path


def no_config(path: str) -> str:
    """What is said of a path that leads to no file."""
    folder = packaged_configs()
    known = [
        file.relative_to(folder).as_posix()
        for pattern in ("*.yaml", "*.py")
        for file in folder.rglob(pattern)
    ]
    close = get_close_matches(path.removeprefix(f"{FOLDER}/"), known, n=3)
    which = f"nearest: {close}" if close else f"{folder / 'README.md'} lists these"
    return f"there is no file {shown(path)}, nor a config of bn_det of that name; {which}"


def _is_name(path: str) -> bool:
    """Whether it is one below the folder, as a user types it."""
    return path.isprintable() and not os.path.isabs(path) and ".." not in Path(path).parts
