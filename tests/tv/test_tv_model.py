"""torchvision's RetinaNet with our layers and head."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet as stock
from torchvision.ops import FrozenBatchNorm2d

from bn_det import BatchNorm2d, DomainBatchNorm2d, L1BatchNorm2d, convert_batchnorm
from bn_det.config.load import load_config
from bn_det.errors import InputError
from bn_det.tv import build_model, get_cfg
from bn_det.tv.retinanet import BNRetinaNetHead
from bn_det.tv.solver import build_optimizer
from reference import BASE, EIGHT_CHOICES, choice_opts, norm_opts


def make_cfg(*opts):
    cfg = get_cfg()
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", *opts], "torchvision")
    return cfg


def batch(num_images=2, size=128):
    images = [torch.rand(3, size, size) * 255 for _ in range(num_images)]
    boxes = torch.tensor([[5.0, 8, 40, 45], [30, 30, 110, 105], [60, 5, 75, 20]])
    return images, [
        {"boxes": boxes + k, "labels": torch.tensor([0, 3, k])} for k in range(num_images)
    ]


def test_head_without_norm_equals_torchvision():
    """Same weights, same outputs, losses and gradients as torchvision's own head."""
    theirs = stock.RetinaNetHead(16, 2, 3).double()
    ours = BNRetinaNetHead(16, 2, 3, 4, None).double()
    state = {}
    for name, value in theirs.state_dict().items():
        for k in range(4):
            name = name.replace(f"conv.{k}.0.", f"conv.{2 * k}.")
        state[name] = value
    ours.load_state_dict(state)
    xs = [torch.randn(2, 16, 6, 5, dtype=torch.float64), torch.randn(2, 16, 2, 3).double()]
    for key, value in theirs(xs).items():
        torch.testing.assert_close(ours(xs)[key], value, rtol=1e-12, atol=1e-12)
    torch.manual_seed(0)
    anchors = torch.rand(72, 4, dtype=torch.float64).cumsum(1) * 10
    targets = [{"boxes": anchors[:2], "labels": torch.tensor([0, 2])}] * 2
    matched = [torch.randint(-2, 2, (72,)) for _ in range(2)]
    expected = theirs.compute_loss(targets, theirs(xs), [anchors] * 2, matched)
    found = ours.compute_loss(targets, ours(xs), [anchors] * 2, matched)
    names = {"classification": "loss_cls", "bbox_regression": "loss_box_reg"}
    torch.testing.assert_close(found, {names[k]: v for k, v in expected.items()})


@pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
def test_trains_and_detects(choices):
    model = build_model(make_cfg(*choice_opts(choices), "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"))
    images, targets = batch()
    losses = model(images, targets)
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        detections = model(images)
    assert len(detections) == 2 and len(detections[0]["boxes"]) == 100
    assert detections[0]["labels"].max() < 4


def test_our_layers_are_in_place():
    model = build_model(make_cfg("MODEL.BACKBONE.FREEZE_AT", "2"))
    body = model.backbone.body
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    assert isinstance(body.layer1[0].bn1, FrozenBatchNorm2d)
    assert type(body.layer2[0].bn1) is BatchNorm2d
    assert not any(p.requires_grad for m in (body.conv1, body.layer1) for p in m.parameters())
    assert all(p.requires_grad for p in body.layer2.parameters())
    assert any(type(m) is BatchNorm2d for m in model.backbone.fpn.modules())
    assert isinstance(model.head.classification_head.conv[1], DomainBatchNorm2d)


@pytest.mark.parametrize("freeze_at, frozen", [(0, 0), (1, 1), (3, 1 + 4 + 5), (5, 20)])
def test_freeze_at(freeze_at, frozen):
    model = build_model(make_cfg("MODEL.BACKBONE.FREEZE_AT", str(freeze_at)))
    found = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(found) == frozen


@pytest.mark.parametrize("norm", ["", "FrozenBN", "GN", "LN", "L1BN", "LRN"])
def test_other_norms(norm):
    model = build_model(make_cfg(*norm_opts(norm)))
    losses = model(*batch())
    assert all(torch.isfinite(v) for v in losses.values())
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(m) is L1BatchNorm2d for m in batch_norms)
    assert len(batch_norms) == (20 + 6 + 4 * 5 if norm == "L1BN" else 0)  # one for each level
    number = sum(isinstance(m, nn.LocalResponseNorm) for m in model.modules())
    assert number == (20 + 6 + 4 if norm == "LRN" else 0)


def test_weight_decay_of_norms():
    cfg = make_cfg(
        *choice_opts(("shared", "shared", "per_domain")), "SOLVER.WEIGHT_DECAY_NORM", "0.5"
    )
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    affine = {id(p) for m in norms for p in m.parameters(recurse=False)}
    for p in model.parameters():
        assert decay[id(p)] == (0.5 if id(p) in affine else cfg.SOLVER.WEIGHT_DECAY)


def test_state_dict_loads_without_metadata():
    """Tools rebuild state dicts as plain dicts; torchvision would take ours for its version 1."""
    model = build_model(make_cfg())
    other = copy.deepcopy(model)
    other.load_state_dict(dict(model.state_dict()))


def test_anchors_reach_the_middle():
    """With OFFSET 0.5 the one cell of p7 looks at the middle of the image."""
    model = build_model(make_cfg())
    images, _ = model.transform([torch.zeros(3, 128, 128)])
    features = [torch.zeros(1, 64, 2**k, 2**k) for k in (4, 3, 2, 1, 0)]
    anchors = model.anchor_generator(images, features)[0]
    torch.testing.assert_close((anchors[-1, :2] + anchors[-1, 2:]) / 2, torch.tensor([64.0, 64.0]))
    assert len(anchors) == 2 * (256 + 64 + 16 + 4 + 1)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "META_ARCHITECTURE: 'RetinaNet'.*BNRetinaNet"),
        (["MODEL.RETINANET.NORM", "SyncBatchNorm2d"], "RETINANET.NORM: 'SyncBatchNorm2d'.*'BN'"),
        (["MODEL.RESNETS.DEPTH", "20"], "RESNETS.DEPTH: 20 .*18, 34"),
        (["MODEL.RESNETS.DEPTH", "50"], "RES2_OUT_CHANNELS: 64 .*256"),
        (["MODEL.RESNETS.OUT_FEATURES", "['res5']"], "OUT_FEATURES: .'res5'. lacks 'res3'"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[1], [2]]"], "SIZES: .*or 5 of the same length"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[8, 16, 32, 64, 128]"], "SIZES: .*one list in a list"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[1], [2, 3], [4], [5], [6]]"], "same length"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0], [2.0]]"], "ASPECT_RATIOS: "),
        (["INPUT.FORMAT", "HSV"], "INPUT.FORMAT: 'HSV'.*'BGR', 'RGB'"),
        (["SOLVER.IMS_PER_BATCH", "0"], "IMS_PER_BATCH: 0"),
    ],
)
def test_values_that_the_host_does_not_have(opts, message):
    with pytest.raises(InputError, match=message):
        build_model(make_cfg(*opts))


def test_stride_of_deep_resnets_is_named():
    opts = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
    with pytest.raises(InputError, match="STRIDE_IN_1X1: True .*False"):
        build_model(make_cfg(*opts))
    build_model(make_cfg(*opts, "MODEL.RESNETS.STRIDE_IN_1X1", "False"))


def test_conversion_to_frozen():
    """Parameters become buffers; what a frozen layer cannot do without is an error."""
    old = nn.BatchNorm2d(4)
    for t in (*old.parameters(), old.running_mean, old.running_var):
        t.data.uniform_(0.5, 2)
    x = torch.randn(2, 4, 3, 3)
    new = convert_batchnorm(nn.Sequential(old), FrozenBatchNorm2d)[0]
    assert isinstance(new, FrozenBatchNorm2d) and not list(new.parameters())
    torch.testing.assert_close(new(x), old.eval()(x))
    for kwargs, name in [
        ({"affine": False}, "weight"),
        ({"track_running_stats": False}, "running"),
    ]:
        with pytest.raises(ValueError, match=f"FrozenBatchNorm2d cannot hold the {name}"):
            convert_batchnorm(nn.BatchNorm2d(4, **kwargs), FrozenBatchNorm2d)
