"""Files that are never half-written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def finite(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
