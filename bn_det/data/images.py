"""Image files as both hosts read them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..files import check_regular, within_memory

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Of an image; of more Pillow makes an error."""

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
"""Pillow's names of what it converts to RGB without loss; others have more than 8 bits."""


@contextmanager
def readable_image(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in an error that Pillow raises for it inside the block."""
    try:
        with within_memory(path):
            yield
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{path}: there is no such image") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: is empty, or no image of a known format") from e
    except RecursionError:
        raise
    except Exception as e:  # what the decoders of Pillow raise is of many kinds
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path}: cannot be read as an image: {reason}") from e


def check_image(path: str | os.PathLike) -> None:
    """Raise InputError unless a file looks like an image of 8 bits.

    Of the formats of photographs none is decoded: that is Detectron2's to do, and to fail at. Of a
    PNG it decodes the pixels on the way to the EXIF tag, where it hides what fails.
    """
    check_regular(path)
    with readable_image(path), Image.open(path) as image:
        _check_kind(path, image)
        if image.format == "PNG":
            image.load()


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The pixels of an image file, upright by its EXIF tag, as uint8 of shape (H, W, 3), RGB.

    Raises:
        InputError: it is missing, cut or no image, or has more than 8 bits.
    """
    check_regular(path)
    with readable_image(path), Image.open(path) as image:
        _check_kind(path, image)
        image.load()
        return np.array(_upright(image).convert("RGB"))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a tag that says nothing; the pixels have been read
        return image


def check_size(path: str, size: Sequence[int], record: Mapping[str, Any]) -> None:
    """Raise InputError unless the height and width of an image are those of its record."""
    if tuple(size) != (record["height"], record["width"]):
        raise InputError(
            f"{path}: is {size[1]}x{size[0]} pixels, its annotation says "
            f"{record['width']}x{record['height']}"
        )


def resized_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width, in pixels, of an image that is resized without another shape.

    As on Detectron2, but that no side of a long and narrow image becomes 0 pixels.

    Args:
        shortest: what the shorter side becomes,
        longest: unless the longer one would become more than this, which it then becomes.
    """
    low, high = sorted((height, width))
    shorter, longer = float(shortest), shortest / low * high
    if longer > longest:
        shorter, longer = shorter * (longest / longer), longest
    small, large = (max(1, int(side + 0.5)) for side in (shorter, longer))
    return (small, large) if height < width else (large, small)


def _check_kind(path: str | os.PathLike, image: Image.Image) -> None:
    if image.format == "EPS":
        raise InputError(
            f"{path}: is PostScript, a program that would be run; use an image such as PNG or JPEG"
        )
    mode = image.mode
    if mode in _MODES:  # Pillow has none for several channels of 16 bits, and cuts them
        raw = (str(args) for _, _, _, args in getattr(image, "tile", ()))
        mode = next((of for of in raw if ";16" in of), "")
    if mode:
        raise InputError(
            f"{path}: pixels of mode {mode} are not accepted; use 8 bits "
            "a channel, as what is brighter would be cut off"
        )
