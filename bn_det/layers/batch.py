"""A normalization batch, as what is merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import InputError, of_other_type
from .moments import Moments


class Batch(NamedTuple):
    """A normalization batch.

    Attributes:
        moments: of all its values.
        size: number of values per channel, of which only 0, 1 and more are told apart; the exact
            one may still be computed by a device.
    """

    moments: Moments
    size: int

    @classmethod
    def merge(cls, parts: Sequence[Batch]) -> Batch:
        """The union of disjoint parts."""
        return cls(Moments.merge([p.moments for p in parts]), sum(p.size for p in parts))


def check_size(size: int, where: str = "") -> None:
    """Raise InputError if a normalization batch has a single value per channel.

    Args:
        where: begins the message.
    """
    if size == 1:
        raise InputError(
            f"{where}a normalization batch of a single value per channel has no variance: use "
            "more images (SOLVER.IMS_PER_BATCH), larger ones (INPUT.MIN_SIZE_TRAIN, "
            "MIN_SIZE_TEST), or statistics shared between domains (BN.STATISTICS, BN.POPULATION)"
        )


def refuse_list(x: object) -> None:
    """Raise InputError for a list of levels, which a layer that takes one tensor has been given."""
    if isinstance(x, (list, tuple)):
        raise of_other_type("x", x, "a tensor; a DomainBatchNorm2d takes a list of levels")
