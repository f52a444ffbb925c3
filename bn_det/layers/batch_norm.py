"""Batch normalization of one tensor."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, check_positive, choose
from .batch import refuse_list
from .comm import Group, HeldGroup, process_group
from .forward import Domain, Extension, Observation, Plan, batch_norm
from .ghost import GHOST_ORDERS, ghost_batches
from .meeting import TIMEOUT, Calls, Place, check_timeout
from .renorm import limits_of

STATISTICS = ("population", "batch")
"""What can normalize."""


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (same arguments, same state dict) with a choice of batch.

    In training the normalization batch is

    * by default, all samples of this process;
    * with ``group``, those of all its processes (SyncBN): exact whatever each of them holds, one
      of them nothing for example. Every process of the group has to call the layer, and to run the
      backward pass, as often as the others. Before each exchange they find out whether they do
      (``timeout``).
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
        timeout: seconds that a process waits for the others of its group before it ends with the
            layer, the call and the ranks that did not come; 0 not to find out where they are. See
            ``name_layers``.
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

    Attributes:
        frozen: whether its population statistics are final and normalize in any mode
            (:func:`bn_det.freeze`).
        takes: the layer of torch whose shapes of input it takes, which the layer was that it has
            been made of (``convert_batchnorm``).
        calls: its calls over processes, and its name in a model (``name_layers``).

    Shape:
        (N, C, H, W) to the same.

    Raises:
        InputError: an argument is not accepted; in training, a normalization batch has a single
            value per channel; the processes of the group disagree about the layer.
        RuntimeError: processes of the group are in different layers, or one does not come.
    """

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
        timeout: float = TIMEOUT,
        **kwargs: Any,
    ) -> None:
        check_arguments(eps, momentum)
        check_timeout("timeout", timeout)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **kwargs)
        if ghost_size is not None:
            check_positive("ghost_size", ghost_size)
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
        self.timeout = timeout
        self.calls = Calls(is_counted=group is not None)
        self.ghost_size = ghost_size
        self.ghost_order = ghost_order
        self.eval_statistics = eval_statistics
        self.train_statistics = train_statistics
        self.update_population = update_population
        self.renorm = None if renorm is None else limits_of(renorm)
        self.frozen = False
        self.takes: type[_BatchNorm] = nn.BatchNorm2d
        self._extensions: OrderedDict[int, Extension] = OrderedDict()
        self._observers: OrderedDict[int, Observation] = OrderedDict()

    def forward(self, x: Tensor, groups: Tensor | None = None) -> Tensor:
        """Normalize x.

        Args:
            x: shape (N, C, H, W).
            groups: in training, instead of ``ghost_size``: for each sample the number of its
                normalization batch, shape (N,).
        """
        self._check_input_dim(x)
        return batch_norm(self.plan([Domain(x, self, self)], groups))[0]

    def plan(self, domains: Sequence[Domain], groups: Tensor | None = None) -> Plan:
        """A call of this layer in its mode, on the tensors of some domains.

        Args:
            groups: as in :meth:`forward`.
        """
        by_batch = self._statistics == "batch" or domains[0].population.running_mean is None
        hooks = tuple(self._extensions.values()), tuple(self._observers.values())
        # A graph of one layer is used for others, too.
        name = "" if torch.compiler.is_compiling() else self.name
        if not self.training or self.frozen:
            return Plan(domains, self.eps, by_batch, None, None, None, *hooks, name=name)
        group = process_group(self.group)
        if groups is not None and group is not None:
            raise ValueError("groups: not accepted by a layer that normalizes over processes")
        partition = None
        if groups is not None or self.ghost_size is not None:
            partition = partial(
                ghost_batches,
                ghost_size=self.ghost_size,
                ghost_order=self.ghost_order,
                groups=groups,
            )
        plan = Plan(domains, self.eps, by_batch, group, partition, self.renorm, *hooks, name=name)
        if group is not None and plan.needs_batches():
            return plan._replace(place=self._next_place(domains))
        return plan

    @property
    def group(self) -> Group:
        """Over which processes it normalizes in training."""
        return self._group.group if isinstance(self._group, HeldGroup) else self._group

    @group.setter
    def group(self, group: Group) -> None:
        self._group = HeldGroup(group) if isinstance(group, dist.ProcessGroup) else group

    @property
    def _statistics(self) -> str:
        if self.frozen:
            return "population"
        return self.train_statistics if self.training else self.eval_statistics

    def _check_input_dim(self, x: Tensor) -> None:
        refuse_list(x)
        self.takes._check_input_dim(self, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A layer that was pickled as a whole before there were any.
        vars(self).setdefault("_extensions", OrderedDict())
        vars(self).setdefault("_observers", OrderedDict())
        vars(self).setdefault("frozen", False)
        vars(self).setdefault("takes", nn.BatchNorm2d)
        vars(self).setdefault("timeout", TIMEOUT)
        vars(self).setdefault("_group", vars(self).pop("group", None))
        if "calls" not in vars(self):
            self.calls = Calls(is_counted=self.group is not None)

    def register_extension(self, extend: Extension) -> RemovableHandle:
        """Have a function add to the normalization batches of each call, until it is removed.

        Args:
            extend: see :data:`~bn_det.layers.forward.Extension`.
        """
        return _registered(self._extensions, extend)

    def register_observer(self, observe: Observation) -> RemovableHandle:
        """Show a function the normalization batches of each call, until it is removed.

        Args:
            observe: see :data:`~bn_det.layers.forward.Observation`.
        """
        return _registered(self._observers, observe)

    def extra_repr(self) -> str:
        return super().extra_repr() + self.repr_of_choices()

    def repr_of_choices(self) -> str:
        """What the layer's repr says of the normalization batch, where it is not the default."""
        choices = ", frozen=True" if self.frozen else ""
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

    @property
    def name(self) -> str:
        """What messages call it: its name in a model, or ""."""
        return self.calls.name

    def _next_place(self, domains: Sequence[Domain]) -> Place | None:
        if torch.compiler.is_compiling():
            self.calls.were_compiled = True
        if self.calls.were_compiled:
            return None
        return self.calls.next(
            type(self).__name__,
            self.timeout,
            ("num_features", self.num_features),
            ("dtype", str(domains[0].x.dtype)),
            ("number of domains", len(domains)),
        )


def check_arguments(eps: float, momentum: float | None) -> None:
    """Raise InputError unless they are such that an EMA and a root can be taken."""
    if not 0 <= eps < math.inf:
        raise InputError(f"eps: {eps!r} is not accepted; use 0.0 or more")
    if momentum is not None and not 0 <= momentum <= 1:
        raise InputError(
            f"momentum: {momentum!r} is not accepted; use 0.0 to 1.0, the weight of a new batch in "
            "the EMA (1 - decay), or None for the mean of all batches"
        )


def _registered(hooks: OrderedDict[int, Any], hook: Callable[..., Any]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
