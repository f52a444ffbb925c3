"""Detectron2's training steps, with gradients of several batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..training.accumulate import accumulate
from ..training.mixed_precision import autocast, grad_scaler


class _Accumulates:
    """A trainer whose step is of several batches.

    Attributes:
        num_batches: how many.
    """

    num_batches = 1
    _data_loader_iter: Iterator[Any]

    def next_batches(self) -> tuple[list[Any], float]:
        """The batches of a step, and the seconds that loading them took."""
        start = time.perf_counter()
        batches = [next(self._data_loader_iter) for _ in range(self.num_batches)]
        return batches, time.perf_counter() - start


class AccumulatingTrainer(_Accumulates, SimpleTrainer):
    """SimpleTrainer whose step is of several batches (:func:`bn_det.training.accumulate`)."""

    def run_step(self) -> None:
        batches, data_time = self.next_batches()
        self.optimizer.zero_grad()
        losses = accumulate(self.model, batches, _losses_of)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class AccumulatingAMPTrainer(_Accumulates, AMPTrainer):
    """AMPTrainer whose step is of several batches; the scale is the same for all of them.

    On any device, and for float16 alone with a scale.
    """

    def __init__(
        self, model: nn.Module, data_loader: Any, optimizer: Optimizer, precision: torch.dtype
    ) -> None:
        self.device = next(model.parameters()).device
        scaler = grad_scaler(self.device, precision)
        super().__init__(model, data_loader, optimizer, grad_scaler=scaler, precision=precision)

    def run_step(self) -> None:
        batches, data_time = self.next_batches()
        self.optimizer.zero_grad()
        losses_of = autocast(self.device, self.precision)(_losses_of)
        losses = accumulate(self.model, batches, losses_of, self._backward)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # There is none of a run in float32, and that of one in bfloat16 is empty.
        of_scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": of_scaler})

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()


def _losses_of(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    losses = model(batch)
    return {"total_loss": losses} if isinstance(losses, Tensor) else losses
