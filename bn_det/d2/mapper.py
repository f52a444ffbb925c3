"""Images and annotations as Detectron2 reads them, with errors that name the file."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager

from ..data.images import check_image, check_size, read_image, readable_image


class _ShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but that no side of a long and narrow image becomes 0 pixels."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):  # none where the config asks for 0
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class Mapper(DatasetMapper):
    """Detectron2's, but that it refuses images which it would take for others.

    Those are of more than 8 bits, or broken. Those that are long and narrow it takes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.augmentations.augs = [_of_any_shape(aug) for aug in self.augmentations.augs]

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        path = dataset_dict["file_name"]
        with readable_image(path):
            local = PathManager.get_local_path(path)
            check_image(local)
            try:
                return super().__call__(dataset_dict)
            except SizeMismatchError:
                check_size(path, read_image(local).shape[:2], dataset_dict)
                raise


def _of_any_shape(aug: T.Augmentation) -> T.Augmentation:
    if type(aug) is not T.ResizeShortestEdge:
        return aug
    return _ShortestEdge(aug.short_edge_length, aug.max_size, aug.sample_style, aug.interp)
