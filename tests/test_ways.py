"""The Jacobian test of every way: which images meet in a normalization batch, on both hosts."""

from pathlib import Path

import pytest
import torch

from bn_det.config import load_config
from hosts import every_host
from reference import dependence

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = Path(__file__).parents[1] / "configs" / "ways" / "shapes"
ALL, NONE = torch.ones(4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
PAIRS = torch.block_diag(ALL[:2, :2], ALL[:2, :2])
# What training and evaluation declare, where it is not BatchNorm's.
DECLARED = {
    "GhostBN": (PAIRS, NONE),
    "batch_at_test": (ALL, ALL),
    **dict.fromkeys(
        ["train_population", "FrozenBN", "GN", "LN", "LRN", "WS", "WN", "NF", "none", "AGC"],
        (NONE, NONE),
    ),
}


def build(host, config):
    """A model, and what makes the head's predictions for each image of images (N, 3, H, W)."""
    opts = ["MODEL.DEVICE", "cpu"]
    if host == "torchvision":
        from bn_det.tv import build_model, get_cfg

        cfg = get_cfg()
        load_config(cfg, str(config), opts, host)
        model = build_model(cfg)
        return model, lambda x: model.head(list(model.backbone(x).values())).values()
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from bn_det.d2 import add_bn_det_config

    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, str(config), opts, host)
    model = build_model(cfg)

    def predict(x):
        features = model.backbone(x)
        logits, deltas = model.head([features[f] for f in model.head_in_features])
        return [*logits, *deltas]

    return model, predict


@every_host
@pytest.mark.parametrize(
    "config",
    [p for p in sorted(SHAPES.glob("*.yaml")) if "Base" not in p.name],
    ids=lambda p: p.stem,
)
def test_normalization_batch(host, config):
    model, predict = build(host, config)
    model.double()
    images = [torch.randn(4, 3, 32, 32, dtype=torch.float64)]

    def all_predictions(xs):
        return [torch.cat([y.flatten(1) for y in predict(xs[0])], 1)]

    trained, evaluated = DECLARED.get(config.stem, (ALL, NONE))
    assert torch.equal(dependence(all_predictions, images), trained)
    model.eval()
    assert torch.equal(dependence(all_predictions, images), evaluated)
