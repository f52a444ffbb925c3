"""Other appearances of the same images: the domain shifts that AdaBN is for."""

from __future__ import annotations

import cv2
import numpy as np


def night(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark and bluish, with the noise of a high gain."""
    gains = rng.uniform(0.8, 1.2) * np.array([0.5, 0.38, 0.3])
    dark = 255 * gains * (image / 255) ** 1.3
    return dark + rng.normal(0, 6, image.shape)


def fog(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred, and veiled by a light grey that is thicker at the top."""
    thickness = rng.uniform(0.35, 0.6) + np.linspace(0.15, -0.15, len(image))[:, None, None]
    blurred = cv2.GaussianBlur(image, (0, 0), 1.0)
    return (1 - thickness) * blurred + thickness * rng.uniform(190, 220)


def sensor(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another camera: its white balance, its tone curve, and corners that are darker."""
    gains = np.array([0.65, 0.95, 1.2]) * rng.uniform(0.95, 1.05, 3)
    distance = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape[1::-1])))
    vignette = 1 - 0.25 * distance[:, :, None] ** 2
    return 255 * np.clip(gains * vignette * image / 255, 0, None) ** 0.7


APPEARANCES = {"night": night, "fog": fog, "sensor": sensor}
"""From a float BGR image with values from 0 to 255 to another, which may exceed them."""
