"""Domains of samples that are named around a model's call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..errors import InputError
from .partition import Partition


class DomainScope:
    """Says inside a block of which domain each sample of a tensor is, and is gone after it.

    Args:
        sample, domain: what messages call a sample and its domain.
        how_to_name: what they tell one to do where it is not said.
        where_not: where other samples are found, for a message that ends with it.
    """

    def __init__(self, sample: str, domain: str, how_to_name: str, where_not: str = "") -> None:
        self.sample, self.domain, self.how_to_name = sample, domain, how_to_name
        self.where_not = where_not
        self._current: ContextVar[_Named | None] = ContextVar(domain, default=None)
        # On a GPU, autograd recomputes activations in a thread of its own, which is in no block.
        self._in_any_thread: _Named | None = None

    @contextmanager
    def named(self, domains: Iterable[int | None] | Tensor) -> Iterator[None]:
        """A block for one call; the domain of each sample, from 0, and None for an unknown one."""
        named, before = _Named(domains), self._in_any_thread
        token = self._current.set(named)
        self._in_any_thread = named
        try:
            yield
        finally:
            self._current.reset(token)
            self._in_any_thread = before

    def _get(self) -> _Named | None:
        return self._current.get() or self._in_any_thread

    @property
    def names(self) -> list[int | None]:
        """The domain of each sample inside a block; none outside."""
        named = self._get()
        domains = () if named is None else named.domains
        return domains.tolist() if isinstance(domains, Tensor) else list(domains)

    def partition(self, x: Tensor, num_domains: int, layer: str = "") -> Partition:
        """The partition of a tensor's samples by their domains.

        Args:
            x: shape (N, *), the samples that have been named.
            layer: the name of the one that asks, for messages.

        Raises:
            InputError: nothing is named, a domain is not one of 0 to ``num_domains`` - 1, or x has
                another number of samples.
        """
        named = self._get()
        if named is None:
            raise InputError(f"the {self.sample}s have no {self.domain}s: {self.how_to_name}")
        key = (num_domains, x.device)
        if key not in named.partitions:
            domains = self._checked(named, num_domains)
            named.partitions[key] = Partition.by_domain(domains, num_domains, x.device)
        partition = named.partitions[key]
        if len(x) != sum(partition.sizes):
            raise InputError(
                f"the {self.domain}s of {sum(partition.sizes)} {self.sample}s are named, and "
                f"{layer or 'the layer'} got {len(x)} samples: they have to be those {self.sample}s"
                f"{self.where_not}"
            )
        return partition

    def _checked(self, named: _Named, num_domains: int) -> list[int]:
        # Not before a layer asks, as reading it waits for the device.
        domains = named.domains
        domains = domains.tolist() if isinstance(domains, Tensor) else domains
        for k, domain in enumerate(domains):
            if domain not in range(num_domains):
                raise InputError(
                    f"{self.sample} {k} of the batch is of {self.domain} {domain!r}, and the layer "
                    f"knows the {self.domain}s 0 to {num_domains - 1}; {self.how_to_name}"
                )
        return domains


class _Named:
    """What a block has named, and what layers have made of it."""

    def __init__(self, domains: Iterable[int | None] | Tensor) -> None:
        self.domains = domains if isinstance(domains, Tensor) else list(domains)
        self.partitions: dict[tuple[int, torch.device], Partition] = {}
