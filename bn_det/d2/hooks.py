"""Our hooks as Detectron2's."""

from __future__ import annotations

from detectron2.engine import HookBase

from .. import hooks


class AverageStatistics(hooks.AverageStatistics, HookBase):
    """See :class:`bn_det.hooks.AverageStatistics`."""
