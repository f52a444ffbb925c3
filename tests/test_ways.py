"""The Jacobian test of every way: which images meet in a normalization batch, on both hosts."""

from pathlib import Path

import pytest
import torch

from hosts import build_model, every_host, make_cfg
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


def predictor(host, model):
    """What makes the head's predictions, in a list, of images (N, 3, H, W)."""
    if host == "torchvision":
        return lambda x: model.head(list(model.backbone(x).values())).values()

    def predict(x):
        features = model.backbone(x)
        logits, deltas = model.head([features[f] for f in model.head_in_features])
        return [*logits, *deltas]

    return predict


@every_host
@pytest.mark.parametrize(
    "config",
    [p for p in sorted(SHAPES.glob("*.yaml")) if "Base" not in p.name],
    ids=lambda p: p.stem,
)
def test_normalization_batch(host, config):
    model = build_model(host, make_cfg(host, config)).double()
    predict = predictor(host, model)
    images = [torch.randn(4, 3, 32, 32, dtype=torch.float64)]

    def all_predictions(xs):
        return [torch.cat([y.flatten(1) for y in predict(xs[0])], 1)]

    trained, evaluated = DECLARED.get(config.stem, (ALL, NONE))
    assert torch.equal(dependence(all_predictions, images), trained)
    model.eval()
    assert torch.equal(dependence(all_predictions, images), evaluated)
