"""The hosts, as parameters of tests that are the same for both."""

import importlib.util

import pytest

INSTALLED = importlib.util.find_spec("detectron2") is not None
detectron2 = pytest.param(
    "detectron2",
    marks=pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed"),
)
HOSTS = ["torchvision", detectron2]
every_host = pytest.mark.parametrize("host", HOSTS)
