"""The torchvision host: the same config files on torchvision's detectors."""

from .config import get_cfg
from .model import build_model

__all__ = ["build_model", "get_cfg"]
