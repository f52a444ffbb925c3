"""A stand-in for a GPU: "meta", which computes shapes and takes the ways that are not the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = {"_to_copy", "copy_", "lift_fresh"}


class OneDevice(TorchDispatchMode):
    """Refuses a tensor of the CPU beside one of meta, a scalar too, but where it is copied."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = func.overloadpacket.__name__
        if len({t.device.type for t in tensors}) > 1 and name not in _COPIES:
            raise AssertionError(f"{func}: {[(t.device.type, tuple(t.shape)) for t in tensors]}")
        return func(*args, **(kwargs or {}))


@contextmanager
def one_device() -> Iterator[None]:
    """A block in which the layers work on meta tensors, and no tensor of the CPU meets them."""

    def batch_norm_update_stats(
        x: Tensor, mean: Tensor | None, var: Tensor | None, momentum: float
    ):
        dtype = x.dtype if mean is None else mean.dtype
        return tuple(torch.empty(2, x.shape[1], dtype=dtype, device=x.device))

    with torch.library._scoped_library("aten", "IMPL") as library:
        # torch has it for the CPU and for CUDA alone.
        library.impl("batch_norm_update_stats", batch_norm_update_stats, "Meta")
        with OneDevice():
            yield
