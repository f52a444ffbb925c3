"""What is done to built layers: every function, kind of layer, mode and type; no cell is silent.

Of torch, torchvision, timm and ours; Detectron2's are in d2/test_d2_matrix.py. See matrix.py.
"""

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    FrozenBatchNorm,
    L1BatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
)
from bn_det.errors import InputError
from matrix import Net, check_cell, every_cell, expected_of


class Plain(nn.BatchNorm2d):
    pass


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def of_timm(name):
    def make(c):
        timm = pytest.importorskip("timm.layers", reason="timm is not installed")
        return getattr(timm, name)(c)

    return make


def converted(make):
    return lambda c: convert_batchnorm(of_timm("BatchNormAct2d")(c), make)


KINDS = {
    "torch": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "a subclass": Plain,
    "with an activation": WithActivation,
    "ours": BatchNorm2d,
    "SyncBN": lambda c: BatchNorm2d(c, group="world"),
    "ghost": lambda c: BatchNorm2d(c, ghost_size=2),
    "renorm": lambda c: BatchNorm2d(c, renorm=(3, 5)),
    "L1": L1BatchNorm2d,
    "levels": lambda c: DomainBatchNorm2d(c, 2, affine="per_domain"),
    "shared levels": lambda c: DomainBatchNorm2d(c, 2, statistics="shared", population="shared"),
    "sources": lambda c: SourceBatchNorm2d(c, 2),
    "RoI levels": lambda c: RoILevelBatchNorm2d(c, 2),
    "torchvision's frozen": FrozenBatchNorm2d,
    "timm's": of_timm("BatchNormAct2d"),
    "timm's, ours": converted(BatchNorm2d),
    "timm's, sources": converted(lambda c: SourceBatchNorm2d(c, 2)),
    "timm's frozen": of_timm("FrozenBatchNormAct2d"),
    "no statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "no affine": lambda c: nn.BatchNorm2d(c, affine=False),
}
FROZEN = ("torchvision's frozen", "timm's frozen")
BY_PART_OF_A_BATCH = ("sources", "timm's, sources", "RoI levels")
TWINS = {"SyncBatchNorm": nn.BatchNorm2d, "timm's frozen": of_timm("BatchNormAct2d")}
NOT_DONE = {
    "freeze": {"no statistics": "refused"},
    "thaw": {"timm's frozen": "refused"},
    "convert_batchnorm": {"with an activation": "left", "levels": "left", "shared levels": "left",
                          "torchvision's frozen": "left", "timm's frozen": "left",
                          **dict.fromkeys(BY_PART_OF_A_BATCH, "refused")},
    "unfold": {"no affine": "refused", "no statistics": "refused",
               **dict.fromkeys(BY_PART_OF_A_BATCH, "refused")},
    "fuse": {"with an activation": "left", "no statistics": "left",
             **dict.fromkeys(BY_PART_OF_A_BATCH, "left")},
    "tune": {"with an activation": "left", "no statistics": "left",
             **dict.fromkeys(BY_PART_OF_A_BATCH, "left")},
    "unfuse": {"with an activation": "refused", "no statistics": "refused",
               **dict.fromkeys(BY_PART_OF_A_BATCH, "refused")},
    "update_bn_stats": {"L1": "left", "no statistics": "left"},
    "update_bn_stats, frozen": {"L1": "left", "timm's frozen": "left", "no statistics": "left"},
    "update_bn_stats, folded": {**dict.fromkeys(KINDS, "refused"), "L1": "left",
                                "no statistics": "left", "no affine": "done"},
    "trained_with": {"L1": "refused", "with an activation": "refused", "timm's": "refused"},
    "evaluated_with": {"L1": "refused", "with an activation": "refused", "timm's": "refused"},
}  # fmt: skip
"""What is not done, in whatever mode; more follows from the mode."""


@every_cell(KINDS)
def test_cell(function, kind, mode, dtype, caplog):
    make = KINDS[kind], mode, dtype, TWINS.get(kind)
    if mode == "frozen" and kind == "no statistics":
        with pytest.raises(InputError, match="cannot be frozen"):
            Net(*make)
        return
    otherwise = NOT_DONE.get(function, {}).get(kind, "done")
    expected = expected_of(function, mode, otherwise, kind in FROZEN)
    check_cell(Net(*make), function, expected, caplog)


def test_the_frozen_class_is_used():
    (layer,) = Net(nn.BatchNorm2d, "frozen", torch.float32).layers
    assert isinstance(layer, FrozenBatchNorm)
