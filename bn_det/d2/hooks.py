"""Our hooks as Detectron2's."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, get_event_storage, has_event_storage

from .. import hooks
from ..population import surround_passes


class AverageStatistics(hooks.AverageStatistics, HookBase):
    """See :class:`bn_det.hooks.AverageStatistics`."""


def _scratch_storage() -> EventStorage:
    """For what a model logs in passes that are no training; as late as the training is."""
    return EventStorage(get_event_storage().iter if has_event_storage() else 0)


surround_passes(_scratch_storage)
