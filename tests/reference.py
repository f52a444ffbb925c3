"""Independent references: batch normalization by its definition, and the Jacobian test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

BASE = str(Path(__file__).parents[1] / "configs" / "Base-RetinaNet-Shapes.yaml")
"""The config that all small models of the tests begin with."""

RCNN_BASE = str(Path(BASE).with_name("Base-RCNN-Shapes.yaml"))
"""The same of Mask R-CNNs."""

RCNN = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", "True"),
    *("MODEL.BACKBONE.NAME", "build_bn_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
    *("MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [24], [40], [64], [96]]"),
    *("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TEST", "50"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", "4"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4', 'p5']"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.ROI_BOX_HEAD.NAME", "BNFastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NORM", "BN"),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", "1", "MODEL.ROI_BOX_HEAD.FC_DIM", "48"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7"),
    *("MODEL.ROI_MASK_HEAD.NAME", "BNMaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NORM", "BN"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", "2", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("TEST.DETECTIONS_PER_IMAGE", "20"),
]
"""What makes a small Mask R-CNN of BASE."""

SHARING = ("shared", "per_domain")
EIGHT_CHOICES = list(itertools.product(SHARING, SHARING, SHARING))
"""All (statistics, population, affine)."""


def choice_opts(choices: Sequence[str], part: str = "RETINANET") -> list[str]:
    """KEY VALUE pairs for one of EIGHT_CHOICES."""
    names = ("STATISTICS", "POPULATION", "AFFINE")
    return [o for n, c in zip(names, choices, strict=True) for o in (f"MODEL.{part}.BN.{n}", c)]


def norm_opts(norm: str) -> list[str]:
    """KEY VALUE pairs for one norm in all parts of the detector."""
    # Not at the top: tests of the layers need torch alone.
    from bn_det.config.parts import PARTS

    opts = [o for part in PARTS for o in (f"MODEL.{part}.NORM", norm)]
    opts += ["MODEL.RPN.HEAD_NAME", "BNRPNHead"]
    if norm == "GhostBN":  # a multiple would be one image's RoIs
        opts += [o for part in PARTS for o in (f"MODEL.{part}.GHOST_SIZE", "3")]
    return opts


TWO_SOURCES = [
    *("DATASETS.SOURCES", "[['a', 'tiny_train'], ['b', 'tiny_val']]"),
    *("DATASETS.TRAIN", "('tiny_train', 'tiny_val')"),
    *("MODEL.RETINANET.BN.STATISTICS", "shared", "MODEL.RETINANET.BN.POPULATION", "shared"),
]
"""KEY VALUE pairs after tiny_shapes: both of its data sets are trained on, each a source."""

BAD_SOURCES = [
    (["MODEL.BN_SOURCES.PARTS", "['ROI_BOX_HEAD']"], r"PARTS: \['ROI_BOX_HEAD'\] is not accepted"),
    (["MODEL.RETINANET.NORM", "GN"], "PARTS: 'RETINANET' is not accepted .*NORM 'GN'; use a NORM"),
    (["MODEL.BN_SOURCES.AFFINE", "own"], "MODEL.BN_SOURCES.AFFINE: 'own' is not accepted"),
    (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "use one of .*'BNGeneralizedRCNN'"),
    (["DATASETS.SOURCES", "[['a', 'tiny_train']]"], "DATASETS.TRAIN: 'tiny_val' is of no source;"),
    (["DATASETS.TEST", "('shapes_fog_val',)"], "'shapes_fog_val' is of no source; .*'tiny_train'"),
    (
        ["DATASETS.SOURCES", "['tiny_train']"],
        r"\['tiny_train'\] is not accepted; use a list of lists",
    ),
    (["DATASETS.SOURCES", "[['a']]"], "each entry is a list .*one data set or more"),
    (["DATASETS.SOURCES", "[['a', 'x'], ['a', 'y']]"], "the source 'a' stands there twice"),
    (["DATASETS.SOURCES", "[['a', 'x'], ['b', 'x']]"], "the data set 'x' stands there twice"),
]
"""What is refused after TWO_SOURCES and PARTS with "RETINANET", and with which words."""


def randomize(model: nn.Module) -> None:
    """Give a detector a state in which every parameter and statistic matters."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            t.data.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")) and "cls_" not in name:
            t.data.uniform_(-0.3, 0.3)


def assert_close_by_scale(found: Tensor, expected: Tensor, where: str = "") -> None:
    """To 1e-5 of the largest value: float32 has absolute errors in sums of thousands of terms."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, (where, error)


def values(xs: Sequence[Tensor]) -> Tensor:
    """All values of tensors (N, C, H, W) as one matrix (number of values, C)."""
    return torch.cat([x.movedim(1, -1).reshape(-1, x.shape[1]) for x in xs])


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps=1e-5):
    """Element by element, without any function for normalization."""
    mean, var, weight, bias = (t.view(1, -1, 1, 1) for t in (mean, var, weight, bias))
    return (x - mean) / (var + eps).sqrt() * weight + bias


def mean_var(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all values per channel."""
    v = values(xs)
    mean = v.sum(0) / len(v)
    return mean, ((v - mean) ** 2).sum(0) / len(v)


def unbiased(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    v = values(xs)
    mean = v.sum(0) / len(v)
    return mean, ((v - mean) ** 2).sum(0) / (len(v) - 1)


def domain_batch_norm(xs, weights, biases, statistics: str) -> list[Tensor]:
    """Training mode by the definition; differentiable."""
    merged = mean_var(xs) if statistics == "shared" else None
    return [
        normalize(x, *(merged or mean_var([x])), w, b)
        for x, w, b in zip(xs, weights, biases, strict=True)
    ]


def dependence(f: Callable[[list[Tensor]], list[Tensor]], xs: Sequence[Tensor]) -> Tensor:
    """The Jacobian test: which samples' outputs depend on which samples' inputs.

    Args:
        f: from a list of tensors (N_k, ...) to a list of tensors (N_k, ...).
        xs: its input, in float64.

    Returns:
        a boolean matrix over all samples of all tensors, in order: [i, j] is whether any
        derivative of output i by input j is not zero.
    """
    xs = [x.detach().clone().requires_grad_() for x in xs]
    rows = []
    for y in f(xs):
        for i in range(len(y)):
            # A random direction: the plain sum of a normalized output does not depend on its input.
            direction = torch.randn_like(y[i])
            grads = torch.autograd.grad(
                (y[i] * direction).sum(), xs, retain_graph=True, allow_unused=True
            )
            row = [
                torch.zeros(len(x), dtype=torch.bool)
                if g is None
                else g.flatten(1).abs().amax(1) > 1e-12
                for g, x in zip(grads, xs, strict=True)
            ]
            rows.append(torch.cat(row))
    return torch.stack(rows)
