"""What functions say that change nothing, and of arguments that would be taken for others."""

import pytest
import torch
from torch import nn

from bn_det import (
    BatchNorm2d,
    L1BatchNorm2d,
    convert_batchnorm,
    forward_levels,
    freeze,
    fuse,
    thaw,
    tune,
)
from bn_det.errors import InputError


def pair():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize(
    "act, words",
    [
        (freeze, "freeze: the model has no BatchNorm"),
        (thaw, "thaw: the model has no BatchNorm"),
        (lambda model: convert_batchnorm(model, BatchNorm2d), "convert_batchnorm: the model has"),
        (fuse, "fuse has changed nothing: the model has no BatchNorm"),
        (tune, "tune has changed nothing: the model has no BatchNorm"),
    ],
)
def test_without_batch_norm(act, words, caplog):
    act(nn.Linear(2, 2).eval())
    (message,) = caplog.messages
    assert message.startswith(words)


def test_what_is_not_frozen_is_not_tuned(caplog):
    model = pair()
    tune(model)
    assert caplog.messages == ["tune has changed nothing: 1: it is not frozen; call freeze first"]
    caplog.clear()
    tune(freeze(model))
    fuse(model)
    assert not caplog.messages


def test_levels_that_are_one_tensor():
    with pytest.raises(InputError, match="^features: what is given is of type Tensor; use a list"):
        forward_levels(pair(), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("levels", [list, tuple])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "layer", [BatchNorm2d(4), L1BatchNorm2d(4), freeze(BatchNorm2d(4)), freeze(nn.BatchNorm2d(4))]
)
def test_a_tensor_that_is_levels(layer, training, levels):
    words = f"^x: what is given is of type {levels.__name__}; use a tensor; a DomainBatchNorm2d"
    with pytest.raises(InputError, match=words):
        layer.train(training)(levels([torch.zeros(2, 4, 3, 3)]))


@pytest.mark.parametrize("renorm", [5, (1.0, 2.0, 3.0), ("a", "b")])
def test_limits_that_are_no_pair(renorm):
    with pytest.raises(InputError, match=r"^renorm: .* is not accepted; use a pair \(r_max, d_max"):
        BatchNorm2d(4, renorm=renorm)
