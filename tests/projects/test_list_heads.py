"""Heads whose convolutions and norms are in plain Python lists, called level by level."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import bn_det
import snippets
from bn_det.doctor import examine_file
from list_heads import Detector
from toy_images import make_batches


def call(model, batch):
    return model(*batch)


@pytest.fixture(scope="module")
def trained():
    """A detector after 100 steps, and batches as it was trained on."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Detector().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step, batch in enumerate(make_batches(100, generator)):
        optimizer.param_groups[0]["lr"] = 0.02 * max(1 - step / 60, 0)  # the EMA is of its end
        optimizer.zero_grad()
        model(*batch)["loss"].backward()
        optimizer.step()
    return model, make_batches(12, generator)


def test_what_the_doctor_says(trained, tmp_path):
    model, batches = trained
    report = bn_det.examine(model, batches, call=call)
    assert snippets.rules(report) == snippets.shown_rules("list_heads")[0]
    of = {of.rule: of for of in report.findings}
    assert of["BN202"].where[0] == "head.bn0"
    assert "bn_det.DomainBatchNorm2d" in of["BN202"].treatment
    assert "head.bn0 3 times" in of["BN202"].why and " 0 %" not in of["BN202"].why
    # A file leaves open why they count three times.
    torch.save(model.state_dict(), tmp_path / "model.pth")
    (finding,) = examine_file(tmp_path / "model.pth").findings
    assert (finding.rule, finding.severity, finding.value) == ("BN112", "warning", 3)
    assert "bn_det.DomainBatchNorm2d" in finding.treatment


def test_the_lists_hold_what_is_registered(trained):
    model, batches = copy.deepcopy(trained[0]), trained[1]
    head, x = model.head, batches[0][0]
    model.eval()
    expected = model(x)
    bn_det.freeze(model, "backbone")
    bn_det.convert_batchnorm(model, partial(bn_det.BatchNorm2d, group="world"))
    assert type(head.bn0) is bn_det.BatchNorm2d
    report = bn_det.tune(model.train())
    assert report.tuned == ["backbone.stem.1", "backbone.down.0.1", "backbone.down.1.1"]
    assert set(report.left) == {"head.bn0", "head.bn1"}
    model.eval()
    for _ in range(2):
        assert head.norms == [head.bn0, head.bn1] and head.convs == [head.conv0, head.conv1]
        assert torch.allclose(model(x), expected, atol=1e-5)
        bn_det.fuse(model)
    model.train()
    before = head.bn0.running_mean.clone()
    assert bn_det.update_bn_stats(model, batches, 4, call=call).num_batches == 4
    assert not torch.equal(before, head.norms[0].running_mean)


def test_levels_cannot_be_had_by_converting(trained, caplog):
    model = copy.deepcopy(trained[0])
    bn_det.convert_batchnorm(model, partial(bn_det.DomainBatchNorm2d, num_domains=3), "head")
    assert "has left head.bn0 and 1 more: it takes a tensor, and a DomainBatch" in caplog.text
    assert type(model.head.bn0) is nn.BatchNorm2d


def test_the_page(trained):
    """Its head is as the old one in training, by each level's batch, and has its statistics."""
    names = snippets.run("list_heads")
    Head, LevelHead = names["Head"], names["LevelHead"]
    old, new = Head().train(), LevelHead().train()
    new.load_state_dict(old.state_dict(), strict=False)
    features = [torch.randn(4, 16, size, size) for size in (8, 4, 2)]
    for a, b in zip(old(features), new(features), strict=True):
        assert torch.equal(a, b)
    for k, x in enumerate(features):
        expected = 0.1 * new.conv0(x).mean((0, 2, 3))
        torch.testing.assert_close(new.bn0.population_of(k).running_mean, expected)
    model = names["model"]
    assert all(of.name != "BN101" for of in bn_det.examine(model).findings)
    assert model.bn1.population_of(2).running_mean.any()
