"""Images and annotations as Detectron2 reads them, with errors that name the file."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager

from ..data.images import check_image, check_size, read_image, readable_image


class Mapper(DatasetMapper):
    """Detectron2's, but that it refuses images which it would take for others.

    Those are of more than 8 bits, or broken.
    """

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
