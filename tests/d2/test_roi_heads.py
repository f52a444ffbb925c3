"""Our RoI heads against stock Detectron2's, in a whole Mask R-CNN, empty, and mixed."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import logging
from functools import partial

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import d2_models
from bn_det import BatchNorm2d, L1BatchNorm2d
from bn_det.d2 import BNFastRCNNConvFCHead, BNMaskRCNNConvUpsampleHead
from bn_det.errors import InputError
from bn_det.layers.shuffle import shuffle
from d2_models import make_batch, train_step
from ranks import run_ranks
from reference import RCNN_BASE

HEADS = ("ROI_BOX_HEAD", "ROI_MASK_HEAD")
NORMS = ("", "BN", "SyncBN", "GhostBN", "BRN", "FrozenBN", "GN", "LN", "L1BN", "LRN")
every_norm = pytest.mark.parametrize("norm", NORMS)
STOCK = [
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
]


def heads_norm(norm, shuffle=False):
    """KEY VALUE pairs for both heads."""
    keys = {"NORM": norm, "GHOST_SIZE": 4 * (norm == "GhostBN"), "SHUFFLE": shuffle}
    return [o for head in HEADS for k, v in keys.items() for o in (f"MODEL.{head}.{k}", v)]


make_cfg = partial(d2_models.make_cfg, RCNN_BASE)


@every_norm
def test_layers(norm):
    box_head, mask_head = heads(make_cfg(*heads_norm(norm)))
    assert isinstance(box_head, BNFastRCNNConvFCHead)
    assert isinstance(mask_head, BNMaskRCNNConvUpsampleHead)
    expected = {
        "": type(None), "BN": BatchNorm2d, "SyncBN": BatchNorm2d, "GhostBN": BatchNorm2d,
        "BRN": BatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm,
        "L1BN": L1BatchNorm2d, "LRN": nn.LocalResponseNorm,
    }  # fmt: skip
    for conv in (box_head.conv1, mask_head.mask_fcn2):
        assert (conv.bias is None) == (norm != ""), "stock's choice"
        if norm != "LN":
            assert type(conv.norm) is expected[norm]
        if norm in ("BN", "SyncBN", "GhostBN"):
            assert (conv.norm.group, conv.norm.ghost_size) == {
                "BN": (None, None), "SyncBN": ("world", None), "GhostBN": (None, 4),
            }[norm]  # fmt: skip
        assert getattr(conv.norm, "renorm", None) == ((3, 5) if norm == "BRN" else None)


def heads(cfg):
    model = build_model(cfg)
    return model.roi_heads.box_head, model.roi_heads.mask_head


@pytest.mark.parametrize("norm", ["", "BN", "GN", "FrozenBN"])
def test_equal_stock_and_checkpoints_go_both_ways(norm, tmp_path):
    opts = [*heads_norm(norm), "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    ours, theirs = (build_model(make_cfg(*opts, *more)) for more in ([], STOCK))
    assert type(theirs.roi_heads.box_head) is FastRCNNConvFCHead
    assert type(theirs.roi_heads.mask_head) is MaskRCNNConvUpsampleHead
    for source, target, name in ((theirs, ours, "theirs"), (ours, theirs, "ours")):
        for p in source.parameters():
            p.data += 0.01 * torch.randn_like(p)
        DetectionCheckpointer(source, str(tmp_path)).save(name)
        DetectionCheckpointer(target).load(str(tmp_path / f"{name}.pth"))
        assert source.state_dict().keys() == target.state_dict().keys()
        inputs = make_batch([3, 2])
        found = []
        for model in (source, target):
            torch.manual_seed(4)  # the sampling of RoIs
            found.append(train_step(model, inputs))
        for key, loss in found[0].items():
            torch.testing.assert_close(loss, found[1][key], rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("objects", [[0, 0], [0, 2]], ids=str)
@every_norm
def test_images_without_objects_train(norm, objects):
    model = build_model(make_cfg(*heads_norm(norm)))
    before = {k: v.clone() for k, v in model.named_buffers() if "mask_head" in k}
    losses = train_step(model, make_batch(objects))
    if not any(objects):  # no positives: the mask head has seen nothing
        assert losses["loss_mask"] == 0
        assert all(torch.equal(v, model.get_buffer(k)) for k, v in before.items())


@every_norm
def test_no_proposals_train(norm):
    torch.manual_seed(0)
    box_head, mask_head = heads(make_cfg(*heads_norm(norm)))
    for head in (box_head, mask_head.layers):
        x = torch.zeros(0, 64, 14, 14, requires_grad=True)
        y = head(x[..., :7, :7] if head is box_head else x)
        assert len(y) == 0
        (y.sum() * 0).backward()
    for p in (*box_head.parameters(), *mask_head.parameters()):
        assert p.grad is not None and p.grad.eq(0).all()


def mixed(rank):
    """A head on RoIs of both ranks, against what it is said to do."""
    torch.manual_seed(1)
    shape = ShapeSpec(channels=8, height=7, width=7)
    kwargs = {"conv_dims": [8], "fc_dims": [6], "conv_norm": BatchNorm2d}
    head = BNFastRCNNConvFCHead(shape, **kwargs, shuffle=True)
    stock = FastRCNNConvFCHead(shape, **kwargs)
    stock.load_state_dict(head.state_dict())
    x = torch.randn(3 + 4 * rank, 8, 7, 7) + rank
    torch.manual_seed(2)
    found = head(x)
    torch.manual_seed(2)
    x_mixed, restore = shuffle(x)
    assert torch.equal(found, restore(stock(x_mixed)))
    assert len(x_mixed) == 5
    assert torch.equal(head.conv1.norm.running_mean, stock.conv1.norm.running_mean)
    head.eval(), stock.eval()
    assert torch.equal(head(x), stock(x)), "in training only"
    mask_head = BNMaskRCNNConvUpsampleHead(
        shape, num_classes=2, conv_dims=[8, 8], conv_norm=BatchNorm2d, shuffle=True
    )
    y = mask_head.layers(x if rank else x[:0])
    assert y.shape == (7 if rank else 0, 2, 14, 14)


def test_shuffling():
    run_ranks(mixed, 2)


def trained(rank, norm, shuffle):
    """A step of a whole model whose rank 1 has no objects."""
    torch.manual_seed(0)
    model = build_model(make_cfg(*heads_norm(norm, shuffle)))
    model = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        train_step(model, make_batch([3] if rank == 0 else [0]))
    state = model.module.roi_heads.mask_head.mask_fcn1.norm
    return model.module.backbone.fpn_output2.weight.grad, state.running_mean


@pytest.mark.parametrize("norm, shuffle", [("BN", False), ("BN", True), ("SyncBN", False)])
def test_two_processes_of_which_one_has_no_objects(norm, shuffle):
    (grad, mean), (other_grad, other_mean) = run_ranks(trained, 2, norm, shuffle, timeout=120)
    assert torch.equal(grad, other_grad), "averaged by DDP"
    assert other_mean.ne(0).any() == (norm == "SyncBN" or shuffle), "who has seen positives"
    assert torch.equal(mean, other_mean) == (norm == "SyncBN")


def test_shuffling_without_a_batch_warns(caplog):
    with caplog.at_level(logging.WARNING):
        box_head, mask_head = heads(make_cfg(*heads_norm("GN", shuffle=True)))
    for head in HEADS:
        assert f"MODEL.{head}.SHUFFLE: True does nothing with MODEL.{head}.NORM 'GN'" in caplog.text
    assert "forward" not in vars(box_head) and "layers" not in vars(mask_head)


def test_a_norm_without_convolutions_warns(caplog):
    """Detectron2's R-CNNs have none in the box head, unless one asks for them."""
    with caplog.at_level(logging.WARNING):
        heads(make_cfg(*heads_norm("BN")))
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        heads(make_cfg(*heads_norm("BN"), "MODEL.ROI_BOX_HEAD.NUM_CONV", "0"))
    assert "MODEL.ROI_BOX_HEAD.NORM: 'BN' does nothing with MODEL.ROI_BOX_HEAD.NUM_CONV 0" in (
        caplog.text
    )
    assert "MASK" not in caplog.text


@every_norm
def test_backbone_and_fpn(norm):
    opts = [o for p in ("RESNETS", "FPN") for o in (f"MODEL.{p}.NORM", norm)]
    sizes = [o for p in ("RESNETS", "FPN") for o in (f"MODEL.{p}.GHOST_SIZE", 2)]
    backbone = build_model(make_cfg(*opts, *sizes, "MODEL.BACKBONE.FREEZE_AT", 2)).backbone
    if norm in ("BN", "SyncBN", "GhostBN"):
        assert type(backbone.bottom_up.res2[0].conv1.norm) is FrozenBatchNorm2d
        for conv in (backbone.bottom_up.res4[0].conv1, backbone.fpn_lateral3):
            assert type(conv.norm) is BatchNorm2d
            assert conv.norm.group == ("world" if norm == "SyncBN" else None)
            assert conv.norm.ghost_size == (2 if norm == "GhostBN" else None)
    features = backbone(torch.randn(2, 3, 64, 64))
    sum(f.sum() for f in features.values()).backward()


def test_batch_statistics_in_evaluation():
    parts = ["TEST.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD']"]
    box_head, mask_head = heads(make_cfg(*heads_norm("BN"), "TEST.BN_STATISTICS", "batch", *parts))
    assert box_head.conv1.norm.eval_statistics == "batch"
    assert mask_head.mask_fcn1.norm.eval_statistics == "population"
    x = torch.randn(5, 64, 7, 7)
    training = box_head(x)
    assert torch.equal(box_head.eval()(x), training)


def test_population_statistics_in_training():
    parts = [
        "SOLVER.BN_STATISTICS",
        "population",
        "SOLVER.BN_STATISTICS_PARTS",
        "['ROI_MASK_HEAD']",
    ]
    opts = [*heads_norm("BN"), *parts, "SOLVER.UPDATE_POPULATION", "False"]
    box_head, mask_head = heads(make_cfg(*opts))
    assert box_head.conv1.norm.train_statistics == "batch"
    assert mask_head.mask_fcn1.norm.train_statistics == "population"
    x = torch.randn(5, 64, 14, 14)
    assert torch.equal(mask_head.layers(x), mask_head.eval().layers(x))
    before = box_head.conv1.norm.running_mean.clone()
    box_head(torch.randn(5, 64, 7, 7))
    assert torch.equal(box_head.conv1.norm.running_mean, before)


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["TEST.BN_STATISTICS", "batch", *heads_norm("GN")],
            "TEST.BN_STATISTICS: 'batch' is not accepted: no part of the model has batch",
        ),
        (
            ["TEST.BN_STATISTICS", "batch", "TEST.BN_STATISTICS_PARTS", "['FPN']"],
            "TEST.BN_STATISTICS: 'batch' is not accepted for FPN, .* with MODEL.FPN.NORM ''",
        ),
        (
            [*STOCK, "TEST.BN_STATISTICS", "batch", "TEST.BN_STATISTICS_PARTS", "['ROI_BOX_HEAD']"],
            "MODEL.ROI_BOX_HEAD.NAME 'FastRCNNConvFCHead'; .* in .'BNFastRCNNConvFCHead'",
        ),
        (["TEST.BN_STATISTICS_PARTS", "['HEAD']"], r"TEST.BN_STATISTICS_PARTS: \['HEAD'\] .*'FPN'"),
        (["TEST.BN_STATISTICS", "ema"], "TEST.BN_STATISTICS: 'ema' .*'population', 'batch'"),
        (
            ["SOLVER.BN_STATISTICS", "population", *heads_norm("GN")],
            "SOLVER.BN_STATISTICS: 'population' is not accepted: no part .* use 'batch', or a NORM",
        ),
        (
            ["SOLVER.BN_STATISTICS", "population", *heads_norm("BRN")],
            "SOLVER.BN_STATISTICS: 'population' is not accepted with MODEL.ROI_BOX_HEAD.NORM 'BRN'",
        ),
        (
            ["SOLVER.BN_STATISTICS_PARTS", "['HEAD']"],
            r"SOLVER.BN_STATISTICS_PARTS: \['HEAD'\] .*'FPN'",
        ),
        (["SOLVER.BRN.R_MAX", "0.5"], "SOLVER.BRN.R_MAX: 0.5 is not accepted; use 1.0 or more"),
        (["SOLVER.BRN.D_MAX_ITER", "9"], "SOLVER.BRN.D_MAX_ITER: 9 is not accepted .* 5000;"),
        (["MODEL.FPN.GHOST_ORDER", "x"], "MODEL.FPN.GHOST_ORDER: 'x' .*'contiguous', 'random'"),
    ],
)
def test_bad_config(opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg(*opts)


def test_ghost_size():
    cfg = make_cfg("MODEL.ROI_BOX_HEAD.NORM", "GhostBN", "MODEL.ROI_BOX_HEAD.GHOST_SIZE", 0)
    with pytest.raises(InputError, match="MODEL.ROI_BOX_HEAD.GHOST_SIZE: 0 is not accepted; .* 1 "):
        build_model(cfg)
