"""Config files in YAML, with their bases, loaded safely.

What is accepted in each of them is in :mod:`.yaml_text`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import IO, Any

from ..errors import InputError, shown
from ..files import check_regular, within_memory
from .yaml_text import BROKEN, parse, piece

MAX_BASES = 50
"""Of a file, and of files that are each the base of the one before."""

BASE = "_BASE_"
"""The key of a file, or a list of files, that a file changes."""


def load_yaml(path: str, open_file: Callable[[str], IO[str]] = open) -> dict[str, Any]:
    """The content of a config file, over that of its bases.

    As ``CfgNode.load_yaml_with_base`` of fvcore has it: a base is relative to the file that names
    it, absolute, below ``~``, or a URL that ``open_file`` knows.

    Raises:
        InputError: a file cannot be read or is no config file, it has a tag that is not accepted,
            bases go in a circle, or something is beyond the limits. The message begins with the
            path of the file, and is one line.
    """
    return _Files(open_file).load(path)


def config_files(path: str, open_file: Callable[[str], IO[str]] = open) -> list[str]:
    """The paths of a config file and of all that are its bases; as :func:`load_yaml`."""
    files = _Files(open_file)
    files.load(path)
    return list(files.loaded)


class _Files:
    """The files of one load. Each is read once, of however many files it is a base.

    Args:
        open_file: as for load_yaml.
    """

    def __init__(self, open_file: Callable[[str], IO[str]]) -> None:
        self.open_file = open_file
        self.loaded: dict[str, dict[str, Any]] = {}

    def load(self, path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        """As load_yaml; not to be changed. ``above`` are the files that lead here as bases."""
        # Not where a link leads: its bases are relative to where the link is.
        folder, name = os.path.split(path)
        key = path if _is_url(path) else os.path.join(os.path.realpath(folder), name)
        if key not in self.loaded:
            self.loaded[key] = self._load(path, above)
        return self.loaded[key]

    def _load(self, path: str, above: tuple[str, ...]) -> dict[str, Any]:
        if not _is_url(path):
            check_regular(path)
        with within_memory(shown(path)):
            content = _read(path, self.open_file, above)
        way = (*above, path)
        merged: dict[str, Any] = {}
        for base in _bases(content, path):
            found = _base_path(base, path)
            if os.path.realpath(found) in map(os.path.realpath, way):
                raise InputError(
                    f"{shown(path)}: {BASE} goes in a circle: "
                    f"{' -> '.join(map(shown, [*way, found]))}"
                )
            if len(way) > MAX_BASES:
                raise InputError(
                    f"{shown(path)}: {BASE}: more than {MAX_BASES} files, each the base of the one "
                    f"before, are not accepted; the first is {shown(way[0])}"
                )
            merged = _merged(self.load(found, way), merged, path)
        return _merged({k: v for k, v in content.items() if k != BASE}, merged, path)


def _bases(content: Mapping[str, Any], path: str) -> list[str]:
    """The bases that a file names."""
    bases = content.get(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(_is_path(base) for base in bases):
        raise InputError(
            f"{shown(path)}: {BASE}: {repr(content[BASE])[:100]} is not accepted; use a path, or a "
            "list of them"
        )
    if len(bases) > MAX_BASES:
        raise InputError(
            f"{shown(path)}: {BASE}: a list of {len(bases)} files is not accepted; use {MAX_BASES} "
            "at most"
        )
    return bases


def _base_path(base: str, path: str) -> str:
    base = os.path.expanduser(base)
    return base if _is_url(base) else os.path.join(os.path.dirname(path), base)


def _is_url(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _is_path(base: Any) -> bool:
    """Whether it can be one: the system's functions raise for anything else."""
    # The first is without a name, or with the end of a line in it.
    if not isinstance(base, str) or base.splitlines() != [base] or "\0" in base:
        return False
    try:
        os.fsencode(base)
    except UnicodeEncodeError:
        return False
    return True


def _merged(
    over: Mapping[str, Any], under: Mapping[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Nodes key by key, other values as they are in ``over``."""
    ret = dict(under)
    for name, value in over.items():
        if isinstance(value, dict) and name in under:
            key = f"{prefix}{piece(name)}"
            if not isinstance(under[name], dict):
                raise InputError(
                    f"{shown(path)}: {key}: a node is not accepted in place of "
                    f"{repr(under[name])[:100]}, which {BASE} has; use a value"
                )
            value = _merged(value, under[name], path, f"{key}.")
        ret[name] = value
    return ret


def _read(path: str, open_file: Callable[[str], IO[str]], above: tuple[str, ...]) -> dict[str, Any]:
    """The content of one file."""
    try:
        with open_file(path) as f:
            text = f.read()
    except (OSError, HTTPException) as e:
        of = f" ({BASE} of {shown(above[-1])})" if above else ""
        reason = " ".join(str(getattr(e, "strerror", None) or e).split())
        raise InputError(f"{shown(path)} cannot be read: {reason}{of}") from e
    except BROKEN as e:  # an address that is none, or other characters than text has
        reason = " ".join(str(e).split())
        raise InputError(f"{shown(path)} is not a config file: {reason}") from e
    return parse(path, text)
