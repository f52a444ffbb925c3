"""Detectron's ``.pkl`` files of weights, read without running what may be in them."""

from __future__ import annotations

import os
import pickle
from typing import Any, BinaryIO

from ..errors import InputError

_ACCEPTED = {
    "_codecs": {"encode"},
    "collections": {"OrderedDict"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
}
"""What pickles of NumPy's arrays are made of, by the modules of old and new versions."""


class _Unpickler(pickle._Unpickler):
    """Python's own: the one in C makes a table as long as the largest number that a file names."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # many were written by Python 2

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ACCEPTED.get(module, ()):
            raise InputError(
                f"it has {module}.{name}, which may run any code when it is read; use a file of "
                "NumPy arrays and plain data, such as those of Detectron2's model zoo"
            )
        if not module.startswith("numpy"):
            return super().find_class(module, name)
        from .plain_arrays import STAND_INS  # only for this: the layers need torch alone

        return STAND_INS[name]


def read_pickled_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a pickle of NumPy arrays and plain data in a dict, as the model zoo's are.

    Raises:
        InputError: it has anything else, of which nothing is run.
        Exception: what ``pickle`` raises for a file that is none.
    """
    with open(path, "rb") as f:
        content = _Unpickler(f).load()
    if not isinstance(content, dict):
        raise InputError(f"it is a pickled {type(content).__name__}, and no dict of weights")
    return content
