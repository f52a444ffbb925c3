"""The loss by either statistics, against computing it by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d
from bn_det.measure.bootstrap import Estimate
from bn_det.measure.loss import WeightedLoss, loss_table, measure_loss, save_loss


@pytest.fixture
def model():
    model = BatchNorm2d(3).eval()
    model.running_mean.normal_()
    model.running_var.uniform_(0.5, 2.0)
    return model


def loss_of(model):
    """The weight is the size of the batch."""

    @torch.no_grad()
    def loss(x):
        y = model(x)
        return WeightedLoss(float(y.square().mean() + y[0, 0, 0, 0]), len(x))

    return loss


def test_against_a_loop(model):
    batches = [torch.randn(n, 3, 4, 4) + n for n in (2, 5, 3)]
    found = measure_loss(batches, 3, model, loss_of(model))
    sums = {"population": 0.0, "batch": 0.0}
    for x in batches:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        own = model.running_mean.view(1, 3, 1, 1), model.running_var.view(1, 3, 1, 1)
        for name, (m, v) in (("population", own), ("batch", (mean, var))):
            y = (x - m) / (v + model.eps).sqrt()
            sums[name] += float(y.square().mean() + y[0, 0, 0, 0]) * len(x)
    for name, total in sums.items():
        assert found[name].value == pytest.approx(total / 10, rel=1e-5)
        assert found[name].low <= found[name].value <= found[name].high
    difference = found["batch"].value - found["population"].value
    assert found["batch - population"].value == pytest.approx(difference)
    assert not model.training and model.eval_statistics == "population", "as it was"


def test_the_interval_is_that_of_batches(model):
    """Against the standard error of a weighted mean of many batches."""
    batches = [torch.randn(4, 3, 4, 4) for _ in range(200)]
    found = measure_loss(batches, 200, model, loss_of(model))["population"]
    losses = np.array([loss_of(model)(x).loss for x in batches])
    half = 1.96 * losses.std(ddof=1) / 200**0.5
    # The ends of 2000 resamples are off by some 3 % of the interval.
    assert found.low == pytest.approx(losses.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(losses.mean() + half, abs=0.15 * half)


def test_differences_are_paired(model):
    """A difference that is the same in each batch is certain, whatever the batches vary by."""

    def loss(x):
        return WeightedLoss(float(x.mean()) + (model.eval_statistics == "batch"), len(x))

    found = measure_loss([torch.full((2, 3, 2, 2), float(k)) for k in range(8)], 8, model, loss)
    assert found["population"].low + 1 < found["population"].value < found["population"].high - 1
    assert found["batch - population"] == Estimate(1.0, 1.0, 1.0)


def test_without_batch_statistics(tmp_path):
    conv = nn.Conv2d(3, 1, 1)
    found = measure_loss([torch.ones(2, 3, 2, 2)], 1, conv, lambda x: WeightedLoss(2.0, 1.0))
    assert set(found) == {"population"} and found["population"].value == 2.0
    assert "population" in loss_table(found)
    save_loss(found, tmp_path / "loss.json")
    content = json.loads((tmp_path / "loss.json").read_text())
    assert content == {"population": {"value": 2.0, "low": 2.0, "high": 2.0}}
