"""Batch normalization of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..moments import Moments
from .joint import joint_batch_norm, normalize


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (same arguments, same state dict) that detectors can rely on.

    Equal to its base class except that

    * an empty input (no proposals, no positives) gives an empty output and zero gradients, and
      updates nothing;
    * the forward pass that activation checkpointing repeats does not update the population
      statistics a second time (in a block that is compiled by itself and checkpointed from
      outside it cannot tell, and does);
    * on a CPU the variance of channels_last data is exact, where torch loses it for data with a
      large mean; second derivatives are refused there.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        InputError: in training, if the normalization batch has a single value per channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not (self.training or self.running_mean is None):
            return normalize(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
            )
        return self.normalize_by_batch(x, self.weight, self.bias)

    def normalize_by_batch(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalize x by its own statistics and update the population statistics with them.

        Args:
            x: shape (N, C, H, W).
            weight, bias: the affine to use, which need not be this module's; shape (C,) or None.
        """
        if x.numel() == 0:
            return normalize(x, self.running_mean, self.running_var, weight, bias, self.eps)
        check_batch_size([x])
        if x.device.type == "cpu" and not x.is_contiguous():
            moments = Moments.of(x)
            self.update_population_statistics(moments)
            return joint_batch_norm([x], moments, [weight], [bias], self.eps)[0]
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            True,
            self.next_momentum(),
            self.eps,
        )

    @torch.no_grad()
    def update_population_statistics(self, moments: Moments) -> None:
        """Move the EMA towards the mean and the unbiased variance of a normalization batch."""
        momentum = self.next_momentum()
        if momentum > 0:
            self.running_mean.mul_(1 - momentum).add_(moments.mean * momentum)
            self.running_var.mul_(1 - momentum).add_(moments.unbiased_var * momentum)

    def next_momentum(self) -> float:
        """Count a batch; the weight that the EMA gives it, 0 where it must not change."""
        if not (self.training and self.track_running_stats) or _in_backward_pass():
            return 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # cumulative moving average, as in nn.BatchNorm2d
            return 1.0 / float(self.num_batches_tracked)
        return self.momentum


def check_batch_size(xs: Sequence[Tensor], where: str = "") -> None:
    """Raise InputError if tensors (N, C, H, W) have a single value per channel in all."""
    if sum(x.numel() // x.shape[1] for x in xs) == 1:
        raise InputError(
            f"{where}a normalization batch of a single value per channel has no variance: train "
            "with more images, larger ones, or statistics shared between domains"
        )


def _in_backward_pass() -> bool:
    """Whether autograd runs this forward pass: activation checkpointing's recomputation."""
    # The id is private in name, and what torch.utils.checkpoint itself goes by. A compiled graph
    # writes each buffer once, whatever it recomputes.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
