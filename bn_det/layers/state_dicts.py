"""Weights by their names: read from a file, and compared."""

from __future__ import annotations

import errno
import os
import pickle
import re
import struct
import zipfile
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, reason_of

State = Mapping[str, Tensor]

_WRAPPED = "module."

_BROKEN = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    UnicodeDecodeError,
    struct.error,
)
"""What loaders raise for content that is no checkpoint, or not all of one."""


def read_checkpoint(path: str | os.PathLike) -> Any:
    """What ``torch.load`` reads of a file: tensors and plain data only, on the CPU.

    Raises:
        InputError: it cannot be read so; the message begins with the path.
    """
    if isinstance(path, (str, os.PathLike)):
        refuse_damaged(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # what loaders raise is of many kinds
        reason = why_unreadable(path, e)
        raise InputError(f"{path}: cannot be loaded as a checkpoint: {reason}") from e


def why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Why a file is no checkpoint, from what a loader raised: what it is not, and what is accepted.

    In words of ours: torch's are advice to trust the file, and to run the code in it.
    """
    is_cut = getattr(error, "errno", None) == errno.EINVAL  # read from before its begin
    if not isinstance(error, _BROKEN) and not is_cut:
        return reason_of(error)
    # torch.load also takes what is open.
    with open(path, "rb") if isinstance(path, (str, os.PathLike)) else nullcontext(path) as f:
        f.seek(0)
        start = f.read(1024)
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        reason = f"it has objects of Python ({named[1]}), which may run any code when they are read"
    elif not start:
        reason = "it is empty"
    elif _is_text(start):
        reason = "it is a text file"
    else:
        reason = "it is incomplete, or of another format"
    accepted = "a file of tensors and plain data, as of torch.save(model.state_dict(), FILE)"
    return f"{reason}; use {accepted}"


def refuse_damaged(path: str | os.PathLike) -> None:
    """Raise InputError for a file of torch.save whose content is not what was written.

    It has a checksum of each tensor, at which torch.load does not look; nor does it refuse what is
    compressed, or lies at the same place many times, and would fill the memory. A file of torch.jit
    is refused, too.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            if any(record.filename.endswith("/constants.pkl") for record in file.infolist()):
                raise InputError(
                    f"{path}: cannot be loaded as a checkpoint: it is of torch.jit, and has code "
                    "that a load runs; use torch.save(model.state_dict(), FILE) of what it was "
                    "made from"
                )
            claimed = sum(record.file_size for record in file.infolist())
            there = os.path.getsize(path)
            if claimed > there:  # torch.save compresses nothing
                raise InputError(
                    f"{path}: cannot be loaded as a checkpoint: it has {there} bytes, and is said "
                    f"to hold {claimed}; use a file as torch.save writes it"
                )
            record = file.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error):
        return  # of which the loader says what it is
    if record is not None:
        raise InputError(
            f"{path}: cannot be loaded as a checkpoint: it is damaged: {record} in it does not "
            "have its checksum"
        )


def _is_text(start: bytes) -> bool:
    """Whether a file that begins so is one, of which the last character may be cut."""
    try:
        return "\0" not in getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False


def wrapped_prefix(names: Iterable[str], own: Iterable[str]) -> str:
    """What names begin with where a model in a wrapper was saved, and the model at hand is in none.

    The wrapper is DataParallel or torch's AveragedModel, which has a counter beside the model.
    """
    is_wrapped = all(name.startswith(_WRAPPED) or name == "n_averaged" for name in names)
    return _WRAPPED if is_wrapped and not any(name.startswith(_WRAPPED) for name in own) else ""


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint has under "model", or by itself, as :func:`read_checkpoint` reads it.

    Raises:
        InputError: it has no names there.
    """
    return dict(weights_of(read_checkpoint(path), path))


def weights_of(loaded: Any, path: str | os.PathLike) -> MutableMapping[str, Any]:
    """What a loaded checkpoint has under "model", or by itself.

    Raises:
        InputError: it has no names there, or a tensor whose values are not all there as numbers.
    """
    content = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(content, MutableMapping) or not all(
        isinstance(name, str) for name in content
    ):
        raise InputError(f"{path}: is no state dict, and has none under 'model'")
    for name, value in content.items():
        if isinstance(value, Tensor) and (kind := why_not_dense(value)):
            raise InputError(
                f"{path}: {name}: a {kind} tensor is not accepted; use dense ones of numbers"
            )
    return content


def why_not_dense(tensor: Tensor) -> str:
    """What a tensor is, if most of torch's functions do not take it."""
    kinds = {
        "meta": tensor.is_meta,
        "quantized": tensor.is_quantized,
        "nested": tensor.is_nested,
        "sparse": tensor.layout is not torch.strided,
    }
    return next((kind for kind, is_so in kinds.items() if is_so), "")


def first_difference(a: State, b: State) -> tuple[str, object, object] | None:
    """The first name whose tensors have other shapes, with both; "nothing" where one has none."""
    for name in (*a, *b):
        ours, others = (tuple(of[name].shape) if name in of else "nothing" for of in (a, b))
        if ours != others:
            return name, ours, others
    return None
