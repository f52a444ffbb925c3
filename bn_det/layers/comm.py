"""Processes that take part in a normalization batch or a shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch.distributed as dist
from torch import Tensor

from ..errors import InputError

Group = str | dist.ProcessGroup | None
"""Which processes: None for this one alone, "world" for all, or a ProcessGroup."""


class HeldGroup:
    """A ProcessGroup in a layer: a copy of the layer has the same, and no file can hold it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, object]) -> HeldGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise InputError(
            'a layer over a ProcessGroup cannot be pickled; use group "world", or save its state '
            "dict"
        )


def process_group(group: Group) -> dist.ProcessGroup | None:
    """The process group that is meant, or None where there is only this process.

    Raises:
        ValueError: it is something else, or a group that this process is not in.
    """
    if group is not None and group != "world" and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f'group: {group!r} is not accepted; use None, "world" or a ProcessGroup that this '
            "process is in"
        )
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    resolved = group if isinstance(group, dist.ProcessGroup) else dist.group.WORLD
    return resolved if dist.get_world_size(resolved) > 1 else None


def world() -> tuple[int, int]:
    """Rank of this process and number of all, (0, 1) where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def share(length: int) -> range:
    """The part of a sequence that is this rank's: contiguous, and equal to one element."""
    rank, num_ranks = world()
    return range(length * rank // num_ranks, length * (rank + 1) // num_ranks)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From the same shape (*) on each rank to (number of ranks, *) on all, in one collective."""
    x = x.contiguous()
    gathered = x.new_empty(dist.get_world_size(group), x.numel())
    gather_into(gathered.view(-1), x.view(-1), group)
    return gathered.view(-1, *x.shape)


def gather_into(
    gathered: Tensor, x: Tensor, group: dist.ProcessGroup, async_op: bool = False
) -> dist.Work | None:
    """From (n,) on each rank to (number of ranks * n,) on all."""
    # torch 2.14 has another name for it, and warns of the old one.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    return getattr(dist, name)(gathered, x, group=group, async_op=async_op)


def check_agreement(what: str, values: Mapping[str, object], group: dist.ProcessGroup) -> None:
    """Raise InputError on every rank unless all ranks have the same values.

    Args:
        what: begins the message.
        values: by name; anything that can be pickled and compared.
    """
    every: list[Mapping[str, object]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(every, dict(values), group=group)
    report_disagreement(what, every)


def report_disagreement(what: str, every: list[Mapping[str, object]]) -> None:
    """Raise InputError if not all ranks' values, given in the order of ranks, are the same."""
    for rank, values in enumerate(every):
        for name, value in values.items():
            if value != every[0][name]:
                raise InputError(
                    f"{what}: ranks of the group disagree: {name} is {every[0][name]!r} on rank 0 "
                    f"and {value!r} on rank {rank}"
                )
