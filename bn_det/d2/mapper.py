"""Images and annotations as Detectron2 reads them, with errors that name the file."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager

from ..data.images import check_image, readable_image


class Mapper(DatasetMapper):
    """Detectron2's. Images that it would take for others are refused: those of more than 8 bits."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        path = dataset_dict["file_name"]
        with readable_image(path):
            check_image(PathManager.get_local_path(path))
            return super().__call__(dataset_dict)
