"""``bn-det``: finds the command that is meant, and imports that alone.

Help is shown without an import of torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from ..errors import nearest
from ..version import __version__
from . import ctrl_c  # noqa: F401

COMMANDS = {
    "train": "train and evaluate a detector from a config file",
    "doctor": "what is wrong with the BatchNorm of a checkpoint, and what mends it",
    "recompute": "new population statistics for a checkpoint: PreciseBN, AdaBN",
    "average": "average the weights of checkpoints, with statistics that fit",
    "leakage": "how much a RoI head reads from the other RoIs of its batch",
    "loss": "a detector's loss with population and with batch statistics",
    "reproduce": 'the experiments of Rethinking "Batch" in BatchNorm, and a report of them',
    "report": "one page of a run: curves, AP, BatchNorm, detections",
    "plot": "plot a metric of several runs over training",
    "visualize": "draw detections beside the truth",
    "prepare-blood-cells": "make the data sets of blood cells of a clone of a public one",
}

TOOLS = {
    "cv2": "opencv-python",
    "fvcore": "fvcore",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "scipy": "scipy",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "tqdm": "tqdm",
    "yacs": "yacs",
    "yaml": "pyyaml",
}
"""What is imported, and the package that has it, of setup.py's extra of this name."""


def main() -> None:
    """The console script."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"bn_det {__version__}")
    elif name in COMMANDS:
        start(name, f"bn-det {name}", arguments)
    else:
        sys.exit(f"error: {name!r} is no command of bn-det; {nearest(name, COMMANDS)}")


def script(name: str) -> None:
    """The same command by a script of a name of its own."""
    start(name, os.path.basename(sys.argv[0]), sys.argv[1:])


def start(name: str, prog: str, arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: of COMMANDS.
        prog: what usage lines call it.
    """
    # Before torch, which by itself warns of a NumPy that is missing.
    if missing := [package for module, package in TOOLS.items() if find_spec(module) is None]:
        sys.exit(
            f"error: {prog} needs {', '.join(missing)}, not installed here; use "
            "pip install 'bn_det[tools]'"
        )
    command = import_module(f".{name.replace('-', '_')}", __package__)
    run = import_module("..commands.cli", __package__).run
    run(lambda: command.main(prog, arguments))


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return "\n".join(
        [
            "usage: bn-det [-h | --version] COMMAND ...",
            "",
            "The batch in BatchNorm as a choice, in object detectors.",
            "",
            *lines,
            "",
            "bn-det COMMAND --help tells what a command does, and its options.",
        ]
    )
