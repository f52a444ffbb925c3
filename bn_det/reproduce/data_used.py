"""Which data a step is run on: the folder of data sets is none of its settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..data.coco import builtin_sources


def data_used(settings: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the annotations of the data sets that settings name, as far as they are there.

    Args:
        settings: a step's command and config, as JSON has them.
    """
    words = set(re.findall(r"\w+", json.dumps(settings)))
    found = {}
    for name, source in sorted(builtin_sources().items()):
        if name in words and os.path.isfile(source.json_file):
            state = os.stat(source.json_file)
            found[name] = _digest(source.json_file, state.st_size, state.st_mtime_ns)
    return found


@cache
def _digest(path: str, size: int, mtime: int) -> str:
    """Read again only where the file is another: those of COCO take seconds."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
