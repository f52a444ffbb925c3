"""The table of states: what flags come to, and where they contradict each other."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    L1BatchNorm2d,
    convert_batchnorm,
    freeze,
    states,
)
from bn_det.errors import InputError

C = 4


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def moving(kind, **kwargs):
    return {"kind": kind, "mode": "training", "normalizes": "batch", "statistics": "moving",
            "affine": "learns", "batch": "process", "momentum": 0.1, "batches": 0,
            "folded": False, "contradictions": (), **kwargs}  # fmt: skip


def still(kind, **kwargs):
    return moving(kind, normalizes="population", statistics="frozen", batch="-", **kwargs)


CASES = {
    "torch": (lambda: nn.BatchNorm2d(C), moving("BatchNorm2d")),
    "1d": (lambda: nn.BatchNorm1d(C, momentum=None), moving("BatchNorm1d", momentum=None)),
    "sync": (lambda: nn.SyncBatchNorm(C), moving("SyncBatchNorm", batch="1 processes")),
    "L1": (lambda: L1BatchNorm2d(C), moving("bn_det.L1BatchNorm2d")),
    "no affine": (lambda: nn.BatchNorm2d(C, affine=False), moving("BatchNorm2d", affine="none")),
    "evaluation": (
        lambda: nn.BatchNorm2d(C).eval(),
        moving("BatchNorm2d", mode="evaluation", normalizes="population", statistics="kept"),
    ),
    "no statistics": (
        lambda: nn.BatchNorm2d(C, track_running_stats=False).eval(),
        moving("BatchNorm2d", mode="evaluation", statistics="none", batches=None,
               contradictions=("the batch normalizes in evaluation",)),
    ),
    "ghost": (lambda: BatchNorm2d(C, ghost_size=2),
              moving("bn_det.BatchNorm2d", batch="2 samples")),
    "ours, sync": (lambda: BatchNorm2d(C, group="world"),
                   moving("bn_det.BatchNorm2d", batch="1 processes")),
    "renorm": (lambda: BatchNorm2d(C, renorm=(3, 5)),
               moving("bn_det.BatchNorm2d", normalizes="batch, renormalized")),
    "no update": (lambda: BatchNorm2d(C, update_population=False),
                  moving("bn_det.BatchNorm2d", statistics="kept")),
    "by population": (lambda: BatchNorm2d(C, train_statistics="population"),
                      moving("bn_det.BatchNorm2d", normalizes="population")),
    "levels": (lambda: DomainBatchNorm2d(C, 5, statistics="shared"),
               moving("bn_det.DomainBatchNorm2d", batch="process, 5 domains together")),
    "each level": (lambda: DomainBatchNorm2d(C, 5, ghost_size=2),
                   moving("bn_det.DomainBatchNorm2d", batch="2 samples, 5 domains each")),
    "frozen": (lambda: freeze(nn.SyncBatchNorm(C)),
               still("bn_det.FrozenBatchNorm (was SyncBatchNorm)", affine="fixed")),
    "frozen statistics": (lambda: freeze(nn.BatchNorm2d(C), affine=False),
                          still("bn_det.FrozenBatchNorm (was BatchNorm2d)")),
    "frozen levels": (lambda: freeze(DomainBatchNorm2d(C, 5)),
                      still("bn_det.DomainBatchNorm2d", affine="fixed")),
    "torchvision": (lambda: FrozenBatchNorm2d(C),
                    still("torchvision.FrozenBatchNorm2d", affine="constant", momentum=None,
                          batches=None)),
    "activation": (lambda: freeze(WithActivation(C)),
                   still("test_states.WithActivation (frozen)", affine="fixed", mode="evaluation")),
    "momentum 0": (lambda: nn.BatchNorm2d(C, momentum=0.0),
                   moving("BatchNorm2d", momentum=0.0, contradictions=(
                       "momentum 0: calls are counted, and the statistics never move",))),
    "affine alone": (lambda: nn.BatchNorm2d(C).requires_grad_(False),
                     moving("BatchNorm2d", affine="fixed", contradictions=(
                         "the affine is fixed, and the statistics are still moving",))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers(case):
    make, expected = CASES[case]
    (state,) = states(make()).layers
    assert state._asdict() == {"name": "", **expected}
    assert state.kind in str(states(make()))


def test_what_the_table_says_is_what_happens():
    """In training, each kind of layer, whatever its flags: which statistics move, by how it is."""
    x = torch.randn(6, C, 3, 3)
    for case, (make, _) in CASES.items():
        layer = make()
        if case in ("sync", "1d"):
            continue
        (state,) = states(layer).layers
        before = {k: v.clone() for k, v in layer.state_dict().items() if "running" in k}
        layer([x] * 5) if "level" in case else layer(x)
        moved = any(not torch.equal(v, before[k]) for k, v in layer.state_dict().items()
                    if k in before)  # fmt: skip
        assert moved == (state.statistics == "moving" and state.momentum != 0), case


def test_contradictions_in_a_model():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm2d(C).eval()))
    model.extra = freeze(nn.BatchNorm2d(C), affine=False)
    nn.init.uniform_(model.extra.weight)
    model.nan = nn.BatchNorm2d(C)
    model.nan.running_var[1] = math.nan
    model.nan.bias.data[0] = math.inf
    found = states(model).contradictions
    folded = "statistics are folded into an affine that learns otherwise than before folding"
    assert found == {
        "1.0": ("in evaluation mode in a module in training mode: the next train() undoes it",),
        "extra": (folded,),
        "nan": ("bias, running_var not finite",),
    }
    text = str(states(model))
    for words in ("! nan: bias, running_var not finite", "| extra ", "frozen, folded"):
        assert words in text
    assert states(model, "1").layers[0].name == "1.0"
    with pytest.raises(InputError, match="states: there is no BatchNorm in 'layer1'"):
        states(model, "layer1")
    assert str(states(nn.Conv2d(3, 3, 1))) == "no BatchNorm"
    (lazy,) = states(nn.LazyBatchNorm2d()).layers
    assert lazy.contradictions == ("it has not been called yet (lazy)",)


def test_subtrees_are_lines():
    """As large as they can be: what the stages of a network are, and what is another."""
    model = resnet18()
    assert str(states(model)).splitlines()[2].startswith("| all (20) ")
    freeze(model, ["bn1", "layer1"])
    convert_batchnorm(model, BatchNorm2d, "layer4.1")
    labels = [line.split("|")[1].strip() for line in str(states(model)).splitlines()[2:]]
    assert labels == ["bn1", "layer1 (4)", "layer2 (5)", "layer3 (5)", "layer4.0 (3)",
                      "layer4.1 (2)"]  # fmt: skip
    model.layer2[0].bn1.eval()
    text = str(states(model))
    assert "| layer2.0.bn1 " in text and "| layer2.1 (2) " in text
