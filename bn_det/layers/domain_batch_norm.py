"""Batch normalization of several domains: the levels of a feature pyramid, say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import choose
from ..moments import Moments
from .batch_norm import BatchNorm2d, check_batch_size
from .joint import joint_batch_norm, normalize

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
                )
                self.add_module(str(k), own)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        self._check_input(xs)
        if not self.training:
            return [self._normalize_by_population(k, x) for k, x in enumerate(xs)]
        if self.statistics == "per_domain" or not any(x.numel() for x in xs):
            return [self._normalize_by_domain(k, x) for k, x in enumerate(xs)]
        return self._normalize_by_all(xs)

    def population_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's population statistics."""
        return self if self.population == "shared" else self.get_submodule(str(domain))

    def affine_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's weight and bias."""
        return self if self.affine_sharing == "shared" else self.get_submodule(str(domain))

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_domains={self.num_domains}, eps={self.eps}, "
            f"momentum={self.momentum}, statistics={self.statistics}, "
            f"population={self.population}, affine={self.affine_sharing}"
        )

    def _normalize_by_population(self, domain: int, x: Tensor) -> Tensor:
        population, affine = self.population_of(domain), self.affine_of(domain)
        return normalize(
            x,
            population.running_mean,
            population.running_var,
            affine.weight,
            affine.bias,
            self.eps,
        )

    def _normalize_by_domain(self, domain: int, x: Tensor) -> Tensor:
        check_batch_size([x], f"domain {domain}: ")
        affine = self.affine_of(domain)
        return self.population_of(domain).normalize_by_batch(x, affine.weight, affine.bias)

    def _normalize_by_all(self, xs: Sequence[Tensor]) -> list[Tensor]:
        present = [k for k, x in enumerate(xs) if x.numel() > 0]
        if self.population == "per_domain":  # each will need a variance of its own
            for k in present:
                check_batch_size([xs[k]], f"domain {k}: ")
        check_batch_size(xs, "all domains together: ")
        moments = [Moments.of(x) for x in xs]
        merged = Moments.merge(moments)
        if self.population == "shared":
            self.update_population_statistics(merged)
        else:
            for k in present:
                self.population_of(k).update_population_statistics(moments[k])
        affines = [self.affine_of(k) for k in range(self.num_domains)]
        return joint_batch_norm(
            xs, merged, [a.weight for a in affines], [a.bias for a in affines], self.eps
        )

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
                    f"domain {k}: shape (N, {self.num_features}, H, W) expected, "
                    f"got {tuple(x.shape)}"
                )
