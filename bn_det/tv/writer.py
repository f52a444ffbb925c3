"""Metrics to the terminal, to metrics.json and to TensorBoard, as Detectron2 writes them."""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from pathlib import Path

from fvcore.common.history_buffer import HistoryBuffer
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Collects scalars of every iteration; writes their medians over a window now and then.

    Args:
        output_dir: gets ``metrics.json`` (a JSON object a line, appended) and TensorBoard's file.
        max_iter: for the time left.
        period: iterations between two writes, and the window.
    """

    def __init__(self, output_dir: str, max_iter: int, period: int = 20) -> None:
        self.max_iter = max_iter
        self.period = period
        self._histories: dict[str, HistoryBuffer] = {}
        self._tensorboard = SummaryWriter(output_dir)
        self._json = open(Path(output_dir) / "metrics.json", "a")  # noqa: SIM115
        self._last_step = time.perf_counter()

    def step(self, iteration: int, lr: float, data_time: float, losses: dict[str, float]) -> None:
        """Take the scalars of an iteration, counted from 0, and write if it is time."""
        now = time.perf_counter()
        scalars = {"time": now - self._last_step, "data_time": data_time, "lr": lr, **losses}
        self._last_step = now
        for name, value in scalars.items():
            self._histories.setdefault(name, HistoryBuffer()).update(value, iteration)
        if (iteration + 1) % self.period == 0 or iteration + 1 == self.max_iter:
            self._write(iteration)

    def results(self, iteration: int, results: dict) -> None:
        """Write the results of an evaluation, as ``bbox/AP`` and the like."""
        self._record(iteration, _flatten(results))
        self._last_step = time.perf_counter()  # an evaluation is no part of an iteration's time

    def close(self) -> None:
        self._json.close()
        self._tensorboard.close()

    def _write(self, iteration: int) -> None:
        # The learning rate is what it is; all else is smoothed.
        values = {
            name: history.latest() if name == "lr" else history.median(self.period)
            for name, history in self._histories.items()
        }
        left = self._histories["time"].median(1000) * (self.max_iter - iteration - 1)
        losses = "  ".join(f"{k}: {v:.4g}" for k, v in values.items() if "loss" in k)
        logger.info(
            "eta: %s  iter: %d  %s  time: %.4f  data_time: %.4f  lr: %.5g",
            timedelta(seconds=int(left)),
            iteration,
            losses,
            values["time"],
            values["data_time"],
            values["lr"],
        )
        self._record(iteration, {**values, "eta_seconds": left})

    def _record(self, iteration: int, values: dict[str, float]) -> None:
        self._json.write(json.dumps({"iteration": iteration, **values}, sort_keys=True) + "\n")
        self._json.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, iteration)
        self._tensorboard.flush()


def _flatten(results: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for name, value in results.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat
