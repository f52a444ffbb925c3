"""Loss spikes: told when they happen, and noted beside the run."""

from __future__ import annotations

import json
import logging
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_text, write_json
from ..layers.comm import world
from ..layers.kinds import unwrapped
from .hooks import Hook

logger = logging.getLogger(__name__)

FILE = "loss_spikes.json"

FACTOR = 3.0
"""A loss that is so many times the median of those before it is a spike.

Batches of two images alone make a RetinaNet's loss 2.3 times its median now and then.
"""

WINDOW = 50
"""The losses that the median is of."""

LEAST = 20
"""The losses that there have to be for a median, at the begin of a training and when it resumes."""

FIRST = 30
"""The first iteration whose loss is looked at.

Until then Detectron2's RetinaNet divides its losses more by 100 than by the positives of the data.
"""

_LOOK_BACK = 20
"""Variances are compared with those of so many iterations ago, or up to twice as many."""

_NUM_NAMED = 3
"""Layers, in the log."""


class LossSpikes(Hook):
    """Tells of a loss that leaps, and of the layers whose input has grown by then.

    A *spike* is a total loss of FACTOR times the median of the WINDOW losses before it, or more,
    with all that follows until the loss is below that again. It is what a step that was too large
    looks like. What it leaves is worse than what it looks like: weights before a BatchNorm that
    have grown change no output, and learn slowly from then on, as the gradient by weights of k
    times the length is 1/k of what it was (van Laarhoven, *L2 Regularization versus Batch and
    Weight Normalization*, 2017). So the layers are named whose running variance has grown most.

    ``loss_spikes.json`` in the folder has the spikes, and the largest loss of the training over
    its median. Rank 0 writes it, which knows the losses.

    Args:
        output_dir: gets the file.
    """

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir) / FILE
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._variances: deque[dict[str, Tensor]] = deque(maxlen=2)
        self._largest: dict[str, float] | None = None
        self._spikes: list[dict[str, Any]] = []
        self._is_high = False

    def loss(self) -> float | None:
        """The total loss of this iteration, the mean of all ranks; None where it is not known."""
        return self.trainer.total_loss

    def before_train(self) -> None:
        if world()[0] > 0:
            return
        start, noted = self.trainer.iter, read_spikes(self.path.parent)
        if start == 0:
            self.path.unlink(missing_ok=True)  # of another training
        elif self.path.is_file():
            # What was done after the checkpoint is done again.
            self._spikes = [spike for spike in noted["spikes"] if spike["iteration"] < start]
            largest = noted["largest"]
            self._largest = largest if largest and largest["iteration"] < start else None
            self._write()

    def after_step(self) -> None:
        loss = self.loss()
        if loss is None or self.trainer.iter < FIRST:
            return
        if self.trainer.iter % _LOOK_BACK == 0:
            self._variances.append(_running_variances(self.trainer.model))
        usual = median(self._losses) if len(self._losses) >= LEAST else 0.0
        if usual > 0:
            self._compare(loss, usual)
        self._losses.append(loss)

    def _compare(self, loss: float, usual: float) -> None:
        ratio = loss / usual
        found = {"iteration": self.trainer.iter, "loss": loss, "median": usual, "ratio": ratio}
        is_new = ratio >= FACTOR and not self._is_high
        self._is_high = ratio >= FACTOR
        if is_new:
            grown = _grown(self._variances[0], _running_variances(self.trainer.model))
            self._spikes.append({**found, "layers": grown})
            logger.warning("%s", spike_text(self._spikes[-1]))
        is_largest = self._largest is None or ratio > self._largest["ratio"]
        if is_largest:
            self._largest = found
        if is_new or is_largest:
            self._write()

    def _write(self) -> None:
        write_json(self.path, {"largest": self._largest, "spikes": self._spikes})


def read_spikes(folder: Path) -> dict[str, Any]:
    """What is noted in a folder: the "largest", None where nothing is known, and the "spikes"."""
    path = folder / FILE
    return json.loads(read_text(path)) if path.is_file() else {"largest": None, "spikes": []}


def spike_text(spike: dict[str, Any]) -> str:
    """One line for people, of a spike as the file has it."""
    grown = ", ".join(f"{name} {factor:.3g} times" for name, factor in spike["layers"].items())
    return (
        f"The loss leapt at iteration {spike['iteration']}: {spike['loss']:.4g} is "
        f"{spike['ratio']:.2g} times its running median, {spike['median']:.4g}. "
        f"{f'Running variances that have grown: {grown}' if grown else 'No variance has grown'}"
    )


def _running_variances(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by the names of the layers."""
    end = ".running_var"
    return {
        name.removesuffix(end): buffer.detach().clone()
        for name, buffer in unwrapped(model).named_buffers()
        if name.endswith(end)
    }


def _grown(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, float]:
    """The layers whose variance has grown most: at least to the double, in the median channel."""
    tiny = torch.finfo(torch.float32).tiny
    ratios = {
        name: float((now[name].float() / of.float().clamp(min=tiny)).median())
        for name, of in before.items()
    }
    most = sorted(ratios.items(), key=lambda of: -of[1])[:_NUM_NAMED]
    return {name: ratio for name, ratio in most if ratio >= 2}
