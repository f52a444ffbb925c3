"""Cascade R-CNN: our box heads in each stage, and RoIs normalized by the level they come from."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import d2_models
import reference
from bn_det import BatchNorm2d, RoILevelBatchNorm2d, fuse, roi_levels
from bn_det.d2 import BNCascadeROIHeads
from bn_det.d2.leakage import check_architecture
from bn_det.errors import InputError
from bn_det.layers.shuffle import is_shuffled
from d2_models import check_checkpoints, losses_of, make_batch, train_step
from ranks import run_ranks
from reference import EIGHT_CHOICES, RCNN_BASE, choice_opts, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = [
    *("MODEL.ROI_HEADS.NAME", "BNCascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
    *("True", "MODEL.MASK_ON", "False"),
]
PER_LEVEL = choice_opts(("per_domain", "per_domain", "shared"), "ROI_BOX_HEAD")
every_choice = pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
STRIDES = (4, 8, 16, 32)

make_cfg = partial(d2_models.make_cfg, RCNN_BASE)


def make_model(*opts):
    return build_model(make_cfg(*OURS, *opts))


def stage_norms(model):
    return [head.conv1.norm for head in model.roi_heads.box_head]


def test_levels_share_by_default(tmp_path):
    """The stock cascade with our box heads, by checkpoints of either."""
    ours, stock = make_model(), make_model("MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    assert type(ours.roi_heads) is BNCascadeROIHeads and type(stock.roi_heads) is CascadeROIHeads
    assert [type(norm) for norm in stage_norms(ours)] == [BatchNorm2d] * 3
    check_checkpoints(ours, stock, tmp_path, make_batch([2, 3]))


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "GhostBN", "BRN", "FrozenBN", "GN", "LN"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_norms(norm, shuffle):
    """Each stage has a head of its own, shuffled by itself."""
    keys = {"NORM": norm, "GHOST_SIZE": 4, "SHUFFLE": shuffle}
    opts = [o for key, value in keys.items() for o in (f"MODEL.ROI_BOX_HEAD.{key}", value)]
    model = make_model(*opts)
    train_step(model, make_batch([2, 3]))
    has_batch = norm in ("BN", "SyncBN", "GhostBN", "BRN")
    for head, bn in zip(model.roi_heads.box_head, stage_norms(model), strict=True):
        assert is_shuffled(head) == (shuffle and has_batch)
        assert (type(bn) is BatchNorm2d) == has_batch
    if has_batch:
        first, second, third = (bn.running_mean for bn in stage_norms(model))
        assert first.any() and not torch.equal(first, second) and not torch.equal(second, third)
        assert stage_norms(model)[0].group == ("world" if norm == "SyncBN" else None)
        assert stage_norms(model)[0].ghost_size == (4 if norm == "GhostBN" else None)


@every_choice
@pytest.mark.parametrize("num_objects", [[3, 2], [0, 0]], ids=str)
def test_a_step_and_detections(choices, num_objects):
    model = make_model(*choice_opts(choices, "ROI_BOX_HEAD"))
    for norm in stage_norms(model):
        if choices == ("shared",) * 3:
            assert type(norm) is BatchNorm2d
        else:
            found = norm.statistics, norm.population, norm.affine_sharing
            assert type(norm) is RoILevelBatchNorm2d and found == choices
            assert norm.num_domains == len(STRIDES)
    train_step(model, make_batch(num_objects))
    with torch.no_grad():
        model.eval()(make_batch(num_objects))


def some_proposals(num_images=2, number=60):
    """Boxes for all levels, about as many for each."""
    proposals = []
    for _ in range(num_images):
        corner = torch.rand(number, 2, dtype=torch.float64) * 100
        sides = 40 * 2 ** (torch.rand(number, 1, dtype=torch.float64) * 5)
        proposals.append(Instances((1024, 1024)))
        proposals[-1].proposal_boxes = Boxes(torch.cat([corner, corner + sides], 1).float())
    return proposals


def level_of(boxes):
    """Lin et al., *Feature Pyramid Networks*, 2017, Eq. 1; box by box. Level 0 is p2."""
    levels = []
    for x0, y0, x1, y1 in boxes.double().tolist():
        k = math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224))
        levels.append(min(max(k, 2), 5) - 2)
    return torch.tensor(levels)


def brute_force(head, x, levels, norms):
    """A box head whose RoIs are split by level, an nn.BatchNorm2d for each; float64."""
    for conv, of_levels in zip(head.conv_norm_relus, norms, strict=True):
        x = F.conv2d(x, conv.weight, padding=1)
        y = torch.zeros_like(x)
        for k, bn in enumerate(of_levels):
            y[levels == k] = bn(x[levels == k])
        x = y.relu()
    for fc in head.fcs:
        x = fc(x.flatten(1)).relu()
    return x


@pytest.mark.parametrize("training", [True, False])
def test_each_level_by_itself(training):
    """What a stage predicts, against one BatchNorm for each level."""
    model = make_model(*PER_LEVEL).double()
    randomize(model)
    roi_heads = model.roi_heads.train(training)
    features = [torch.randn(2, 64, 1024 // s, 1024 // s).double() for s in STRIDES]
    proposals = some_proposals()
    boxes = [p.proposal_boxes for p in proposals]
    levels = level_of(torch.cat([b.tensor for b in boxes]))
    assert levels.bincount().min() > 5
    pooled = roi_heads.box_pooler(features, boxes)
    for stage, head in enumerate(roi_heads.box_head):
        norms = []
        for conv in head.conv_norm_relus:
            norms.append([nn.BatchNorm2d(64).double().train(training) for _ in STRIDES])
            for k, bn in enumerate(norms[-1]):
                own = conv.norm.population_of(k)
                bn.running_mean.copy_(own.running_mean), bn.running_var.copy_(own.running_var)
                bn.weight, bn.bias = conv.norm.weight, conv.norm.bias
        found = roi_heads._run_stage(features, proposals, stage)
        expected = roi_heads.box_predictor[stage](brute_force(head, pooled, levels, norms))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64
        for conv, of_levels in zip(head.conv_norm_relus, norms, strict=True):
            for k, bn in enumerate(of_levels):
                running_var = conv.norm.population_of(k).running_var
                torch.testing.assert_close(running_var, bn.running_var, rtol=1e-9, atol=0)


@pytest.mark.parametrize("statistics", ["batch of all", *reference.SHARING])
def test_jacobian(statistics):
    """RoIs of a level depend on each other, or all RoIs do."""
    opts = ["MODEL.ROI_BOX_HEAD.BN.POPULATION", "per_domain"]
    opts += ["MODEL.ROI_BOX_HEAD.BN.STATISTICS", statistics]
    model = make_model(*([] if statistics == "batch of all" else opts)).double()
    randomize(model)
    levels = torch.tensor([2, 0, 3, 2, 0, 0])
    same = levels[:, None] == levels

    def run(xs):
        with roi_levels(levels):
            return [model.roi_heads.box_head[1](xs[0])]

    found = reference.dependence(run, [torch.randn(6, 64, 7, 7, dtype=torch.float64)])
    assert torch.equal(found, same if statistics == "per_domain" else torch.ones_like(same))


@pytest.mark.parametrize("training", [True, False])
def test_without_rois(training):
    roi_heads = make_model(*PER_LEVEL).roi_heads.train(training)
    features = [torch.randn(2, 64, 128 // s, 128 // s) for s in STRIDES]
    empty = some_proposals(number=0)
    scores, deltas = roi_heads._run_stage(features, empty, 0)
    assert scores.shape == (0, 5) and deltas.shape == (0, 4)
    ((scores.sum() + deltas.sum()) * 0).backward()
    assert all(p.grad.eq(0).all() for p in roi_heads.box_head[0].parameters())


def test_a_name_that_ends_with_the_stage():
    model = make_model(*PER_LEVEL)
    losses_of(model, make_batch([2]))
    with pytest.raises(InputError, match=r"RoIs have no levels: .*MODEL.ROI_HEADS.NAME 'BNCascade"):
        model.roi_heads.box_head[0](torch.randn(3, 64, 7, 7))


def test_fused():
    """RoIs of several levels are in one tensor: only what is the same for all can be folded."""
    for opts, number in (([], 6), (PER_LEVEL, 0)):
        model = make_model(*opts).eval()
        randomize(model)
        before = copy.deepcopy(model)
        report = fuse(model)
        assert sum("box_head" in name for name in report.fused) == number
        assert len(report.left) == 6 - number
        inputs = make_batch([1])
        with torch.no_grad():
            found, expected = (m(copy.deepcopy(inputs))[0]["instances"] for m in (model, before))
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def trained(rank, opts):
    """A step of a model whose rank 1 has no objects."""
    torch.manual_seed(0)
    model = make_model("MODEL.ROI_BOX_HEAD.NORM", "SyncBN", *opts)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        train_step(model, make_batch([3] if rank == 0 else [0]))
    norms = stage_norms(model.module)
    return model.module.backbone.fpn_output2.weight.grad, [dict(n.named_buffers()) for n in norms]


@pytest.mark.parametrize("choices", [("per_domain",) * 3, ("shared", "per_domain", "shared")])
def test_two_processes(choices):
    opts = choice_opts(choices, "ROI_BOX_HEAD")
    (grad, buffers), (other_grad, other_buffers) = run_ranks(trained, 2, opts, timeout=120)
    assert torch.equal(grad, other_grad), "averaged by DDP"
    torch.testing.assert_close(buffers, other_buffers, rtol=0, atol=0)


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
            "'per_domain'.* with MODEL.ROI_HEADS.NAME 'CascadeROIHeads': only 'BNCascadeROIHeads'",
        ),
        (["MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "ROI_HEADS.NAME 'StandardROIHeads': only"),
        (["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"], "only 'BNFastRCNNConvFCHead' can"),
        (["MODEL.ROI_BOX_HEAD.SHUFFLE", "True"], "SHUFFLE True: RoIs of other processes come from"),
        (["MODEL.ROI_BOX_HEAD.BN.AFFINE", "x"], "ROI_BOX_HEAD.BN.AFFINE: 'x' .*'per_domain'"),
        (
            ["MODEL.ROI_BOX_HEAD.NORM", "GhostBN", "MODEL.ROI_BOX_HEAD.BN.STATISTICS", "shared"],
            "NORM 'GhostBN': levels of different numbers of RoIs have no ghost batches in common",
        ),
    ],
)
def test_bad_config(opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg(*OURS, *PER_LEVEL, *opts)


def test_leakage_is_measured_of_one_box_head():
    with pytest.raises(InputError, match="ROI_HEADS.NAME: 'BNCascadeROIHeads' is not accepted"):
        check_architecture(make_cfg(*OURS))
