"""Loss spikes: told when they happen, and noted beside the run."""

from __future__ import annotations

import logging
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from ..errors import reason_of
from ..files import finite, read_json, write_json
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
"""The losses that there have to be for a median, at the begin of a training and when it resumes.

So the iterations after a checkpoint are not looked at again: what was noted of them stands.
"""

FIRST = 30
"""The first iteration whose loss is among those that a median is of; LEAST later one is compared.

Until then Detectron2's RetinaNet divides its losses more by 100 than by the positives of the data.
"""

_LOOK_BACK = 20
"""Variances are compared with those of so many iterations ago, or more, where the loss is not known
at each."""

_NUM_NAMED = 3
"""Layers, in the log."""

_EPS = 1e-5

_OF_A_LOSS = ("iteration", "loss", "median", "ratio")
"""What is noted of one."""


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
        self._variances: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=2)
        self._largest: dict[str, float] | None = None
        self._spikes: list[dict[str, Any]] = []
        self._is_high = False

    def loss(self) -> float | None:
        """The total loss of this iteration, the mean of all ranks; None where it is not known."""
        return self.trainer.total_loss

    def before_train(self) -> None:
        if world()[0] > 0:
            return
        start = self.trainer.iter
        if start > 0 and self.path.is_file():
            noted = self._noted()
            # What was done after the checkpoint is done again, and looked at again from LEAST on.
            again = start + LEAST
            self._spikes = [spike for spike in noted["spikes"] if spike["iteration"] < again]
            losses = (noted["largest"], *self._spikes)
            known = [of for of in losses if of and of["iteration"] < again]
            largest = max(known, key=lambda of: of["ratio"], default=None)
            self._largest = largest and {key: largest[key] for key in _OF_A_LOSS}
        self._write()  # over that of another training, and so that there is one

    def _noted(self) -> dict[str, Any]:
        try:
            return read_spikes(self.path.parent)
        except (OSError, ValueError) as e:
            logger.warning("%s: cannot be read, and begins anew: %s", self.path, reason_of(e))
            return _nothing()

    def after_step(self) -> None:
        loss = self.loss()
        # One that is not finite is no leap: the hosts end such a training and say so.
        if loss is None or not math.isfinite(loss := float(loss)) or self.trainer.iter < FIRST:
            return
        if not self._variances or self.trainer.iter >= self._variances[-1][0] + _LOOK_BACK:
            self._variances.append((self.trainer.iter, _running_variances(self.trainer.model)))
        usual = median(self._losses) if len(self._losses) >= LEAST else 0.0
        if usual > 0:
            self._compare(loss, usual)
        self._losses.append(loss)

    def _compare(self, loss: float, usual: float) -> None:
        ratio = loss / usual
        values = self.trainer.iter, loss, usual, ratio
        found = dict(zip(_OF_A_LOSS, values, strict=True))
        is_new = ratio >= FACTOR and not self._is_high
        self._is_high = ratio >= FACTOR
        if is_new:
            grown = _grown(self._variances[0][1], _running_variances(self.trainer.model))
            self._spikes.append({**found, "layers": grown})
            logger.warning("%s", spike_text(self._spikes[-1]))
        is_largest = self._largest is None or ratio > self._largest["ratio"]
        if is_largest:
            self._largest = found
        if is_new or is_largest:
            self._write()

    def _write(self) -> None:
        write_json(self.path, finite({"largest": self._largest, "spikes": self._spikes}))


def _nothing() -> dict[str, Any]:
    return {"largest": None, "spikes": []}


def read_spikes(folder: Path) -> dict[str, Any]:
    """What is noted in a folder: the "largest", None where nothing is known, and the "spikes".

    Raises:
        OSError, ValueError: the file cannot be read, or is none of these.
    """
    path = folder / FILE
    if not path.is_file():
        return _nothing()
    noted = read_json(path)
    try:
        for of in filter(None, (noted["largest"], *noted["spikes"])):
            tuple(float(of[key]) for key in _OF_A_LOSS)
        for spike in noted["spikes"]:
            spike_text(spike)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"it is not as {FILE} is written: {reason_of(e)}") from e
    return noted


def spike_text(spike: dict[str, Any]) -> str:
    """One line for people, of a spike as the file has it."""
    grown = ", ".join(
        f"{name} " + ("to infinity" if factor is None else f"{factor:.3g} times")
        for name, factor in spike["layers"].items()
    )
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
    """The layers whose variance has grown most: at least to the double, in the median channel.

    As a layer divides by it, with torch's usual eps, so that a channel that was dead is none.
    """
    ratios = {
        name: _ratio(of, now[name])
        for name, of in before.items()
        if name in now and now[name].shape == of.shape  # the model may have changed
    }
    most = sorted(ratios.items(), key=lambda of: -of[1])[:_NUM_NAMED]
    return {name: ratio for name, ratio in most if ratio >= 2}


def _ratio(before: Tensor, now: Tensor) -> float:
    ratios = (now.float() + _EPS) / (before.float() + _EPS)
    return float(ratios.nan_to_num(math.inf, math.inf).median())
