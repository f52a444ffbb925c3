"""FCOS: its head against stock Detectron2's, and the detector against that of its LazyConfig."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from torch import nn

import d2_models
import reference
from bn_det import DomainBatchNorm2d, SourceBatchNorm2d, fuse, update_bn_stats
from bn_det.d2 import BNFCOS, BNFCOSHead
from bn_det.data.coco import check_num_classes
from bn_det.errors import InputError
from bn_det.layers import PerLevel
from d2_models import check_checkpoints, losses_of, make_batch, train_step
from reference import BASE, EIGHT_CHOICES, choice_opts, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

C, LEVELS = 32, 5
OURS = [
    *("MODEL.META_ARCHITECTURE", "BNFCOS"),
    *("MODEL.BACKBONE.NAME", "build_bn_fcos_resnet_fpn_backbone"),
    *("MODEL.BN_FCOS.NUM_CLASSES", "4", "MODEL.BN_FCOS.NUM_CONVS", "2"),
]
BN = [*OURS, "MODEL.BN_FCOS.NORM", "BN"]
COCO = Path(BASE).with_name("heads") / "fcos_shared.yaml"

make_cfg = partial(d2_models.make_cfg, BASE)


def make_head(norm, kind=BNFCOSHead):
    shapes = [ShapeSpec(channels=C, stride=2**k) for k in range(3, 8)]
    head = kind(input_shape=shapes, num_classes=3, conv_dims=[C, C], norm=norm)
    randomize(head)
    return head.double()


def pyramid(num_images=2):
    return [
        torch.randn(num_images, C, 2**k, 2**k + 1, dtype=torch.float64)
        for k in reversed(range(LEVELS))
    ]


def levels(**choices):
    return partial(DomainBatchNorm2d, num_domains=LEVELS, **choices)


NORMS = {"none": ("", ""), "GN": ("GN", "GN"), "BN": (levels(), "BN")}
"""Ours, and the stock head's."""


def test_normalized_weights():
    """Those of the towers; with WN the head computes what it did before."""
    model = build_model(make_cfg(*OURS, "MODEL.BN_FCOS.WEIGHT_NORM", "WN"))
    stock = build_model(make_cfg(*OURS))
    stock.load_state_dict(model.state_dict(), strict=False)
    towers = [*model.head.cls_subnet, *model.head.bbox_subnet]
    kinds = [m.weight_norm for m in towers if isinstance(m, nn.Conv2d)]
    assert kinds == ["WN"] * 4
    xs = [torch.randn(2, 64, k, k) for k in (8, 4, 2, 1, 1)]
    torch.testing.assert_close(model.head(xs), stock.head(xs))


@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_the_stock_head(norms, training):
    """Outputs to the bit, where levels have no statistics; gradients to the order of sums."""
    ours, stock = make_head(norms[0]), make_head(norms[1], FCOSHead)
    assert set(ours.state_dict()) == set(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    xs, found = pyramid(), []
    for head in (ours.train(training), stock.train(training)):
        ys = [y for of_kind in head(xs) for y in of_kind]
        assert len(ys) == 3 * LEVELS
        loss = sum((y**3).sum() * (k + 1) for k, y in enumerate(ys))
        found.append((ys, torch.autograd.grad(loss, list(head.parameters())), head.state_dict()))
    tolerance = 1e-10 if norms[1] == "BN" else 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dict(found[0][2]), dict(found[1][2]), rtol=1e-10, atol=1e-10)
    grads = [dict(zip(dict(h.named_parameters()), f[1], strict=True))
             for h, f in zip((ours, stock), found, strict=True)]  # fmt: skip
    for name, grad in grads[1].items():
        assert (grads[0][name] - grad).abs().max() <= 1e-10 * max(1, grad.abs().max()), name


@pytest.mark.parametrize("statistics", reference.SHARING)
def test_jacobian(statistics):
    """Of each of the three predictions."""
    head = make_head(levels(statistics=statistics, population="shared"))
    index = torch.arange(2 * LEVELS) // 2
    expected = (index[:, None] == index) | (statistics == "shared")
    for kind in range(3):
        found = reference.dependence(lambda xs, kind=kind: head(xs)[kind], pyramid())
        assert torch.equal(found, expected)


def lazy_fcos(*opts):
    """Detectron2's FCOS, made of our backbone and with its own head, and ours."""
    ours = build_model(make_cfg(*opts))
    stock = FCOS(
        backbone=copy.deepcopy(ours.backbone),
        head=FCOSHead(
            input_shape=[ShapeSpec(channels=64)] * LEVELS,
            num_classes=4,
            conv_dims=[64, 64],
            norm=opts[-1],
        ),
        num_classes=4,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
    )
    return ours, stock


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_checkpoints_go_both_ways(norm, tmp_path):
    ours, stock = lazy_fcos(*OURS, "MODEL.BN_FCOS.NORM", norm)
    check_checkpoints(ours, stock, tmp_path, make_batch([2, 3]))


def test_the_detector_of_detectron2s_lazy_config():
    """Our config for COCO, with the norm of Detectron2's, is that detector."""
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.backbone.bottom_up.freeze_at = 2
    stock = instantiate(model)
    ours = build_model(d2_models.make_cfg(str(COCO), "MODEL.BN_FCOS.NORM", "GN"))
    assert type(ours) is BNFCOS and type(stock) is FCOS
    plain = (int, float, str, type(None))
    settings = [{k: v for k, v in vars(m).items() if isinstance(v, plain)} for m in (ours, stock)]
    assert settings[0] == settings[1] and "test_nms_thresh" in settings[0]
    assert ours.head_in_features == list(stock.head_in_features)
    assert torch.equal(ours.pixel_mean, stock.pixel_mean)
    assert torch.equal(ours.pixel_std, stock.pixel_std)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in stock.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(ours.head.cls_score.bias, stock.head.cls_score.bias)
    randomize(stock)
    ours.load_state_dict(stock.state_dict())
    inputs = make_batch([3, 1])
    torch.testing.assert_close(
        losses_of(ours, copy.deepcopy(inputs)), losses_of(stock, copy.deepcopy(inputs))
    )
    with torch.no_grad():
        for m in (ours, stock):
            m.eval()
            m.test_score_thresh = 0.0
        found, expected = (m(copy.deepcopy(inputs))[1]["instances"] for m in (ours, stock))
    assert len(expected) > 5
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_our_head_in_detectron2s_lazy_config():
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.head._target_ = BNFCOSHead
    model.head.norm = levels(statistics="shared", population="shared")
    detector = instantiate(model)
    assert isinstance(detector.head.bbox_subnet[1], DomainBatchNorm2d)
    train_step(detector, make_batch([1, 2]))
    report = update_bn_stats(detector, [make_batch([1, 2])], 1)
    assert len(report.layers) == 8  # the backbone has FrozenBN


@pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
@pytest.mark.parametrize("num_objects", [[2, 3], [0, 0]], ids=str)
def test_a_step(choices, num_objects):
    model = build_model(make_cfg(*BN, *choice_opts(choices, "BN_FCOS")))
    norm = model.head.bbox_subnet[1]
    found = norm.statistics, norm.population, norm.affine_sharing
    assert type(norm) is DomainBatchNorm2d and found == choices
    losses = train_step(model, make_batch(num_objects))
    assert set(losses) == {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(norm.population_of(k).running_mean.any() for k in range(LEVELS))


def test_p6_is_made_of_p5():
    backbone = build_model(make_cfg(*OURS)).backbone
    assert backbone.top_block.in_feature == "p5"
    features = backbone(torch.randn(1, 3, 128, 128))
    torch.testing.assert_close(backbone.top_block.p6(features["p5"]), features["p6"])


def test_sources():
    model = build_model(
        make_cfg(
            *(*BN, "MODEL.BN_SOURCES.PARTS", "['BN_FCOS']", "DATASETS.TRAIN", "()"),
            *("DATASETS.TEST", "()", "DATASETS.SOURCES", "[['a', 'x'], ['b', 'y']]"),
        )
    )
    norm = model.head.cls_subnet[1]
    assert type(norm) is SourceBatchNorm2d and (norm.num_sources, norm.num_levels) == (2, LEVELS)
    inputs = make_batch([2, 1])
    with pytest.raises(InputError, match="image 0 of the batch is of source None"):
        losses_of(model, inputs)
    for image in inputs:
        image["source"] = 0
    train_step(model, inputs)
    seen = [bool(norm.population_of(k).running_mean.any()) for k in range(2 * LEVELS)]
    assert seen == [True] * LEVELS + [False] * LEVELS


def test_fused():
    before = build_model(make_cfg(*BN, "MODEL.BN_FCOS.SCORE_THRESH_TEST", "0.0")).eval()
    randomize(before)
    model = copy.deepcopy(before)
    assert fuse(model).left == {}
    assert isinstance(model.head.bbox_subnet[0], PerLevel)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with torch.no_grad():
        xs = [torch.randn(1, 64, 4, 4) for _ in range(LEVELS)]
        torch.testing.assert_close(model.head(xs), before.head(xs), rtol=1e-5, atol=1e-5)
        model(make_batch([1]))


def test_bad_config():
    for opts, message in (
        ([*BN, "MODEL.BN_FCOS.BN.STATISTICS", "x"], "MODEL.BN_FCOS.BN.STATISTICS: 'x' .*'shared'"),
        (["TEST.BN_STATISTICS", "batch", "TEST.BN_STATISTICS_PARTS", "['BN_FCOS']"], "for BN_FCOS"),
        ([*OURS, "MODEL.BN_SOURCES.PARTS", "['BN_FCOS']"], "'BN_FCOS' is not accepted .*NORM 'GN'"),
    ):
        with pytest.raises(InputError, match=message):
            make_cfg(*opts)
    cfg = make_cfg(*OURS)
    with pytest.raises(InputError, match="MODEL.BN_FCOS.NUM_CLASSES: 4 is not accepted"):
        check_num_classes(cfg, "DATASETS.TRAIN", "mine", 5)
    cfg.MODEL.BN_FCOS.NORM = "bn"
    with pytest.raises(InputError, match="MODEL.BN_FCOS.NORM: 'bn' is not accepted; .*'BN'"):
        build_model(cfg)
