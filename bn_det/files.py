"""Files that are never half-written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_aside(path: str | os.PathLike) -> Iterator[str]:
    """A path to write to instead, which replaces the real one once the block is done.

    If the block fails, the real one stays as it was.
    """
    aside = f"{os.fspath(path)}.tmp"
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if os.path.exists(aside):
            os.remove(aside)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, aside."""
    with write_aside(path) as aside:
        Path(aside).write_text(text)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file, aside, for people to read as well."""
    write_text(path, json.dumps(content, indent=1))


def finite(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
