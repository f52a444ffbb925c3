"""What is done to built layers, as in test_matrix.py: the kinds of layer that Detectron2 has."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from functools import partial
from types import SimpleNamespace

import detectron2.layers.batch_norm as of_d2
import torch
from detectron2.layers import (
    Conv2d,
    CycleBatchNormList,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    get_norm,
)
from torch import nn

from matrix import Net, check_cell, every_cell, expected_of, images

KINDS = {
    "frozen": FrozenBatchNorm2d,
    "naive": NaiveSyncBatchNorm,
    "naive of two ranks": NaiveSyncBatchNorm,
    "naive N of two ranks": partial(NaiveSyncBatchNorm, stats_mode="N"),
    "a cycle": lambda c: CycleBatchNormList(2, num_features=c),
    "inside": lambda c: Conv2d(3, c, 1, norm=get_norm("BN", c)),
    "frozen inside": lambda c: Conv2d(3, c, 1, norm=get_norm("FrozenBN", c)),
}
NAIVE = ("naive", "naive of two ranks", "naive N of two ranks")
FROZEN = ("frozen", "frozen inside")
NOT_DONE = {
    "convert_batchnorm": dict.fromkeys(FROZEN, "left"),
    "update_bn_stats, folded": dict.fromkeys(KINDS, "refused"),
    "unfold": {"a cycle": "refused"},  # its levels share their affine
    "fuse": {"a cycle": "left"},
    "tune": {"a cycle": "left"},
    "unfuse": {"a cycle": "refused"},
    "trained_with": dict.fromkeys(NAIVE, "refused"),
    "evaluated_with": dict.fromkeys(NAIVE, "refused"),
}
"""What is not done, in whatever mode; more follows from the mode."""


def be_two_ranks(monkeypatch):
    """Have NaiveSyncBatchNorm run as on two ranks that have the same images."""
    monkeypatch.setattr(of_d2, "comm", SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr(of_d2, "dist", SimpleNamespace(get_world_size=lambda: 2))
    monkeypatch.setattr(of_d2, "differentiable_all_reduce", lambda x: 2 * x)


@every_cell(KINDS)
def test_cell(function, kind, mode, dtype, caplog, monkeypatch):
    if "two ranks" in kind:
        be_two_ranks(monkeypatch)
    twin = nn.BatchNorm2d if kind in NAIVE else None
    net = Net(KINDS[kind], mode, dtype, twin)
    otherwise = NOT_DONE.get(function, {}).get(kind, "done")
    expected = expected_of(function, mode, otherwise, kind in FROZEN)
    check_cell(net, function, expected, caplog)


def test_get_norm_makes_no_other_kind():
    """Torch's are in test_matrix.py."""
    kinds = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "nnSyncBN": nn.SyncBatchNorm,
        "FrozenBN": FrozenBatchNorm2d,
        "naiveSyncBN": NaiveSyncBatchNorm,
        "naiveSyncBN_N": NaiveSyncBatchNorm,
    }
    assert {norm: type(get_norm(norm, 4)) for norm in kinds} == kinds


@pytest.mark.parametrize("kind", NAIVE[1:])
def test_it_is_two_ranks(kind, monkeypatch):
    """Whose variance is that of their values, and not the unbiased one of torch's."""
    net = Net(KINDS[kind], "training", torch.float32)
    alone = Net(KINDS[kind], "training", torch.float32)
    alone(images(torch.float32))
    be_two_ranks(monkeypatch)
    net(images(torch.float32))
    assert not torch.equal(net.norm.running_var, alone.norm.running_var)
    assert net.norm.num_batches_tracked == 0 and alone.norm.num_batches_tracked == 1
