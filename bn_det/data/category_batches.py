"""Batches of few categories with several images of each: samples that are alike, on purpose."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from ..errors import InputError

KEY = "DATALOADER.CATEGORIES_PER_BATCH"


class CategoryBatches:
    """Draws batches of few categories, with as many images of each.

    In such a batch an image has others like it, which a model can learn to count on (Wu & Johnson,
    *Rethinking "Batch" in BatchNorm*, Sec. 6). Images are in the order first of each category,
    second of each, and so on: ghost batches of as many contiguous images as there are categories
    then hold one of each, and none of an image's likes.

    A batch depends on the seed, its number and the rank alone.

    Args:
        records: images in Detectron2's standard format. An image is of the category that most of
            its objects have, of the lowest where several do; one without objects is not drawn.
        batch_size: images in a batch of one process.
        num_categories: categories in a batch.
        seed: of the draws.

    Raises:
        InputError: the batch cannot be divided so, or there are too few categories with as many
            images.
    """

    def __init__(
        self, records: Sequence[dict], batch_size: int, num_categories: int, seed: int
    ) -> None:
        if num_categories < 1 or batch_size % num_categories:
            raise InputError(
                f"{KEY}: {num_categories} is not accepted with batches of {batch_size} images; use "
                "a divisor, or 0 for images of any category"
            )
        self.num_categories, self.num_each = num_categories, batch_size // num_categories
        images: dict[int, list[int]] = defaultdict(list)
        for index, record in enumerate(records):
            category = category_of(record)
            if category is not None:
                images[category].append(index)
        self.images = [images[c] for c in sorted(images) if len(images[c]) >= self.num_each]
        if len(self.images) < num_categories:
            raise InputError(
                f"{KEY}: {num_categories} is not accepted: the data has {len(self.images)} "
                f"categories with {self.num_each} images and more"
            )
        self.seed = seed

    def draw(self, number: int, rank: int = 0) -> list[int]:
        """The indices of the images of a process's batch."""
        rng = np.random.default_rng([self.seed, number, rank])
        categories = rng.choice(len(self.images), self.num_categories, replace=False)
        of_each = [rng.choice(self.images[c], self.num_each, replace=False) for c in categories]
        return np.stack(of_each, axis=1).flatten().tolist()

    def orders(self, ranks: Sequence[int]) -> Iterator[int]:
        """Indices without end: batch by batch, in a batch those of several ranks."""
        return (k for number in count() for rank in ranks for k in self.draw(number, rank))


def category_of(record: dict) -> int | None:
    """The category that most objects of an image have; None without objects."""
    counts = Counter(a["category_id"] for a in record["annotations"] if not a.get("iscrowd", 0))
    return min(counts, key=lambda c: (-counts[c], c)) if counts else None


def whole_batches(
    records: Sequence[dict], batch_size: int, num_categories: int, seed: int = 0
) -> list[int]:
    """Indices of a data set for a measure: whole batches, about as many images as it has.

    Args:
        num_categories: as DATALOADER.CATEGORIES_PER_BATCH; with 0 every image once, in its order,
            but for those that are too few for a last batch.

    Raises:
        InputError: there are fewer images than a batch has.
    """
    num_batches = len(records) // batch_size
    if not num_batches:
        raise InputError(
            f"--images-per-batch: {batch_size} is not accepted; the data has {len(records)} images"
        )
    if not num_categories:
        return list(range(num_batches * batch_size))
    batches = CategoryBatches(records, batch_size, num_categories, seed)
    return [index for k in range(num_batches) for index in batches.draw(k)]
