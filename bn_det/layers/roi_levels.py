"""RoIs that are pooled from the levels of a pyramid, and batch normalization of each level's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from .domain_batch_norm import DomainBatchNorm2d
from .scope import DomainScope

_ROIS = DomainScope(
    "RoI",
    "level",
    "name the levels that RoIs are pooled from by bn_det.roi_levels around the head's call; in a "
    "detector from a config, MODEL.ROI_HEADS.NAME 'BNCascadeROIHeads' does",
)


def roi_levels(levels: Tensor | Sequence[int]) -> AbstractContextManager[None]:
    """Inside the block, the levels that the RoIs come from which a head is called with.

        with bn_det.roi_levels(levels):
            features = box_head(rois)

    For every :class:`RoILevelBatchNorm2d` in the head. With activation checkpointing the backward
    pass has to be in the block, too.

    Args:
        levels: for each RoI the number of the level that it is pooled from, counted from 0 for the
            finest; integers of shape (R,).
    """
    return _ROIS.named(levels)


class RoILevelBatchNorm2d(DomainBatchNorm2d):
    """Batch normalization of RoIs, whose domain is the feature level that they are pooled from.

    It is a :class:`DomainBatchNorm2d` that takes a tensor of RoIs of any levels; which RoI is from
    which level is said around the forward pass (:func:`roi_levels`).

    Args:
        num_features: number of channels C.
        num_domains: number of levels.
        kwargs: as in :class:`DomainBatchNorm2d`; ``ghost_size`` is of a level's RoIs.

    Shape:
        (R, C, H, W) to the same. A level may have no RoI, and so may all.

    Raises:
        InputError: from the forward pass, if a RoI's level is not named or is unknown; if in
            training a normalization batch has a single value per channel.
    """

    def forward(  # type: ignore[override]  # of all domains' samples, in one tensor
        self, x: Tensor, groups: Tensor | None = None
    ) -> Tensor:
        """Normalize x. Groups are not accepted."""
        if groups is not None:
            raise ValueError("groups: not accepted by a layer that normalizes by level")
        rois = _ROIS.partition(x, self.num_domains, self.name)
        return rois.join(super().forward(rois.split(x)))

    @property
    def takes_list(self) -> bool:
        return False

    def name_of(self, domain: int) -> str:
        return f"level {domain}"

    def num_samples(self, xs: Any) -> list[int]:
        return _ROIS.partition(xs, self.num_domains).sizes
