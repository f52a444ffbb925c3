"""Which data a step is run on: the folder of data sets is none of its settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from ..data.coco import builtin_sources
from .published import decoded

_OWN = "DATASETS.REGISTER_COCO"


def data_used(settings: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the annotations of the data sets that a step names, as far as they are there.

    Args:
        settings: a step's command and config, as JSON has them. Values of the command replace the
            config's.
    """
    given = dict(pairwise(settings["command"]))
    values = {key: given.pop(key, value) for key, value in settings["config"].items()}
    words = set(re.findall(r"\w+", json.dumps([values, given])))
    files = {name: source.json_file for name, source in builtin_sources().items()}
    for entry in decoded(given.get(_OWN, values.get(_OWN, ()))):
        files[entry[0]] = entry[1]
    found = {}
    for name, path in sorted(files.items()):
        if name in words and os.path.isfile(path):
            state = os.stat(path)
            found[name] = _digest(path, state.st_size, state.st_mtime_ns)
    return found


@cache
def _digest(path: str, size: int, mtime: int) -> str:
    """Read again only where the file is another: those of COCO take seconds."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
