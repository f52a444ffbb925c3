"""What a command reads, which nothing that it writes may replace."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image
from yacs.config import CfgNode

from ..config.yaml_file import config_files
from ..data.coco import CocoSource
from ..errors import InputError
from ..files import aside_of, check_other_file, check_regular
from .output_folder import refuse_in_use

Read = Mapping[str, Sequence[str]]
"""Files, and folders of images, by what they are in messages."""


def read_of_config(
    cfg: CfgNode, config_file: str, sources: Mapping[str, CocoSource], target: str | None = None
) -> Read:
    """What a config is made of, and the data sets that it names, or --target does.

    Args:
        sources: where data sets lie, by name.
    """
    files, read = config_files(config_file, type(cfg)._open_cfg), {}
    read["--config-file"] = [config_file]
    read["a file that is _BASE_ of --config-file"] = files
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, target)):
        if name in sources:
            read[f"the annotation file of {name}"] = [sources[name].json_file]
            read[f"an image of {name}"] = [sources[name].image_root]
    return read


def read_of_modules() -> Read:
    """The code of a user's functions that have been imported, with all that they import."""
    files = [getattr(module, "__dict__", {}).get("__file__") for module in [*sys.modules.values()]]
    return {"a file of code that is in use": [file for file in files if isinstance(file, str)]}


def check_output_file(flag: str, output: str | os.PathLike, read: Read) -> None:
    """Raise InputError unless a file can be written, another than those that are read.

    Args:
        flag: that the output is given by.
    """
    name = os.path.basename(output)
    if len(name) > 80:
        name = f"{name[:40]}...{name[-30:]}"
    try:
        for what, files in read.items():
            check_other_file(flag, output, [_as_file(file, output) for file in files], what)
        with suppress(FileNotFoundError):
            os.lstat(aside_of(output))
    except (OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = getattr(e, "strerror", None) or str(e)
        raise InputError(f"{flag}: {name!r} is not accepted: {reason}; use another name") from e


def _as_file(read: str, output: str | os.PathLike) -> str:
    """What is read; of a folder of images the output itself, where that is one of them."""
    if not os.path.isdir(read):
        return read
    path = Path(output).resolve()
    is_one = Path(read).resolve() in path.parents and path.is_file() and _is_image(path)
    return str(path) if is_one else read


def _is_image(path: Path) -> bool:
    try:
        Image.open(path).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def check_output(output: str | None, read: Read, name: str = "--output") -> None:
    """Raise InputError unless a command can write a checkpoint, another file than what it reads.

    The folder is made.

    Args:
        output: None for nothing to write.
        name: the flag that the output is given by.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix == ".json":
        raise InputError(f"{name}: {output!r} is not accepted; the table gets that name, use .pth")
    if path.suffix == ".safetensors":
        raise InputError(f"{name}: {output!r} is not accepted; torch.save writes it, use .pth")
    if path.suffix == ".pkl":
        raise InputError(
            f"{name}: {output!r} is not accepted: files of that name are read as the model zoo's, "
            "which this is none of; use .pth"
        )
    check_output_file(name, output, read)
    check_regular(path)
    refuse_in_use(name, path.parent)
    table = path.with_suffix(".json")
    check_output_file(f"{name}, the table", table, read)
    if table.exists() and not path.exists():
        raise InputError(
            f"{name}: {output!r} is not accepted: its table would replace {table}, which is there "
            f"without {path}; move or remove it, or use another name"
        )
