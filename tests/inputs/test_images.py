"""Image files and what they get: a row for each kind of fault."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from bn_det.data.images import check_image, read_image, resized_size
from bn_det.errors import InputError


def picture():
    """Smooth, so that a JPEG of it is nearly the same."""
    y, x = np.mgrid[:40, :50]
    return np.stack([3 * x, 4 * y, x + y], 2).astype(np.uint8)


def jpeg(path):
    Image.fromarray(picture()).save(path, "JPEG", quality=95)


def png(path):
    Image.fromarray(picture()).save(path, "PNG")


def part_of(save, fraction):
    def make(path):
        save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(fraction * len(content))])

    return make


def deep_grey(path):
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save(path, "PNG")


def deep_colours(path):
    cv2.imwrite(f"{path}.png", picture().astype(np.uint16) * 257)
    Path(f"{path}.png").rename(path)


def real(path):
    Image.fromarray(picture()[..., 0].astype(np.float32)).save(path, "TIFF")


REFUSED = {
    "missing": (lambda path: None, "there is no such image"),
    "a folder": (lambda path: path.mkdir(), "cannot be read as an image: Is a directory"),
    "a pipe": (os.mkfifo, "is a pipe, a device or a socket; use a file"),
    "empty": (lambda path: path.touch(), "is empty, or no image of a known format"),
    "text": (lambda path: path.write_text("hello"), "is empty, or no image of a known format"),
    "a JPEG that is cut": (
        part_of(jpeg, 0.9),
        "cannot be read as an image: image file is truncated",
    ),
    "a PNG that is cut": (part_of(png, 0.5), "cannot be read as an image: "),
    "16 bits": (deep_grey, "pixels of mode I;16 are not accepted; use 8 bits a channel"),
    "16 bits of colours": (deep_colours, "pixels of mode RGB;16B are not accepted; use 8 bits"),
    "real numbers": (real, "pixels of mode F are not accepted; use 8 bits a channel"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused(tmp_path, row):
    make, words = REFUSED[row]
    path = tmp_path / "image"
    make(path)
    with pytest.raises(InputError, match=f"image: {words}"):
        read_image(path)
    if "is cut" not in row:  # which only decoding shows
        with pytest.raises(InputError, match=f"image: {words}"):
            check_image(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_modes_of_8_bits(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    image.save(tmp_path / "image", "TIFF")
    check_image(tmp_path / "image")
    found = read_image(tmp_path / "image")
    assert np.array_equal(found, np.asarray(image.convert("RGB"))) and found.dtype == np.uint8


def test_resized_sizes():
    """Those of Detectron2, but that it comes to sides of 0 pixels."""
    transforms = pytest.importorskip("detectron2.data.transforms", reason="no Detectron2")
    theirs = transforms.ResizeShortestEdge.get_output_shape
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 2000, (5_000, 4)).tolist()
    sizes += [[1, 20_000, 64, 1333], [20_000, 1, 64, 1333], [1, 1, 1, 1], [3, 2, 5, 5]]
    found = [resized_size(*of) for of in sizes]
    assert found == [tuple(max(1, side) for side in theirs(*of)) for of in sizes]
    assert resized_size(1, 20_000, 64, 1333) == (1, 1333)


def test_upright_by_its_tag(tmp_path):
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "image", "PNG", exif=exif)
    assert np.array_equal(read_image(tmp_path / "image"), np.rot90(picture(), -1))


def broken_tag(path):
    Image.fromarray(picture()).save(path, "PNG", exif=b"Exif\0\0nothing")


@pytest.mark.parametrize("make", [jpeg, broken_tag])
def test_detectron2_reads_the_same(make, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.data.detection_utils import read_image as theirs

    path = tmp_path / "image"
    make(path)
    check_image(path)
    ours = torch.from_numpy(read_image(path))
    assert torch.equal(ours, torch.from_numpy(theirs(str(path), "RGB").copy()))
