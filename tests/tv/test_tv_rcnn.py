"""Faster and Mask R-CNN on the torchvision host."""

import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

from bn_det import BatchNorm2d
from bn_det.commands.checkpoint import Checkpointer
from bn_det.config.load import load_config
from bn_det.errors import InputError
from bn_det.tv import build_model, get_cfg
from ranks import run_ranks
from reference import BASE, RCNN, choice_opts, norm_opts

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = ["", "BN", "SyncBN", "GhostBN", "BRN", "FrozenBN", "GN", "LN", "L1BN", "LRN"]
NO_BATCH = ["", "FrozenBN", "GN", "LN", "L1BN", "LRN"]


def make_cfg(*opts):
    cfg = get_cfg()
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", *RCNN, *opts], "torchvision")
    return cfg


def target(*boxes):
    """Boxes, each of another class, and masks that fill them."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": masks}


def batch(num_images=2):
    images = [torch.rand(3, 64, 64) * 255 for _ in range(num_images)]
    objects = [2.0, 4, 20, 22], [15, 15, 55, 52], [30, 2, 38, 10], [45, 35, 60, 50]
    return images, [target(*objects) for _ in range(num_images)]


def all_gradients_are_finite(model):
    return all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask_on", ["True", "False"])
def test_trains_and_detects(norm, mask_on):
    opts = [*norm_opts(norm), "MODEL.MASK_ON", mask_on, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    model = build_model(make_cfg(*opts))
    images, targets = batch()
    losses = model(images, targets)
    expected = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert set(losses) == expected | ({"loss_mask"} if mask_on == "True" else set())
    assert all(v > 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all_gradients_are_finite(model)
    model.eval()
    with torch.no_grad():
        detections = model(images)
    for found in detections:
        assert found["boxes"].shape == (20, 4) and found["scores"].shape == (20,)
        assert found["labels"].min() >= 0 and found["labels"].max() < 4
        assert ("masks" in found) == (mask_on == "True")
    if mask_on == "True":
        masks = detections[0]["masks"]
        assert masks.shape == (20, 1, 28, 28) and masks.min() >= 0 and masks.max() <= 1


NO_PROPOSALS = ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "10000"]
NO_POSITIVES = ["MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.0", "MODEL.RPN.POSITIVE_FRACTION", "0.0"]


FEW = ("BN", "SyncBN", "GN", "")


@pytest.mark.parametrize(
    "norm", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in NORMS]
)
@pytest.mark.parametrize(
    "opts, num_objects, zero",
    [
        ([], (4, 0), set()),
        ([], (0, 0), {"loss_rpn_loc", "loss_box_reg", "loss_mask"}),
        (NO_PROPOSALS, (4, 0), set()),
        (NO_PROPOSALS, (0, 0), {"loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}),
        (NO_POSITIVES, (4, 4), {"loss_rpn_loc", "loss_box_reg", "loss_mask"}),
        (
            # Everything is positive or ignored, but none may be sampled.
            [
                *NO_POSITIVES,
                *(
                    "MODEL.RPN.IOU_THRESHOLDS",
                    "[0.0, 0.7]",
                    "MODEL.ROI_HEADS.IOU_THRESHOLDS",
                    "[0.0]",
                ),
            ],
            (4, 4),
            {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"},
        ),
    ],
    ids=["one-empty", "no-objects", "no-proposals", "nothing", "no-positives", "no-samples"],
)
def test_batches_that_lack_something(norm, opts, num_objects, zero):
    """Losses are finite, and zero where there is nothing; every parameter gets a gradient."""
    model = build_model(make_cfg(*norm_opts(norm), *opts))
    images, targets = batch()
    targets = [{k: v[:n] for k, v in t.items()} for t, n in zip(targets, num_objects, strict=True)]
    losses = model(images, targets)
    for name, loss in losses.items():
        assert torch.isfinite(loss) and (loss == 0) == (name in zero), name
    sum(losses.values()).backward()
    assert all_gradients_are_finite(model)


@pytest.mark.parametrize("norm", NORMS)
def test_detects_without_proposals(norm):
    model = build_model(make_cfg(*norm_opts(norm), *NO_PROPOSALS)).eval()
    with torch.no_grad():
        detections = model(batch()[0])
    for found in detections:
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 28, 28)
        assert len(found["labels"]) == len(found["scores"]) == 0


def test_statistics_without_rois():
    """No RoIs, no update; the backbone has its batch all the same."""
    model = build_model(make_cfg(*NO_PROPOSALS))
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(batch()[0], [target()] * 2)
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name]) == name.startswith("roi_heads"), name


def test_sampled_rois():
    """Classes from 0, the background last; a true box is a sample with its own class and mask."""
    model = build_model(make_cfg("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "64"))
    _, targets = batch()
    far, other = torch.tensor([[0.0, 50, 10, 63]]), torch.tensor([[3.0, 3, 9, 9]])
    rois, samples = model.roi_heads.sample_rois([far, other], [targets[0], target()])
    assert torch.equal(rois[0], torch.cat([far, targets[0]["boxes"]]))
    assert samples[0]["classes"].tolist() == [4, 0, 1, 2, 3]
    torch.testing.assert_close(samples[0]["deltas"][1:], torch.zeros(4, 4))
    assert samples[0]["masks"][:, 1:-1, 1:-1].all()  # corners are sampled at the edge of two pixels
    assert samples[1]["classes"].tolist() == [4] and samples[1]["masks"].shape == (0, 28, 28)


def test_sampled_masks():
    """What the RoI sees of the mask of its object."""
    model = build_model(make_cfg())
    higher = torch.tensor([[4.0, 4, 60, 60]])
    _, (sample,) = model.roi_heads.sample_rois([higher], [target((4, 4, 60, 46))])
    expected = torch.zeros(28, 28)
    expected[:21] = 1
    assert sample["classes"].tolist() == [0, 0]
    assert torch.equal(sample["masks"][0], expected)


def test_our_layers_are_in_place():
    model = build_model(make_cfg("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.ROI_BOX_HEAD.NORM", "BN"))
    assert isinstance(model.backbone.body.layer1[0].bn1, FrozenBatchNorm2d)
    assert type(model.backbone.body.layer2[0].bn1) is BatchNorm2d
    heads = model.roi_heads
    for conv in (heads.box_head.conv1, heads.box_head.conv2, heads.mask_head.mask_fcn2):
        assert type(conv.norm) is BatchNorm2d and conv.bias is None
    plain = build_model(make_cfg(*norm_opts(""))).roi_heads
    assert plain.box_head.conv1.bias is not None and plain.box_head.conv1.norm is None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


@pytest.mark.parametrize("num_conv, num_fc, features", [(0, 2, 48), (2, 0, 32 * 49), (1, 1, 48)])
def test_depth_of_the_heads(num_conv, num_fc, features):
    opts = ["MODEL.ROI_BOX_HEAD.NUM_CONV", str(num_conv), "MODEL.ROI_BOX_HEAD.NUM_FC", str(num_fc)]
    model = build_model(make_cfg(*opts, "MODEL.ROI_MASK_HEAD.NUM_CONV", str(num_conv)))
    assert model.roi_heads.box_predictor.cls_score.in_features == features
    assert all(torch.isfinite(v) for v in model(*batch()).values())


@pytest.mark.parametrize("part", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
@pytest.mark.parametrize("norm, warns", [("BN", False), *((n, True) for n in NO_BATCH)])
def test_shuffling_that_does_nothing(part, norm, warns, caplog):
    opts = [f"MODEL.{part}.NORM", norm, f"MODEL.{part}.SHUFFLE", "True"]
    with caplog.at_level(logging.WARNING):
        model = build_model(make_cfg(*opts))
    assert (f"MODEL.{part}.SHUFFLE: True does nothing" in caplog.text) == warns
    plain = build_model(make_cfg(f"MODEL.{part}.NORM", norm))
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("part", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_shuffling_is_around_the_head(part):
    model = build_model(make_cfg(f"MODEL.{part}.SHUFFLE", "True"))
    head = {"ROI_BOX_HEAD": "box_head", "ROI_MASK_HEAD": "mask_head"}
    for name, attribute in head.items():
        # The wrapper lies in the module's own dictionary.
        module = getattr(model.roi_heads, attribute)
        assert ("forward" in vars(module)) == (name == part)
    assert all(torch.isfinite(v) for v in model(*batch()).values())


def test_fine_tuning_on_other_classes(tmp_path):
    """All weights are loaded but those of the predictors, which have other shapes."""
    model = build_model(make_cfg())
    Checkpointer(model, str(tmp_path)).save("model")
    other = build_model(make_cfg("MODEL.ROI_HEADS.NUM_CLASSES", "3"))
    Checkpointer(other, str(tmp_path)).load(str(tmp_path / "model.pth"))
    for name, value in other.state_dict().items():
        same = value.shape == model.state_dict()[name].shape
        if same and value.is_floating_point():
            assert torch.equal(value, model.state_dict()[name]), name
        assert same == ("box_predictor" not in name and "mask_head.predictor" not in name), name


@pytest.mark.parametrize(
    "opts, message",
    [
        (["BACKBONE.NAME", "build_resnet_backbone"], "BACKBONE.NAME: .*'build_bn_resnet_fpn_back"),
        (["FPN.IN_FEATURES", "['res3', 'res4', 'res5']"], "FPN.IN_FEATURES: .*'res2'"),
        (["RPN.IN_FEATURES", "['p2', 'p3']"], "RPN.IN_FEATURES: .*'p6'"),
        (["RPN.HEAD_NAME", "Mine"], "RPN.HEAD_NAME: 'Mine'.*StandardRPNHead"),
        (["RPN.IOU_THRESHOLDS", "[0.5]"], "RPN.IOU_THRESHOLDS: .0.5. .*2 numbers"),
        (["RPN.IOU_THRESHOLDS", "[0.7, 0.3]"], "RPN.IOU_THRESHOLDS: .*ascending ones"),
        (["PROPOSAL_GENERATOR.NAME", "RRPN"], "PROPOSAL_GENERATOR.NAME: 'RRPN'.*'RPN'"),
        (["ROI_HEADS.NAME", "CascadeROIHeads"], "ROI_HEADS.NAME: .*StandardROIHeads"),
        (["ROI_HEADS.IN_FEATURES", "['p2']"], "ROI_HEADS.IN_FEATURES: .*'p5'"),
        (["ROI_HEADS.IOU_THRESHOLDS", "[0.3, 0.5]"], "ROI_HEADS.IOU_THRESHOLDS: .*1 number$"),
        (["RPN.HEAD_NAME", "Mine"], "RPN.HEAD_NAME: 'Mine'.*'StandardRPNHead', 'BNRPNHead'"),
        (["RPN.CONV_DIMS", "[-1, 0]"], "RPN.CONV_DIMS: .*-1, 0. is not accepted; use numbers"),
        (["ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"], "CLS_AGNOSTIC_BBOX_REG: True .*False"),
        (["ROI_BOX_HEAD.NAME", "Mine"], "ROI_BOX_HEAD.NAME: 'Mine'.*BNFastRCNNConvFCHead"),
        (["ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"], "BOX_HEAD.POOLER_TYPE: .*'ROIAlignV2'"),
        (["ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NUM_FC", "0"], "NUM_FC: 0 .*NUM_CONV"),
        (["ROI_BOX_HEAD.NORM", "SyncBatchNorm2d"], "ROI_BOX_HEAD.NORM: .*'BN'"),
        (["ROI_MASK_HEAD.NAME", "Mine"], "ROI_MASK_HEAD.NAME: .*BNMaskRCNNConvUpsampleHead"),
        (["ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"], "MASK_HEAD.POOLER_TYPE: .*'ROIAlignV2'"),
        (["ANCHOR_GENERATOR.SIZES", "[[1], [2]]"], "SIZES: .*or 5 of the same length"),
        (["MASK_ON", "True", "INPUT.MASK_FORMAT", "rle"], "INPUT.MASK_FORMAT: 'rle'.*'polygon'"),
    ],
)
def test_values_that_the_host_does_not_have(opts, message):
    with pytest.raises(InputError, match=message):
        build_model(make_cfg(f"MODEL.{opts[0]}", *opts[1:]))


def test_a_mask_heads_values_do_not_matter_without_masks():
    build_model(make_cfg("MODEL.MASK_ON", "False", "MODEL.ROI_MASK_HEAD.NAME", "Mine"))


def test_retinanet_has_no_masks():
    cfg = get_cfg()
    load_config(cfg, BASE, ["MODEL.DEVICE", "cpu", "MODEL.MASK_ON", "True"], "torchvision")
    with pytest.raises(InputError, match="MODEL.MASK_ON: True .*False"):
        build_model(cfg)


def train_unlike_ranks(rank, opts):
    """Rank 0 has objects; rank 1 has none, and no proposals, and so no RoIs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(make_cfg(*opts, *(NO_PROPOSALS if rank else [])))
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    images, targets = batch(1)
    losses = parallel(images, [target()] if rank else targets)
    assert (losses["loss_cls"] == 0) == (losses["loss_mask"] == 0) == bool(rank)
    sum(losses.values()).backward()
    assert all_gradients_are_finite(model)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("norm, shuffle", [("SyncBN", "False"), ("BN", "True"), ("GN", "False")])
def test_a_process_without_rois(norm, shuffle):
    """It takes part in all that the other waits for, and gets the same gradients."""
    opts = [o for part in ("BOX", "MASK") for o in (f"MODEL.ROI_{part}_HEAD.SHUFFLE", shuffle)]
    opts += choice_opts(("shared", "shared", "shared"), "RPN")  # one image has one value at p6
    first, second = run_ranks(train_unlike_ranks, 2, [*norm_opts(norm), *opts])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
