"""Batches of few categories with several images of each."""

from collections import Counter

import pytest

from bn_det.data import CategoryBatches
from bn_det.data.category_batches import category_of, whole_batches
from bn_det.errors import InputError


def record(*categories, crowds=()):
    objects = [{"category_id": c, "iscrowd": 0} for c in categories]
    return {"annotations": objects + [{"category_id": c, "iscrowd": 1} for c in crowds]}


RECORDS = [record(k % 5) for k in range(50)] + [record()] * 3


def test_the_category_of_an_image():
    assert category_of(record(3, 1, 1)) == 1
    assert category_of(record(3, 1)) == 1, "the lowest of equals"
    assert category_of(record(2, crowds=[0, 0])) == 2
    assert category_of(record()) is None


@pytest.mark.parametrize("size, num_categories", [(8, 4), (8, 2), (6, 3), (4, 1), (5, 5)])
def test_composition(size, num_categories):
    batches = CategoryBatches(RECORDS, size, num_categories, seed=3)
    seen = Counter()
    for number in range(200):
        indices = batches.draw(number)
        assert len(set(indices)) == size
        categories = [category_of(RECORDS[k]) for k in indices]
        assert len(set(categories)) == num_categories
        # First of each category, second of each: contiguous ghosts go across categories.
        assert categories == categories[:num_categories] * (size // num_categories)
        seen.update(indices)
    assert set(seen) == set(range(50)), "every image with objects, none without"


def test_draws_depend_on_seed_number_and_rank():
    a = CategoryBatches(RECORDS, 4, 2, seed=3)
    assert a.draw(7, 1) == CategoryBatches(RECORDS, 4, 2, seed=3).draw(7, 1)
    draws = [a.draw(7, 0), a.draw(7, 1), a.draw(8, 0), CategoryBatches(RECORDS, 4, 2, 4).draw(7, 0)]
    assert len(set(map(tuple, draws))) == 4
    order = a.orders([0, 1])
    assert [next(order) for _ in range(12)] == [*a.draw(0, 0), *a.draw(0, 1), *a.draw(1, 0)]


@pytest.mark.parametrize(
    "size, num_categories, words",
    [
        (4, 3, "3 is not accepted with batches of 4 images"),
        (4, 0, "0 is not accepted"),
        (12, 6, "6 is not accepted: the data has 5 categories with 2 images and more"),
        (22, 2, "2 is not accepted: the data has 0 categories with 11 images"),
    ],
)
def test_bad_input(size, num_categories, words):
    with pytest.raises(InputError, match=words):
        CategoryBatches(RECORDS, size, num_categories, seed=0)


def test_whole_batches():
    assert whole_batches(RECORDS, 8, 0) == list(range(48))
    indices = whole_batches(RECORDS, 4, 2)
    assert len(indices) == 52
    categories = [category_of(RECORDS[k]) for k in indices]
    assert all(categories[k : k + 2] == categories[k + 2 : k + 4] for k in range(0, 52, 4))
    with pytest.raises(InputError, match="--images-per-batch: 64 is not accepted"):
        whole_batches(RECORDS, 64, 0)
