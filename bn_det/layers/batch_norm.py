"""Batch normalization of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, choose
from .comm import Group, check_agreement, process_group
from .ghost import GHOST_ORDERS, ghost_batches
from .joint import joint_batch_norm, normalize
from .moments import Moments
from .partition import Partition
from .renorm import RenormLimits, correction, renormalized

STATISTICS = ("population", "batch")
"""What can normalize."""

_AGREED: WeakSet[BatchNorm2d] = WeakSet()
"""Layers whose ranks have been seen to agree; no state of a layer, which may be put back."""


class Batch(NamedTuple):
    """A normalization batch.

    Attributes:
        moments: of all its values.
        size: number of values per channel, of which only 0, 1 and more are told apart; the exact
            one may still be computed by a device.
    """

    moments: Moments
    size: int

    @classmethod
    def merge(cls, parts: Sequence[Batch]) -> Batch:
        """The union of disjoint parts."""
        return cls(Moments.merge([p.moments for p in parts]), sum(p.size for p in parts))


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (same arguments, same state dict) with a choice of batch.

    In training the normalization batch is

    * by default, all samples of this process;
    * with ``group``, those of all its processes (SyncBN): exact whatever each of them holds, one
      of them nothing for example. Every process of the group has to call the layer, and to run the
      backward pass, as often as the others. The first call also checks that they agree.
    * with ``ghost_size``, that many samples (GhostBN: Hoffer et al., *Train longer, generalize
      better*, 2017), the remainder with the last ones. The EMA is updated once in a call, with
      the mean of the batches' statistics weighted by their samples.

    Where it is the same as the base class, it is equal to it, except that

    * an empty input (no proposals, no positives) gives an empty output and zero gradients, and
      updates nothing;
    * the forward pass that activation checkpointing repeats does not update the population
      statistics a second time (in a block that is compiled by itself and checkpointed from
      outside it cannot tell, and does);
    * on a CPU the variance of channels_last data is exact, where torch loses it for data with a
      large mean; second derivatives are refused there.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in ``nn.BatchNorm2d``.
        group: None, "world", or a ProcessGroup that this process is in. In a run of one process
            "world" is this process.
        ghost_size: samples in a normalization batch, or None.
        ghost_order: which samples: "contiguous" ones, or "random" ones. For other groups see
            ``ghost_groups``.
        eval_statistics: what normalizes in evaluation: the "population" statistics, or those of
            the "batch", then all samples of this process.
        train_statistics: what normalizes in training: those of the "batch", or of the
            "population" as they are before the call, through which no gradient flows.
        update_population: whether training updates the population statistics, whatever
            normalizes. See also ``no_population_update``.
        renorm: a pair of limits for batch renormalization (:class:`RenormLimits`), or None: in
            training, batch statistics are corrected towards those of the population.

    Shape:
        (N, C, H, W) to the same.

    Raises:
        InputError: an argument is not accepted; in training, a normalization batch has a single
            value per channel; at the first call, the processes of the group disagree about the
            layer.
    """

    observer: Callable[[Sequence[Batch]], None] | None = None
    """Where set, it gets the normalization batches of a call, and the EMA stays as it is."""

    extend: Callable[[list[Batch], Sequence[int]], list[Batch]] | None = None
    """Where set, it adds to the batches of a call, for each of which it gets the domain."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: Group = None,
        ghost_size: int | None = None,
        ghost_order: str = "contiguous",
        eval_statistics: str = "population",
        train_statistics: str = "batch",
        update_population: bool = True,
        renorm: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        if ghost_size is not None and ghost_size < 1:
            raise InputError(f"ghost_size: {ghost_size!r} is not accepted; use 1 or more, or None")
        if ghost_size is not None and group is not None:
            raise InputError(
                f"ghost_size: {ghost_size!r} is not accepted with group {group!r}: a normalization "
                "batch is a part of one process's samples or those of several; use None for one"
            )
        choose("ghost_order", ghost_order, GHOST_ORDERS)
        choose("eval_statistics", eval_statistics, STATISTICS)
        choose("train_statistics", train_statistics, STATISTICS)
        process_group(group)  # raises for what is no group
        self.group = group
        self.ghost_size = ghost_size
        self.ghost_order = ghost_order
        self.eval_statistics = eval_statistics
        self.train_statistics = train_statistics
        self.update_population = update_population
        self.renorm = None if renorm is None else RenormLimits(*renorm).check()

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """Normalize x.

        Args:
            x: shape (N, C, H, W).
            groups: in training, instead of ``ghost_size``: for each sample the number of its
                normalization batch, shape (N,).
        """
        self._check_input_dim(x)
        if not self.normalizes_by_batch and not self.needs_batches:
            return self.normalize_by_population(x, self.weight, self.bias)
        group = self.group_in_use(groups)
        ghosts = self.ghosts(len(x), groups)
        if group is None and len(ghosts.sizes) == 1 and self.is_plain:
            return self.normalize_by_batch(x, self.weight, self.bias)
        pieces = ghosts.split(x)
        batches = self.batches_of(pieces, group, [0] * len(pieces))
        check_batch_sizes(batches)
        if not self.normalizes_by_batch:
            y = self.normalize_by_population(x, self.weight, self.bias)
            self.update_population_statistics(batches)
            return y
        affines = [self.affine_for(b, self, self) for b in batches]
        self.update_population_statistics(batches)
        ys = joint_batch_norm(
            pieces,
            [b.moments for b in batches],
            range(len(pieces)),
            *zip(*affines, strict=True),
            self.eps,
            group,
        )
        return ghosts.join(ys)

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether batch statistics, and not those of the population, are used in this mode."""
        return self._statistics == "batch" or self.running_mean is None

    @property
    def tracks(self) -> bool:
        """Whether a call updates the population statistics in this mode."""
        return self.training and self.update_population and self.track_running_stats

    @property
    def needs_batches(self) -> bool:
        """Whether a call has to know its batches, even if they do not normalize."""
        return self.tracks or self.observer is not None

    @property
    def is_plain(self) -> bool:
        """Whether it normalizes by the batch as it is, in this mode."""
        corrected = self.renorm is not None and self.training
        return self.normalizes_by_batch and not corrected and self.extend is None

    @property
    def _statistics(self) -> str:
        return self.train_statistics if self.training else self.eval_statistics

    def group_in_use(self, groups: Tensor | None = None) -> dist.ProcessGroup | None:
        """The processes to merge over in this mode, if any."""
        group = process_group(self.group) if self.training else None
        if groups is not None and group is not None:
            raise ValueError("groups: not accepted by a layer that normalizes over processes")
        return group

    def ghosts(self, num_samples: int, groups: Tensor | None = None) -> Partition:
        """The normalization batches of this process in this mode."""
        if not self.training:
            return ghost_batches(num_samples, None)
        return ghost_batches(num_samples, self.ghost_size, self.ghost_order, groups)

    def affine_for(
        self, batch: Batch, affine: BatchNorm2d, population: BatchNorm2d
    ) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias to use after normalization by a batch.

        Args:
            affine: the layer that has weight and bias.
            population: the layer that has the population statistics.
        """
        if self.renorm is None or not self.training:
            return affine.weight, affine.bias
        refuse_recomputation("batch renormalization")
        r, d = correction(batch.moments, population, self.eps, self.renorm)
        return renormalized(affine.weight, affine.bias, r, d)

    def normalize_by_population(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Normalize x by the population statistics."""
        mean, var = self.running_mean, self.running_var
        if self.tracks:
            refuse_recomputation("normalizing by an EMA that is updated")
            mean, var = mean.clone(), var.clone()  # the update comes before the backward pass
        return normalize(x, mean, var, weight, bias, self.eps)

    def normalize_by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, where: str = ""
    ) -> Tensor:
        """Normalize x by its own statistics and update the population statistics with them.

        Args:
            x: shape (N, C, H, W).
            weight, bias: the affine to use, which need not be this module's; shape (C,) or None.
            where: begins the message of an error.
        """
        if x.numel() == 0:
            return normalize(x, self.running_mean, self.running_var, weight, bias, self.eps)
        if x.device.type == "cpu" and not x.is_contiguous():
            batches = self.batches_of([x])
            check_batch_sizes(batches, where)
            self.update_population_statistics(batches)
            return joint_batch_norm([x], [batches[0].moments], [0], [weight], [bias], self.eps)[0]
        check_size(x.numel() // x.shape[1], where)
        if self.observer is not None:
            y, batch = fused_batch_norm(x, weight, bias, self.eps)
            self.observer([batch])
            return y
        # A weight of 0 does not keep an infinite variance out, so evaluation gives no buffers.
        # Training does in any case: a recomputation has to save what the first pass saved.
        running = (self.running_mean, self.running_var) if self.tracks else (None, None)
        return F.batch_norm(x, *running, weight, bias, True, self.next_momentum(), self.eps)

    def batches_of(
        self,
        xs: Sequence[Tensor],
        group: dist.ProcessGroup | None = None,
        domain_of: Sequence[int] = (0,),
    ) -> list[Batch]:
        """Each tensor on all processes of the group as a batch of its own, in one collective.

        Args:
            domain_of: the domain of each tensor.
        """
        moments = [Moments.of(x) for x in xs]
        sizes = [x.numel() // x.shape[1] for x in xs]
        if group is not None:
            self._check_ranks(xs, group)
            moments = Moments.all_reduce(moments, group)
            # With more than one value here there is no need to wait for the device.
            sizes = [n if n > 1 else int(m.count) for n, m in zip(sizes, moments, strict=True)]
        batches = [Batch(m, n) for m, n in zip(moments, sizes, strict=True)]
        return batches if self.extend is None else self.extend(batches, domain_of)

    @torch.no_grad()
    def update_population_statistics(self, batches: Sequence[Batch]) -> None:
        """Move the EMA towards the mean and the unbiased variance of a normalization batch.

        Of several batches, towards the means of theirs, weighted by the number of values.
        """
        if self.observer is not None:
            self.observer(batches)
            return
        present = [b.moments for b in batches if b.size > 0]
        momentum = self.next_momentum() if present else 0.0
        if momentum > 0:
            mean, var = mean_statistics(present)
            self.running_mean.mul_(1 - momentum).add_(mean * momentum)
            self.running_var.mul_(1 - momentum).add_(var * momentum)

    def next_momentum(self) -> float:
        """Count a batch; the weight that the EMA gives it, 0 where it must not change."""
        return count_batch(self) if self.tracks else 0.0

    def extra_repr(self) -> str:
        return super().extra_repr() + self.repr_of_choices()

    def repr_of_choices(self) -> str:
        """What the layer's repr says of the normalization batch, where it is not the default."""
        choices = ""
        if self.group is not None:
            group = process_group(self.group)
            ranks = dist.get_world_size(group) if group else 1
            choices += f", normalization_batch=all samples of {ranks} process(es)"
        if self.ghost_size is not None:
            choices += f", normalization_batch={self.ghost_size} {self.ghost_order} samples"
        if self.eval_statistics != "population":
            choices += f", eval_statistics={self.eval_statistics}"
        if self.train_statistics != "batch":
            choices += f", train_statistics={self.train_statistics}"
        if not self.update_population:
            choices += ", update_population=False"
        if self.renorm is not None:
            choices += f", renorm={tuple(self.renorm)}"
        return choices

    def _check_ranks(self, xs: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        if self not in _AGREED:
            values = {
                "num_features": self.num_features,
                "dtype": str(xs[0].dtype),
                "number of domains": len(xs),
            }
            check_agreement(type(self).__name__, values, group)
            _AGREED.add(self)


def count_batch(layer: nn.BatchNorm2d) -> float:
    """Count a batch that updates an EMA; the weight that it has there, 0 in a recomputation."""
    if _in_backward_pass():
        return 0.0
    layer.num_batches_tracked.add_(1)
    if layer.momentum is None:  # cumulative moving average, as in nn.BatchNorm2d
        return 1.0 / float(layer.num_batches_tracked)
    return layer.momentum


def fused_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Batch]:
    """Normalize x by its own statistics, as torch does it, and say what they are.

    Args:
        x: shape (N, C, *), more than one value per channel. On a CPU it has to be contiguous.
    """
    size, dtype = x.numel() // x.shape[1], torch.promote_types(x.dtype, torch.float32)
    # An EMA with the whole weight on the new batch.
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    count = torch.tensor(float(size), dtype=torch.float64, device=x.device)
    return y, Batch(Moments(count, mean, var * ((size - 1) / size)), size)


def check_batch_sizes(batches: Iterable[Batch], where: str = "") -> None:
    """Raise InputError if a normalization batch has a single value per channel.

    Args:
        where: begins the message.
    """
    for batch in batches:
        check_size(batch.size, where)


def check_size(size: int, where: str = "") -> None:
    if size == 1:
        raise InputError(
            f"{where}a normalization batch of a single value per channel has no variance: use "
            "more images, larger ones, or statistics shared between domains"
        )


def mean_statistics(batches: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, averaged over batches: not those of the batches merged."""
    if len(batches) == 1:
        return batches[0].mean, batches[0].unbiased_var
    counts = torch.stack([m.count for m in batches])
    weights = (counts / counts.sum()).to(batches[0].mean.dtype).unsqueeze(1)
    means = torch.stack([m.mean for m in batches])
    variances = torch.stack([m.unbiased_var for m in batches])
    return (weights * means).sum(0), (weights * variances).sum(0)


def refuse_recomputation(what: str) -> None:
    """Raise RuntimeError where activation checkpointing repeats a forward pass."""
    if _in_backward_pass():
        raise RuntimeError(
            f"{what} cannot be recomputed in a backward pass (activation checkpointing): what it "
            "depends on has changed since the forward pass"
        )


def _in_backward_pass() -> bool:
    """Whether autograd runs this forward pass: activation checkpointing's recomputation."""
    # The id is private in name, and what torch.utils.checkpoint itself goes by. A compiled graph
    # writes each buffer once, whatever it recomputes.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
