"""Masks in COCO's formats."""

import json

import numpy as np
import pytest

from bn_det.data.masks import decode_mask, encode_mask, is_segmentation

SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]


def square():
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[1:4, 2:6] = 1
    return mask


def uncompressed():
    """Lengths of runs of 0 and 1 in turn, column by column."""
    return {"size": [8, 10], "counts": [17, 3, 5, 3, 5, 3, 5, 3, 36]}


def test_formats():
    for segmentation in ([SQUARE], uncompressed(), encode_mask(square())):
        found = decode_mask(segmentation, 8, 10)
        assert found.dtype == np.uint8 and found.shape == (8, 10)
        np.testing.assert_array_equal(found, square())


def test_several_polygons_are_one_mask():
    other = [7.0, 5.0, 9.0, 5.0, 9.0, 8.0, 7.0, 8.0]
    expected = square()
    expected[5:8, 7:9] = 1
    np.testing.assert_array_equal(decode_mask([SQUARE, other, SQUARE], 8, 10), expected)


def test_encoded_for_json():
    rle = json.loads(json.dumps(encode_mask(square() > 0)))
    np.testing.assert_array_equal(decode_mask(rle, 8, 10), square())


@pytest.mark.parametrize(
    "value, accepted",
    [
        *(([SQUARE], True), (uncompressed(), True), ([[0, 0, 1, 0, 1, 1]], True)),
        *((None, False), ([], False), ([[]], False), ({"size": [8, 10]}, False), ("", False)),
        # A box by pycocotools, a number too many, and a polygon that is not in a list.
        *(([[1.0, 2.0, 3.0, 4.0]], False), ([[0, 0, 1, 0, 1, 1, 2]], False), (SQUARE, False)),
    ],
)
def test_what_is_a_segmentation(value, accepted):
    assert is_segmentation(value) == accepted
