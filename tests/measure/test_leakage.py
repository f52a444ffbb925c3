"""The leakage measure against counting by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bn_det import BatchNorm2d, L1BatchNorm2d, freeze
from bn_det.errors import InputError
from bn_det.measure.bootstrap import Estimate
from bn_det.measure.leakage import (
    METRICS,
    RoIBatch,
    leakage_table,
    measure_leakage,
    save_leakage,
)

BACKGROUND = 3


def make_batches(num=6):
    return [
        RoIBatch(
            torch.randn(4 + k, 5, 2, 2) + k, torch.randint(0, BACKGROUND + 1, (4 + k,)), BACKGROUND
        )
        for k in range(num)
    ]


def make_head(norm):
    torch.manual_seed(3)
    head = nn.Sequential(norm, nn.Flatten(), nn.Linear(20, BACKGROUND + 1))
    return head.eval()


def counted(batches, classify):
    """The metrics by their definition, RoI by RoI."""
    right = foreground = foreground_right = rois = 0
    losses = []
    for features, labels, background in batches:
        logits = classify(features)
        for k, label in enumerate(labels.tolist()):
            found = logits[k].tolist().index(max(logits[k].tolist()))
            rois += 1
            right += found == label
            foreground += label != background
            foreground_right += found == label != background
            losses.append(F.cross_entropy(logits[k], labels[k]).item())
    values = [100 * foreground_right / foreground, 100 * right / rois, sum(losses) / rois]
    return dict(zip(METRICS, values, strict=True))


def test_metrics():
    batches = make_batches()
    head = make_head(BatchNorm2d(5))
    before = {k: v.clone() for k, v in head.state_dict().items()}
    results = measure_leakage(batches, len(batches), head, head)
    assert head[0].eval_statistics == "population", "as it was"
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    theirs = make_head(nn.BatchNorm2d(5))
    theirs.load_state_dict(head.state_dict())
    expected = {"population": counted(batches, theirs)}
    theirs[0].train()
    expected["batch"] = counted(batches, theirs)
    for statistics, metrics in expected.items():
        for name, value in metrics.items():
            estimate = results[statistics][name]
            assert estimate.value == pytest.approx(value, rel=1e-6)  # float32
            assert estimate.low < estimate.value < estimate.high
    for name, estimate in results["batch - population"].items():
        difference = expected["batch"][name] - expected["population"][name]
        assert estimate.value == pytest.approx(difference, abs=1e-5)


def test_what_is_the_same_in_every_batch_is_certain():
    # The label of each RoI is found by batch statistics, and missed by the population's.
    sign = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    batches = [
        RoIBatch(sign.expand(2, 1, 2, 2) * (k + 1) + 100, torch.tensor([0, 1]), 2) for k in range(5)
    ]
    head = BatchNorm2d(1).eval()

    def classify(x):
        y = head(x).mean((1, 2, 3))
        return torch.stack([y, -y, torch.full_like(y, 50.0) * (y.abs() > 10)], 1)

    results = measure_leakage(batches, 5, head, classify)
    assert results["batch"]["foreground accuracy"] == Estimate(100, 100, 100)
    # With the population's mean of 0, all values are near 100: the background's score is lower.
    assert results["population"]["foreground accuracy"] == Estimate(50, 50, 50)
    assert results["batch - population"]["foreground accuracy"] == Estimate(50, 50, 50)


def test_resamples_without_foreground_are_left_out(recwarn):
    """Of two batches one has no foreground, and a quarter of the resamples is of it alone."""
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    batches = [RoIBatch(x, torch.tensor(labels), 2) for labels in ([0, 1], [2, 2])]
    results = measure_leakage(batches, 2, BatchNorm2d(1).eval(), lambda x: x.new_ones(2, 3))
    for statistics, value in (("population", 50), ("batch", 50), ("batch - population", 0)):
        assert results[statistics]["foreground accuracy"] == Estimate(value, value, value)
    assert results["batch"]["accuracy"] == Estimate(25, 0, 50)
    assert not recwarn.list


def test_a_head_without_batch_statistics():
    batches = make_batches()
    head = make_head(nn.GroupNorm(1, 5))
    results = measure_leakage(batches, len(batches), head, head)
    assert list(results) == ["population"]
    assert "no batch statistics" in leakage_table(results)


def test_a_head_with_torchs_own_layer():
    batches, head = make_batches(), make_head(nn.BatchNorm2d(5))
    results = measure_leakage(batches, len(batches), head, head)
    ours = make_head(BatchNorm2d(5))
    assert results == measure_leakage(batches, len(batches), ours, ours)
    frozen = freeze(head)
    assert list(measure_leakage(batches, len(batches), frozen, frozen)) == ["population"]


def test_a_head_that_cannot_be_measured():
    head = make_head(L1BatchNorm2d(5))
    with pytest.raises(InputError, match="0 is a L1BatchNorm2d, which cannot be told"):
        measure_leakage(make_batches(), 6, head, head)


def test_no_batches():
    head = make_head(BatchNorm2d(5))
    with pytest.raises(InputError, match="batches: there is none"):
        measure_leakage([], 0, head, head)


def test_table_and_file(tmp_path):
    batches = make_batches()
    head = make_head(BatchNorm2d(5))
    results = measure_leakage(batches, len(batches), head, head)
    table = leakage_table(results)
    for statistics in ("population", "batch", "batch - population"):
        estimate = results[statistics]["foreground accuracy"]
        assert statistics in table and f"{estimate.value:.3f}" in table
    save_leakage(results, tmp_path / "leakage.json")
    saved = json.loads((tmp_path / "leakage.json").read_text())
    assert saved["batch"]["loss"] == results["batch"]["loss"]._asdict()
