"""A partition of a tensor's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """Which samples of a tensor are together.

    Attributes:
        sizes: number of samples in each part.
        order: the samples' indices, part by part, shape (N,); None where that is their own order.
    """

    sizes: list[int]
    order: Tensor | None

    @classmethod
    def whole(cls, num_samples: int) -> Partition:
        """All samples in one part."""
        return cls([num_samples], None)

    @classmethod
    def by_domain(
        cls, domains: Sequence[int], num_domains: int, device: torch.device | None = None
    ) -> Partition:
        """A part for each domain, empty where no sample is of it.

        Args:
            domains: of each sample, from 0.
            device: of the tensors to split.
        """
        of_samples = torch.tensor(domains, dtype=torch.long)
        sizes = of_samples.bincount(minlength=num_domains).tolist()
        if list(domains) == sorted(domains):
            return cls(sizes, None)
        return cls(sizes, of_samples.argsort(stable=True).to(device))

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """From (N, *) to the parts (sizes[k], *)."""
        if self.order is None and len(self.sizes) == 1:
            return [x]  # a view's backward pass would copy the gradient
        return (x if self.order is None else _selected(x, self.order)).split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of split."""
        x = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return x if self.order is None else _selected(x, self.order.argsort())


def _selected(x: Tensor, order: Tensor) -> Tensor:
    """Samples of x in an order, in the memory format of x (which index_select does not keep)."""
    order = order.to(x.device)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, order).permute(0, 3, 1, 2)
    return x.index_select(0, order)
