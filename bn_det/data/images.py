"""Image files as both hosts read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..files import check_regular

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
"""Of an image; of more Pillow makes an error."""

_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
"""Pillow's names of what it converts to RGB without loss; others have more than 8 bits."""


@contextmanager
def readable_image(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in an error that Pillow raises for it inside the block."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as e:
        raise InputError(f"{path}: there is no such image") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{path}: is empty, or no image of a known format") from e
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        reason = getattr(e, "strerror", None) or " ".join(str(e).split()) or type(e).__name__
        raise InputError(f"{path}: cannot be read as an image: {reason}") from e


def check_image(path: str | os.PathLike) -> None:
    """Raise InputError unless a file looks like an image of 8 bits; it is not decoded."""
    check_regular(path)
    with readable_image(path), Image.open(path) as image:
        _check_mode(path, image)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The pixels of an image file, upright by its EXIF tag, as uint8 of shape (H, W, 3), RGB.

    Raises:
        InputError: it is missing, cut or no image, or has more than 8 bits.
    """
    check_regular(path)
    with readable_image(path), Image.open(path) as image:
        _check_mode(path, image)
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _check_mode(path: str | os.PathLike, image: Image.Image) -> None:
    if image.mode not in _MODES:
        raise InputError(
            f"{path}: pixels of mode {image.mode} are not accepted; use 8 bits a channel, as what "
            "is brighter would be cut off"
        )
