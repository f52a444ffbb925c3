"""BNRetinaNet against stock Detectron2, and inside an unmodified DefaultTrainer."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

import d2_models
from bn_det import BatchNorm2d, DomainBatchNorm2d, L1BatchNorm2d
from bn_det.d2 import BNRetinaNetHead, register_datasets
from bn_det.errors import InputError
from bn_det.layers import WEIGHT_NORMS
from bn_det.tv.retinanet import BNRetinaNetHead as TorchvisionHead
from reference import BASE, EIGHT_CHOICES, choice_opts, norm_opts, randomize

STOCK = [
    "MODEL.META_ARCHITECTURE",
    "RetinaNet",
    "MODEL.BACKBONE.NAME",
    "build_retinanet_resnet_fpn_backbone",
]


make_cfg = partial(d2_models.make_cfg, BASE)


def batch(num_images=2, size=128):
    inputs = []
    for k in range(num_images):
        instances = Instances((size, size))
        boxes = torch.tensor([[5.0, 8, 40, 45], [30, 30, 110, 105], [60, 5, 75, 20]])
        instances.gt_boxes = Boxes(boxes + k)
        instances.gt_classes = torch.tensor([0, 3, k])
        inputs.append({"image": torch.randint(0, 256, (3, size, size)), "instances": instances})
    return inputs


def losses_and_gradients(model, inputs):
    model.train()
    with EventStorage():
        losses = model(copy.deepcopy(inputs))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["", "BN"])
def test_checkpoints_of_stock_go_both_ways(norm, tmp_path):
    opts = ["MODEL.RETINANET.NORM", norm, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    stock = build_model(make_cfg(*STOCK, *opts)).double()
    ours = build_model(make_cfg(*opts)).double()
    randomize(stock)
    for source, target in [(stock, ours), (ours, stock)]:
        DetectionCheckpointer(source, str(tmp_path)).save("model")
        checkpointer = DetectionCheckpointer(target)
        incompatible = []
        checkpointer._log_incompatible_keys = incompatible.append
        checkpointer.load(str(tmp_path / "model.pth"))
        assert incompatible == [([], [], [])]
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
        randomize(source)

    ours.load_state_dict(stock.state_dict())
    inputs = batch()
    with torch.no_grad():  # in float32: Detectron2's NMS takes no boxes in float64
        found, expected = (m.float().eval()(copy.deepcopy(inputs)) for m in (ours, stock))
    for a, b in zip(found, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) > 0 and torch.equal(a.pred_classes, b.pred_classes)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-5, atol=1e-5)

    found, expected = (losses_and_gradients(m.double(), inputs) for m in (ours, stock))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict(), rtol=1e-5, atol=1e-5)


def test_float32_training_equals_stock():
    stock, ours = build_model(make_cfg(*STOCK)), build_model(make_cfg())
    ours.load_state_dict(stock.state_dict())
    inputs = batch()
    found, expected = (losses_and_gradients(m, inputs) for m in (ours, stock))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, grad in expected[1].items():
        # Relative to the largest: a sum of thousands of float32 terms has absolute errors.
        assert (found[1][name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


def test_our_layers_are_in_place():
    model = build_model(make_cfg("MODEL.BACKBONE.FREEZE_AT", "2"))
    bottom_up = model.backbone.bottom_up
    assert isinstance(bottom_up.stem.conv1.norm, FrozenBatchNorm2d)
    assert isinstance(bottom_up.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert type(bottom_up.res3[0].conv1.norm) is BatchNorm2d
    assert type(model.backbone.fpn_lateral3.norm) is BatchNorm2d
    # The plain lists that FPN runs hold the same convolutions.
    assert model.backbone.lateral_convs[-1] is model.backbone.fpn_lateral3
    assert isinstance(model.head.cls_subnet[1], DomainBatchNorm2d)


def test_freezing_our_layer():
    """Detectron2's conversion takes our layer for the BatchNorm2d that it is."""
    layer = BatchNorm2d(4)
    for t in (*layer.parameters(), layer.running_mean, layer.running_var):
        t.data.uniform_(0.5, 2)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(layer))[0]
    x = torch.randn(2, 4, 3, 3)
    assert isinstance(frozen, FrozenBatchNorm2d)
    torch.testing.assert_close(frozen(x), layer.eval()(x))


@pytest.mark.parametrize("norm", ["", "FrozenBN", "GN", "LN", "L1BN", "LRN"])
def test_other_norms(norm):
    model = build_model(make_cfg(*norm_opts(norm)))
    losses, _ = losses_and_gradients(model, batch())
    assert all(torch.isfinite(v) for v in losses.values())
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(type(m) is L1BatchNorm2d for m in batch_norms)
    assert len(batch_norms) == (20 + 6 + 4 * 5 if norm == "L1BN" else 0)  # one for each level
    number = sum(isinstance(m, nn.LocalResponseNorm) for m in model.modules())
    assert number == (20 + 6 + 4 if norm == "LRN" else 0)


def test_fpn_backbone_without_p7():
    cfg = make_cfg("MODEL.BACKBONE.NAME", "build_bn_resnet_fpn_backbone")
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    model = build_model(cfg)
    assert model.head.cls_subnet[1].num_domains == 4
    assert all(torch.isfinite(v) for v in losses_and_gradients(model, batch())[0].values())


@pytest.mark.parametrize("part", ["RESNETS", "FPN", "RETINANET"])
def test_unknown_norm_names_the_key(part):
    cfg = make_cfg(f"MODEL.{part}.NORM", "torch.nn.SyncBatchNorm2d")
    with pytest.raises(InputError, match=rf"MODEL.{part}.NORM: 'torch.nn.SyncBatchNorm2d' .*'BN'"):
        build_model(cfg)


def test_weights_of_deformable_convolutions_are_not_normalized():
    cfg = make_cfg("MODEL.RESNETS.WEIGHT_NORM", "WS")
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, False, False]
    with pytest.raises(InputError, match="WEIGHT_NORM: 'WS' is not .*DEFORM_ON_PER_STAGE.*; use"):
        build_model(cfg)


@pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
def test_weight_decay_of_norms_reaches_every_affine(choices):
    cfg = make_cfg(*choice_opts(choices), "SOLVER.WEIGHT_DECAY_NORM", "0.5")
    model = build_model(cfg)
    decay = {
        id(p): g["weight_decay"]
        for g in build_optimizer(cfg, model).param_groups
        for p in g["params"]
    }
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    affine = {id(p) for m in norms for p in m.parameters(recurse=False)}
    num_domains = 5 if choices[2] == "per_domain" else 1
    in_head = sum(1 for _, p in model.head.named_parameters() if id(p) in affine)
    assert in_head == 2 * 2 * 2 * num_domains  # towers, layers, weight and bias
    for p in model.parameters():
        assert decay[id(p)] == (0.5 if id(p) in affine else cfg.SOLVER.WEIGHT_DECAY)


@pytest.mark.parametrize(
    "choices, weight_norm",
    [*((choices, "") for choices in EIGHT_CHOICES), *((EIGHT_CHOICES[0], k) for k in WEIGHT_NORMS)],
)
@pytest.mark.parametrize("training", [True, False])
def test_both_hosts_have_the_same_head(choices, weight_norm, training):
    """With equal weights equal logits and deltas, forward and backward."""
    cfg = make_cfg(*choice_opts(choices), "MODEL.RETINANET.WEIGHT_NORM", weight_norm)
    shapes = [ShapeSpec(channels=64, stride=8 * 2**k) for k in range(5)]
    head = BNRetinaNetHead(cfg, shapes).double().train(training)
    randomize(head)
    norm = lambda c: copy.deepcopy(head.cls_subnet[1])  # noqa: E731
    other = TorchvisionHead(64, 2, 4, 2, norm, weight_norm).double().train(training)
    names = {
        "cls_subnet": "classification_head.conv",
        "cls_score": "classification_head.cls_logits",
        "bbox_subnet": "regression_head.conv",
        "bbox_pred": "regression_head.bbox_reg",
    }

    def renamed(items):
        return {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": v for k, v in items}

    other.load_state_dict(renamed(head.state_dict().items()))
    xs = [torch.randn(2, 64, 2**k, 2**k + 1, dtype=torch.float64) for k in reversed(range(5))]
    ours = [x.clone().requires_grad_() for x in xs]
    theirs = [x.clone().requires_grad_() for x in xs]

    logits, deltas = head(ours)
    joined = [torch.cat([permute_to_N_HWA_K(p, 4) for p in ps], 1) for ps in (logits, deltas)]
    found = other(theirs)
    torch.testing.assert_close(found["cls_logits"], joined[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["bbox_regression"], joined[1], rtol=1e-5, atol=1e-5)
    direction = torch.randn(2, *joined[0].shape, dtype=torch.float64)
    (torch.stack(joined) * direction).sum().backward()
    (torch.stack(list(found.values())) * direction).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    grads = renamed((n, p.grad) for n, p in head.named_parameters())
    torch.testing.assert_close(
        {n: p.grad for n, p in other.named_parameters()}, grads, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        dict(other.named_buffers()), renamed(head.named_buffers()), rtol=1e-5, atol=1e-5
    )


def test_head_takes_a_callable():
    """Without a config, as LazyConfig users build it."""
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]
    norm = lambda c: DomainBatchNorm2d(c, 2, statistics="shared", population="shared")  # noqa: E731
    kwargs = {"num_classes": 3, "num_anchors": 2, "conv_dims": [32, 32]}
    head = BNRetinaNetHead(input_shape=shapes, norm=norm, **kwargs)
    plain = RetinaNetHead(input_shape=shapes, norm=nn.BatchNorm2d, **kwargs)
    assert list(head.state_dict()) == list(plain.state_dict())
    logits, deltas = head([torch.randn(2, 32, 4, 4), torch.randn(2, 32, 2, 2)])
    assert [t.shape[1:] for t in logits + deltas] == [(6, 4, 4), (6, 2, 2), (8, 4, 4), (8, 2, 2)]


def test_in_an_unmodified_default_trainer(tiny_shapes, tmp_path):
    class Trainer(DefaultTrainer):
        pass

    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    cfg = make_cfg(*tiny_shapes, *opts)
    register_datasets(cfg)
    trainer = Trainer(cfg)
    head = trainer.model.head.cls_subnet[1]
    before = head.weight.clone(), head.get_submodule("4").running_var.clone()
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert not torch.equal(head.weight, before[0])
    assert not torch.equal(head.get_submodule("4").running_var, before[1])
    assert (tmp_path / "model_final.pth").is_file()
