"""Loading of images for the torchvision host, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from torchvision import tv_tensors
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2

from ..data.category_batches import CategoryBatches
from ..data.coco import CocoDataset, without_objects
from ..data.images import check_size, read_image, resized_size
from ..data.masks import decode_mask
from ..layers.comm import share, world

Sample = tuple[Tensor, dict[str, Tensor], dict]
"""An image (3, H, W) in float32 from 0 to 255, its target for training, and its record."""


class _ShortestSize(v2.RandomShortestSize):
    """torchvision's, but to the sizes of Detectron2, which are rounded to the nearest."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        shortest = self.min_size[int(torch.randint(len(self.min_size), ()))]
        height, width = v2.functional.get_size(flat_inputs[0])  # of the image
        return {"size": resized_size(height, width, shortest, self.max_size)}


class DetectionDataset(Dataset):
    """Images with boxes, and with masks where asked for, as torchvision's detectors take them.

    Args:
        records: in Detectron2's standard format, with boxes as x, y, width, height.
        transform: applied to a uint8 image and its boxes.
        image_format: "BGR" or "RGB".
        seed: with the number of a draw it determines the random part of the transform, so that
            the same draw gives the same sample in whatever process, at whatever time.
        masks: whether targets have ``masks``, uint8 of shape (N, H, W); the records then have
            segmentations.
    """

    def __init__(
        self,
        records: Sequence[dict],
        transform: v2.Transform,
        image_format: str,
        seed: int = 0,
        masks: bool = False,
    ) -> None:
        self.records = records
        self.transform = transform
        self.image_format = image_format
        self.seed = seed
        self.masks = masks

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample of a draw, which is (number of the draw, index of the record)."""
        draw, index = key
        record = self.records[index]
        image = _read_image(record["file_name"], self.image_format)
        check_size(record["file_name"], image.shape[1:], record)
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), image.shape[1:])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[1:]),
            "labels": torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(_read_masks(objects, record))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, draw)) % 2**63)
            image, target = self.transform(image, target)
        boxes = target["boxes"].as_subclass(Tensor)
        proper = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(1)
        target = {key: value.as_subclass(Tensor)[proper] for key, value in target.items()}
        return image.as_subclass(Tensor).float(), target, record


def build_train_loader(
    cfg: CfgNode, datasets: Sequence[CocoDataset], seed: int, start_iter: int
) -> DataLoader:
    """Batches from an iteration on, in an order that the seed alone determines.

    Each epoch is a permutation of all images; with the same seed, the batch of an iteration is the
    same wherever a run starts. Of several processes each gets its share of every batch, and all
    together what one would get.
    """
    records = [r for d in datasets for r in d.records]
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = [r for r in records if has_objects(r)]
    if not records:
        raise without_objects("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    flips = {
        "horizontal": [v2.RandomHorizontalFlip()],
        "vertical": [v2.RandomVerticalFlip()],
        "none": [],
    }[cfg.INPUT.RANDOM_FLIP]
    resize = _ShortestSize(list(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN)
    transform = v2.Compose([resize, *flips])
    dataset = DetectionDataset(records, transform, cfg.INPUT.FORMAT, seed, cfg.MODEL.MASK_ON)
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    mine = share(batch_size)
    draws = _Draws(_train_order(cfg, records, seed), start_iter, batch_size, mine)
    return _loader(cfg, dataset, draws, len(mine))


def _train_order(
    cfg: CfgNode, records: Sequence[dict], seed: int
) -> RandomSampler | _CategorySampler:
    batch_size, num_categories = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.CATEGORIES_PER_BATCH
    num_samples = cfg.SOLVER.MAX_ITER * batch_size
    if num_categories:
        num_ranks = world()[1]
        batches = CategoryBatches(records, batch_size // num_ranks, num_categories, seed)
        return _CategorySampler(batches, range(num_ranks), num_samples)
    generator = torch.Generator().manual_seed(seed)
    return RandomSampler(records, num_samples=num_samples, generator=generator)


class _CategorySampler(Sampler):
    """The images of all processes, batch by batch."""

    def __init__(self, batches: CategoryBatches, ranks: Sequence[int], num_samples: int) -> None:
        self.batches, self.ranks, self.num_samples = batches, ranks, num_samples

    def __iter__(self) -> Iterator[int]:
        return islice(self.batches.orders(self.ranks), self.num_samples)

    def __len__(self) -> int:
        return self.num_samples


def build_test_loader(
    cfg: CfgNode, dataset: CocoDataset, batch_size: int = 1, masks: bool = False
) -> DataLoader:
    """This process's share of a data set in its order; by default one image a batch.

    Args:
        masks: whether targets have them; evaluation reads them elsewhere.
    """
    size = cfg.INPUT.MIN_SIZE_TEST
    resize = _ShortestSize([size], cfg.INPUT.MAX_SIZE_TEST) if size else v2.Identity()
    images = DetectionDataset(dataset.records, resize, cfg.INPUT.FORMAT, masks=masks)
    draws = _Draws(SequentialSampler(images), 0, len(images), share(len(images)))
    return _loader(cfg, images, draws, batch_size)


def has_objects(record: dict) -> bool:
    """Whether an image has an annotation that is no crowd; training can leave out the others."""
    return any(not a["iscrowd"] for a in record["annotations"])


class _Draws(Sampler):
    """The numbered draws of a sampler in batches: from each batch on from the first, a part."""

    def __init__(
        self,
        sampler: RandomSampler | _CategorySampler | SequentialSampler,
        first: int,
        batch_size: int,
        part: range,
    ) -> None:
        self.sampler = sampler
        self.first = first
        self.batch_size = batch_size
        self.part = part

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draws = islice(enumerate(self.sampler), self.first * self.batch_size, None)
        return (d for d in draws if d[0] % self.batch_size in self.part)

    def __len__(self) -> int:
        return (len(self.sampler) // self.batch_size - self.first) * len(self.part)


def _loader(cfg: CfgNode, dataset: DetectionDataset, draws: _Draws, batch_size: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=draws,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        # The transforms have generators of their own; without this, workers would draw their base
        # seed from the global one, which a resumed run could not follow.
        generator=torch.Generator(),
    )


def _read_masks(objects: Sequence[dict], record: dict) -> Tensor:
    """The masks of annotations, uint8 of shape (N, H, W)."""
    size = record["height"], record["width"]
    masks = torch.zeros(len(objects), *size, dtype=torch.uint8)
    for k, annotation in enumerate(objects):
        masks[k] = torch.from_numpy(decode_mask(annotation["segmentation"], *size))
    return masks


def _read_image(path: str, image_format: str) -> tv_tensors.Image:
    """An image file as uint8 of shape (3, H, W), upright by its EXIF tag."""
    pixels = torch.from_numpy(read_image(path)).permute(2, 0, 1)
    return tv_tensors.Image(pixels if image_format == "RGB" else pixels.flip(0))
