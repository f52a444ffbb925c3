"""Images of several sources: which is of which, and batch normalization of each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..errors import check_positive, choose
from .batch_norm import BatchNorm2d
from .domain_batch_norm import SHARING, DomainBatchNorm2d
from .scope import DomainScope

_IMAGES = DomainScope(
    "image",
    "source",
    "name the sources of a batch by bn_det.image_sources; in a detector from a config, by "
    "DATASETS.SOURCES for a whole data set (in a trainer of your own on Detectron2 after "
    "bn_det.d2.register_datasets(cfg)), or by the key 'source' in an image's dict",
    "; a RoI head has RoIs, of which there are more: keep it to backbone, FPN and dense heads, or "
    "in a detector of torchvision call bn_det.tv.sources.name_roi_sources(model.roi_heads)",
)


def image_sources(sources: Iterable[int | None]) -> AbstractContextManager[None]:
    """Inside the block, the sources of the images that a model is called with.

        with bn_det.image_sources([0, 0, 1]):
            losses = model(three_images)

    For every :class:`SourceBatchNorm2d` in the model. With activation checkpointing the backward
    pass has to be in the block, too.

    Args:
        sources: for each image the number of its source (data set, lab), counted from 0; None for
            an unknown one, which those layers refuse.
    """
    return _IMAGES.named(sources)


def record_sources(records: Iterable[Mapping[str, Any]]) -> AbstractContextManager[None]:
    """:func:`image_sources` of images' dicts: what they have under "source"."""
    return image_sources([record.get("source") for record in records])


def named_sources() -> list[int | None]:
    """The source of each image in a block of :func:`image_sources`; none outside of it."""
    return _IMAGES.names


class SourceBatchNorm2d(DomainBatchNorm2d):
    """Batch normalization with statistics for each source of images (data set, lab).

    Which image is of which source is said around the forward pass (:func:`image_sources`). A batch
    may hold images of one or of several sources; each source's are normalized together, and by
    their own population statistics in evaluation (Chang et al., *Domain-Specific Batch
    Normalization for Unsupervised Domain Adaptation*, 2019).

    It is a :class:`DomainBatchNorm2d` whose domains are the sources: ``K.running_mean`` is of
    source K. For a head on several feature levels, ``statistics`` and ``population`` say what the
    levels of one source have in common; with a ``population`` per domain, a level of a source is a
    domain, and ``K.running_mean`` of source ``K // num_levels`` and level ``K % num_levels``.
    The affine is shared by all, or is each domain's own.

    A state dict of the same layer without sources can be loaded: each source then begins with its
    statistics.

    Args:
        num_features: number of channels C.
        num_sources: number of sources.
        num_levels: length of the lists that it takes; None for a layer that takes a tensor.
        eps, momentum: as in ``nn.BatchNorm2d``.
        statistics, population: of the levels of a source, "shared" or "per_domain".
        affine: "shared" or "per_domain".
        choices: as in :class:`DomainBatchNorm2d`.

    Shape:
        (N, C, H, W) to the same, or a list of ``num_levels`` such tensors to the same.

    Raises:
        InputError: from the forward pass, if an image's source is not named or is unknown; if in
            training a normalization batch has a single value per channel.
    """

    def __init__(
        self,
        num_features: int,
        num_sources: int,
        num_levels: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        statistics: str = "per_domain",
        population: str = "per_domain",
        affine: str = "shared",
        **choices: Any,
    ) -> None:
        check_positive("num_sources", num_sources)
        if num_levels is not None:
            check_positive("num_levels", num_levels)
        choose("population", population, SHARING)
        self._levels = num_levels or 1
        super().__init__(
            num_features,
            num_sources * self._levels,
            eps,
            momentum,
            statistics=statistics,
            population="per_domain",
            affine=affine,
            **choices,
        )
        self.num_sources, self.num_levels = num_sources, num_levels
        if population != "per_domain":
            self.population = population
            for k in range(num_sources, self.num_domains):
                delattr(self, str(k))

    def forward(  # type: ignore[override]  # of a list, or of all domains' samples in one tensor
        self, xs: Tensor | Sequence[Tensor], groups: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Normalize a tensor, or those of all levels. Groups are not accepted."""
        if groups is not None:
            raise ValueError("groups: not accepted by a layer that normalizes by source")
        levels = self._levels_of(xs)
        images = [_IMAGES.partition(x, self.num_sources, self.name) for x in levels]
        parts = [of_level.split(x) for of_level, x in zip(images, levels, strict=True)]
        # Source by source, as batch_of and population_of count the domains.
        ys = super().forward([part for of_source in zip(*parts, strict=True) for part in of_source])
        joined = [of_level.join(ys[k :: self._levels]) for k, of_level in enumerate(images)]
        return joined[0] if self.num_levels is None else joined

    @property
    def takes_list(self) -> bool:
        return self.num_levels is not None

    def batch_of(self, domain: int) -> int:
        return domain // self._levels if self.statistics == "shared" else domain

    def population_of(self, domain: int) -> BatchNorm2d:
        shared = self.population == "shared"
        return getattr(self, str(domain // self._levels if shared else domain))

    def affine_of(self, domain: int) -> BatchNorm2d:
        return self if self.affine_sharing == "shared" else self.population_of(domain)

    def name_of(self, domain: int) -> str:
        source, level = divmod(domain, self._levels)
        return f"source {source}" + ("" if self.num_levels is None else f", domain {level}")

    def num_samples(self, xs: Any) -> list[int]:
        x = xs if self.num_levels is None else xs[0]
        sizes = _IMAGES.partition(x, self.num_sources).sizes
        return [n for n in sizes for _ in range(self._levels)]

    def extra_repr(self) -> str:
        levels = "" if self.num_levels is None else f", num_levels={self.num_levels}"
        return f"{super().extra_repr()}, num_sources={self.num_sources}{levels}"

    def _levels_of(self, xs: Any) -> Sequence[Tensor]:
        levels = [xs] if self.num_levels is None else xs
        if not isinstance(levels, (list, tuple)) or len(levels) != self._levels:
            raise TypeError(
                f"SourceBatchNorm2d takes a list of {self._levels} tensors, one for each level, "
                f"got {type(levels).__name__}"
            )
        return levels

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Take what a layer without sources has, of all levels or of each, for each source."""
        num = self.num_sources if self.population == "shared" else self.num_domains
        names = list(self.population_of(0).state_dict())
        own = [(k, f"{prefix}{k}.{name}") for k in range(num) for name in names]
        given = {k for k, name in own if name in state_dict}
        of_levels = self.num_levels is not None and self.population == "per_domain"
        # Otherwise they are those of sources, of which none is another's.
        if not given or (of_levels and given == {*range(self._levels)}):
            for name in names:
                of_all_levels = state_dict.pop(prefix + name, None)
                for k in range(num):
                    of_level = f"{prefix}{k % self._levels}.{name}"
                    value = state_dict.get(of_level, of_all_levels) if given else of_all_levels
                    if value is not None:
                        state_dict[f"{prefix}{k}.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)
