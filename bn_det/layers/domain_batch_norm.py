"""Batch normalization of several domains: the levels of a feature pyramid, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import choose
from .batch_norm import Batch, BatchNorm2d, check_batch_sizes
from .joint import joint_batch_norm
from .partition import Partition

SHARING = ("shared", "per_domain")
"""What statistics, population and affine can each be."""


class DomainBatchNorm2d(BatchNorm2d):
    """Batch normalization of a list of tensors, one for each domain.

    What the domains have in common is three choices, each "shared" or "per_domain" (Wu & Johnson,
    *Rethinking "Batch" in BatchNorm*, Sec. 5 and Table 5):

    * ``statistics``: whose samples normalize in training; all domains' together, or each its own.
    * ``population``: whose statistics are kept for test time. Shared ones are an EMA that is
      updated once with the merged batch where ``statistics`` is shared, and otherwise once for
      each domain in the list's order, as one ``nn.BatchNorm2d`` called once a level does.
    * ``affine``: whether the domains share weight and bias.

    The list is explicit: unlike Detectron2's ``CycleBatchNormList`` there is no hidden position
    that a call too many could shift. Its keys are ``CycleBatchNormList``'s: what is per domain is
    under the domain's number (``0.running_mean``), what is shared has no prefix (``weight``), so
    that checkpoints go both ways.

    An ``nn.BatchNorm2d`` by type, so that a weight decay for normalization layers reaches the
    affine. Tools that call or convert an ``nn.BatchNorm2d`` with a single tensor in mind (fvcore's
    PreciseBN, ``convert_sync_batchnorm``) do not support it.

    Args:
        num_features: number of channels C.
        num_domains: length of the lists.
        eps, momentum: as in ``nn.BatchNorm2d``.
        choices: as in :class:`BatchNorm2d`. ``group``, ``ghost_size`` and ``ghost_order`` make the
            normalization batches of what ``statistics`` says; over several processes there is one
            collective for all domains.

    Shape:
        a list of ``num_domains`` tensors (N_k, C, H_k, W_k) to a list of the same shapes. A domain
        may be empty: it gets an empty output, and its statistics are left alone.

    Raises:
        TypeError: the input is not a list or tuple.
        ValueError: it has another length, or a domain another number of channels; or (an
            InputError) in training a normalization batch has a single value per channel.
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        statistics: str = "per_domain",
        population: str = "per_domain",
        affine: str = "shared",
        **choices: Any,
    ) -> None:
        choose("statistics", statistics, SHARING)
        choose("population", population, SHARING)
        choose("affine", affine, SHARING)
        if num_domains < 1:
            raise ValueError(f"num_domains: {num_domains!r} is not accepted; use 1 or more")
        super().__init__(
            num_features,
            eps,
            momentum,
            affine=affine == "shared",
            track_running_stats=population == "shared",
            **choices,
        )
        self.num_domains = num_domains
        self.statistics = statistics
        self.population = population
        self.affine_sharing = affine
        if "per_domain" in (population, affine):
            for k in range(num_domains):
                own = BatchNorm2d(
                    num_features,
                    eps,
                    momentum,
                    affine=affine == "per_domain",
                    track_running_stats=population == "per_domain",
                    update_population=self.update_population,
                )
                self.add_module(str(k), own)

    def forward(self, xs: Sequence[Tensor], groups: Tensor | None = None) -> list[Tensor]:
        """Normalize the tensors of all domains.

        Args:
            groups: as in :class:`BatchNorm2d`, for the samples of every domain.
        """
        self._check_input(xs)
        if not self.normalizes_by_batch and not self.needs_batches:
            return self._normalize_by_population(xs)
        group = self.group_in_use(groups)
        # One partition for all, so that a random one has the same samples in each domain.
        partitions = {n: self.ghosts(n, groups) for n in dict.fromkeys(map(len, xs))}
        ghosts = [partitions[len(x)] for x in xs]
        self._check_ghosts(ghosts)
        one_each = group is None and all(len(g.sizes) == 1 for g in ghosts)
        alone = self.statistics == "per_domain" or not any(x.numel() for x in xs)
        if one_each and alone and self.is_plain:
            return [self._normalize_by_domain(k, x) for k, x in enumerate(xs)]
        return self._normalize_jointly(xs, group, ghosts)

    @property
    def normalizes_by_batch(self) -> bool:
        return self._statistics == "batch"

    @property
    def needs_batches(self) -> bool:
        populations = [self.population_of(k) for k in range(self.num_domains)]
        return any(p.tracks or p.observer is not None for p in populations)

    def batch_of(self, domain: int) -> int:
        """The number of the normalization batch that the domain's samples are in."""
        return 0 if self.statistics == "shared" else domain

    def population_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's population statistics."""
        return self if self.population == "shared" else self.get_submodule(str(domain))

    def affine_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's weight and bias."""
        return self if self.affine_sharing == "shared" else self.get_submodule(str(domain))

    def name_of(self, domain: int) -> str:
        """What messages call the domain."""
        return f"domain {domain}"

    def num_samples(self, xs: Sequence[Tensor]) -> list[int]:
        """The number of samples of each domain in an input."""
        return [len(x) for x in xs]

    def extra_repr(self) -> str:
        choices = (
            f"{self.num_features}, num_domains={self.num_domains}, eps={self.eps}, "
            f"momentum={self.momentum}, statistics={self.statistics}, "
            f"population={self.population}, affine={self.affine_sharing}"
        )
        return choices + self.repr_of_choices()

    def _normalize_by_population(self, xs: Sequence[Tensor]) -> list[Tensor]:
        affines = [self.affine_of(k) for k in range(self.num_domains)]
        return [
            self.population_of(k).normalize_by_population(x, affine.weight, affine.bias)
            for k, (x, affine) in enumerate(zip(xs, affines, strict=True))
        ]

    def _normalize_by_domain(self, domain: int, x: Tensor) -> Tensor:
        affine = self.affine_of(domain)
        return self.population_of(domain).normalize_by_batch(
            x, affine.weight, affine.bias, f"{self.name_of(domain)}: "
        )

    def _normalize_jointly(
        self, xs: Sequence[Tensor], group: dist.ProcessGroup | None, ghosts: Sequence[Partition]
    ) -> list[Tensor]:
        """By the statistics of pieces of domains, on all processes of the group."""
        pieces = [piece for g, x in zip(ghosts, xs, strict=True) for piece in g.split(x)]
        domain_of = [k for k, g in enumerate(ghosts) for _ in g.sizes]
        keys = [(self.batch_of(k), b) for k, g in enumerate(ghosts) for b in range(len(g.sizes))]
        index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        batch_of = [index[key] for key in keys]
        first_domains = [domain_of[batch_of.index(b)] for b in index.values()]
        parts = self.batches_of(pieces, group, domain_of)
        by_domain = _grouped(parts, domain_of)
        batches = [Batch.merge(of_batch) for of_batch in _grouped(parts, batch_of)]
        self._check_sizes(batches, by_domain)
        if not self.normalizes_by_batch:
            ys = self._normalize_by_population(xs)
            self._update(batches, first_domains, by_domain)
            return ys
        affines = [
            self.affine_for(batches[b], self.affine_of(k), self.population_of(k))
            for k, b in zip(domain_of, batch_of, strict=True)
        ]
        self._update(batches, first_domains, by_domain)
        moments = [b.moments for b in batches]
        ys = joint_batch_norm(
            pieces, moments, batch_of, *zip(*affines, strict=True), self.eps, group
        )
        return [g.join(y) for g, y in zip(ghosts, _grouped(ys, domain_of), strict=True)]

    def _update(
        self,
        batches: Sequence[Batch],
        first_domains: Sequence[int],
        by_domain: Sequence[Sequence[Batch]],
    ) -> None:
        """Update population statistics with normalization batches, or else domain by domain."""
        if self.statistics == self.population == "shared":
            of_layer: dict[BatchNorm2d, list[Batch]] = {}
            for batch, domain in zip(batches, first_domains, strict=True):
                of_layer.setdefault(self.population_of(domain), []).append(batch)
            for layer, of_this in of_layer.items():
                layer.update_population_statistics(of_this)
        else:
            for k, of_domain in enumerate(by_domain):
                self.population_of(k).update_population_statistics(of_domain)

    def _check_sizes(self, batches: Sequence[Batch], by_domain: Sequence[Sequence[Batch]]) -> None:
        if self.statistics == "shared":
            check_batch_sizes(batches, "all domains together: ")
        if "per_domain" in (self.statistics, self.population):  # a domain needs its own variance
            for k, of_domain in enumerate(by_domain):
                check_batch_sizes(of_domain, f"{self.name_of(k)}: ")

    def _check_input(self, xs: Sequence[Tensor]) -> None:
        if not isinstance(xs, (list, tuple)):
            raise TypeError(
                f"DomainBatchNorm2d takes a list of {self.num_domains} tensors, one for each "
                f"domain, got {type(xs).__name__}"
            )
        if len(xs) != self.num_domains:
            raise ValueError(
                f"DomainBatchNorm2d takes one tensor for each of its {self.num_domains} domains, "
                f"got a list of {len(xs)}"
            )
        for k, x in enumerate(xs):
            if x.dim() != 4 or x.shape[1] != self.num_features:
                raise ValueError(
                    f"{self.name_of(k)}: shape (N, {self.num_features}, H, W) expected, "
                    f"got {tuple(x.shape)}"
                )

    def _check_ghosts(self, ghosts: Sequence[Partition]) -> None:
        """Domains that are normalized together need as many ghost batches."""
        counts: dict[int, set[int]] = {}
        for k, g in enumerate(ghosts):
            counts.setdefault(self.batch_of(k), set()).add(len(g.sizes))
        if any(len(c) > 1 for c in counts.values()):
            raise ValueError(
                f"domains of {[sum(g.sizes) for g in ghosts]} samples have no ghost batches in "
                "common; use statistics 'per_domain', or as many samples in each"
            )


def called_batch_norms(model: nn.Module) -> dict[_BatchNorm, str]:
    """Every BatchNorm of a model with its name, but those that only hold what is a domain's."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    domains = [m for m in names if isinstance(m, DomainBatchNorm2d)]
    held = {part for layer in domains for part in layer.children()}
    return {layer: name for layer, name in names.items() if layer not in held}


T = TypeVar("T")


def _grouped(values: Sequence[T], index_of: Sequence[int]) -> list[list[T]]:
    """The values with index 0, those with index 1, and so on."""
    grouped: list[list[T]] = [[] for _ in range(max(index_of) + 1)]
    for value, index in zip(values, index_of, strict=True):
        grouped[index].append(value)
    return grouped


def state_holders(layer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """What holds population statistics, and what the affine: each pair that a domain has."""
    if not isinstance(layer, DomainBatchNorm2d):
        return [(layer, layer)]
    domains = range(layer.num_domains)
    return list(dict.fromkeys((layer.population_of(k), layer.affine_of(k)) for k in domains))
