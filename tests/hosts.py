"""The hosts, as parameters of tests that are the same for both."""

import importlib.util

import pytest

from bn_det.config.load import load_config

INSTALLED = importlib.util.find_spec("detectron2") is not None
detectron2 = pytest.param(
    "detectron2",
    marks=pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed"),
)
torchvision = pytest.param("torchvision")
HOSTS = [torchvision, detectron2]
every_host = pytest.mark.parametrize("host", HOSTS)


def make_cfg(host, config, *opts):
    """A host's config of a file, on the CPU, with KEY VALUE pairs."""
    if host == "torchvision":
        from bn_det.tv import get_cfg

        cfg = get_cfg()
    else:
        import detectron2.config

        from bn_det.d2 import add_bn_det_config

        cfg = detectron2.config.get_cfg()
        add_bn_det_config(cfg)
    load_config(cfg, str(config), ["MODEL.DEVICE", "cpu", *opts], host)
    return cfg


def build_model(host, cfg):
    if host == "torchvision":
        from bn_det.tv import build_model
    else:
        from detectron2.modeling import build_model
    return build_model(cfg)
