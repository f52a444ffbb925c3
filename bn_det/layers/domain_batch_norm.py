"""Batch normalization of several domains: the levels of a feature pyramid, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import InputError, check_positive, choose
from .batch_norm import BatchNorm2d
from .forward import Domain, batch_norm

M = TypeVar("M", bound=nn.Module)

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
    affine. What is "per_domain" is held by a :class:`BatchNorm2d` of each domain: set an attribute
    such as ``momentum`` on all of ``layer.modules()``. Tools that call or convert an
    ``nn.BatchNorm2d`` with a single tensor in mind (fvcore's PreciseBN,
    ``convert_sync_batchnorm``) do not support it.

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
        check_positive("num_domains", num_domains)
        if "track_running_stats" in choices:
            raise InputError(
                "track_running_stats: it is not accepted by a layer of domains, which has "
                "statistics; use BatchNorm2d for each"
            )
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
            of_parameters = {k: choices[k] for k in ("device", "dtype", "bias") if k in choices}
            for k in range(num_domains):
                own = BatchNorm2d(
                    num_features,
                    eps,
                    momentum,
                    affine=affine == "per_domain",
                    track_running_stats=population == "per_domain",
                    update_population=self.update_population,
                    **of_parameters,
                )
                self.add_module(str(k), own)

    def forward(  # type: ignore[override]  # an nn.BatchNorm2d by type, but of lists
        self, xs: Sequence[Tensor], groups: Tensor | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        """Normalize the tensors of all domains.

        Args:
            groups: as in :class:`BatchNorm2d`, for the samples of every domain.
            relu: whether to apply a ReLU, too, on a GPU in the same pass.
        """
        self._check_input(xs)
        plan = self.plan([self._domain(k, x) for k, x in enumerate(xs)], groups)
        return batch_norm(plan._replace(relu=True) if relu else plan)

    def _domain(self, k: int, x: Tensor) -> Domain:
        return Domain(
            x, self.population_of(k), self.affine_of(k), self.batch_of(k), self.name_of(k)
        )

    @property
    def takes_list(self) -> bool:
        """Whether it is called with a list of tensors, or with one of samples of all domains."""
        return True

    def batch_of(self, domain: int) -> int:
        """The number of the normalization batch that the domain's samples are in."""
        return 0 if self.statistics == "shared" else domain

    def population_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's population statistics."""
        return self if self.population == "shared" else getattr(self, str(domain))

    def affine_of(self, domain: int) -> BatchNorm2d:
        """The module that holds the domain's weight and bias."""
        return self if self.affine_sharing == "shared" else getattr(self, str(domain))

    def name_of(self, domain: int) -> str:
        """What messages call the domain."""
        return f"domain {domain}"

    def num_samples(self, xs: Any) -> list[int]:
        """The number of samples of each domain in an input."""
        return [len(x) for x in xs]

    def extra_repr(self) -> str:
        choices = (
            f"{self.num_features}, num_domains={self.num_domains}, eps={self.eps}, "
            f"momentum={self.momentum}, statistics={self.statistics}, "
            f"population={self.population}, affine={self.affine_sharing}"
        )
        return choices + self.repr_of_choices()

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


def holders_of_domains(layer: M) -> list[tuple[M | BatchNorm2d, M | BatchNorm2d]]:
    """What holds population statistics, and what the affine, of each domain; one for all others."""
    if not isinstance(layer, DomainBatchNorm2d):
        return [(layer, layer)]
    return [(layer.population_of(k), layer.affine_of(k)) for k in range(layer.num_domains)]


def state_holders(layer: M) -> list[tuple[M | BatchNorm2d, M | BatchNorm2d]]:
    """What holds population statistics, and what the affine: each pair that a domain has."""
    return list(dict.fromkeys(holders_of_domains(layer)))
