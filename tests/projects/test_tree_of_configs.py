"""A detector built from nested dicts: ConvModule, norm_eval, frozen_stages, its own train()."""

import copy

import pytest
import torch
from torch import nn

import bn_det
import snippets
from bn_det.doctor import examine_file
from bn_det.errors import InputError
from toy_images import make_batches
from tree_of_configs import Detector, save_checkpoint


def call(model, batch):
    return model(**batch, mode="loss")


def make_inputs(number, generator):
    return [
        {"inputs": images, "data_samples": [{"label": int(k)} for k in labels]}
        for images, labels in make_batches(number, generator)
    ]


@pytest.fixture(scope="module")
def trained():
    """As if pre-trained, and then with norm_eval and a frozen stage; batches, and the optimizer."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Detector(frozen_stages=-1, norm_eval=False)
    for steps, norm_eval, frozen_stages in ((60, False, -1), (40, True, 1)):
        model.backbone.norm_eval, model.backbone.frozen_stages = norm_eval, frozen_stages
        model.train()
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, 0.02, momentum=0.9)
        for step, batch in enumerate(make_inputs(steps, generator)):
            optimizer.param_groups[0]["lr"] = 0.02 * max(1 - step / (0.6 * steps), 0)
            optimizer.zero_grad()
            sum(call(model, batch).values()).backward()
            optimizer.step()
    return model, make_inputs(16, generator), optimizer


def test_what_the_doctor_says(trained):
    """Nothing of layers that norm_eval keeps, which the next train() does not undo."""
    model, batches, _ = trained
    before = [(type(m), m.training) for m in model.modules()]
    report = bn_det.examine(model, batches, call=call)
    assert snippets.rules(report) == snippets.shown_rules("tree_of_configs")[0]
    assert before == [(type(m), m.training) for m in model.modules()]
    assert not bn_det.states(model).contradictions


def test_one_that_nobody_keeps(trained):
    model = copy.deepcopy(trained[0])
    model.neck[0].bn.eval()
    assert set(bn_det.states(model).contradictions) == {"neck.0.bn"}
    assert [of.where for of in bn_det.examine(model).findings if of.rule == "BN402"] == [
        ("neck.0.bn",)
    ]


def test_affine_that_is_fixed_alone():
    model = Detector(-1, False, {"type": "BN", "requires_grad": False}).train()
    (finding,) = [of for of in bn_det.examine(model).findings if of.rule == "BN401"]
    assert finding.where[0] == "neck.0.bn" and len(finding.where) == 5


def test_how_it_is_called(trained):
    model, batches, _ = trained
    with pytest.raises(TypeError) as raised:
        bn_det.update_bn_stats(model, batches, 2)
    if hasattr(raised.value, "__notes__"):  # Python 3.11
        (note,) = raised.value.__notes__
        assert note in " ".join(
            (snippets.ROOT / "docs/with/tree_of_configs.md").read_text().split()
        )
    with pytest.raises(InputError, match="call: gives .*; to evaluate, it has to give a loss"):
        bn_det.examine(model, batches, call=lambda model, batch: model(**batch), evaluate=True)


def test_statistics(trained):
    """Of neck and head; with frozen=True of the backbone, too."""
    model, batches, _ = copy.deepcopy(trained)
    before = copy.deepcopy(model.state_dict())
    report = bn_det.update_bn_stats(model.train(), batches, 4, call=call)
    assert len(report.layers) == 5 and len(report.left) == 15

    def changed():
        return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

    assert not any(key.startswith("backbone") for key in changed())
    bn_det.update_bn_stats(model.train(), batches, 4, call=call, frozen=True)
    assert "backbone.bn1.running_mean" in changed() and not model.backbone.bn1.training
    bn_det.freeze(model, "backbone")
    model.backbone.norm_eval = False
    assert {of.statistics for of in bn_det.states(model.train(), "backbone").layers} == {"frozen"}
    assert len(bn_det.tune(model).tuned) == 15


def test_its_file(trained, tmp_path):
    model, _, optimizer = trained
    save_checkpoint(model, tmp_path / "epoch_3.pth", optimizer)
    report = examine_file(tmp_path / "epoch_3.pth")
    assert {of.rule for of in report.findings} == {"BN112"}
    broken = copy.deepcopy(model)
    broken.neck[1].bn.running_var[0] = torch.nan
    save_checkpoint(broken, tmp_path / "epoch_4.pth", optimizer)
    first = examine_file(tmp_path / "epoch_4.pth").findings[0]
    assert (first.rule, first.where) == ("BN107", ("neck.1.bn",))


def test_fused(trained):
    """Blocks are, ConvModules are left, and outputs stay."""
    model, batches, _ = copy.deepcopy(trained)
    images = batches[0]["inputs"]
    model.eval()
    expected = model(images)
    report = bn_det.fuse(model)
    assert len(report.fused) == 15 and len(report.left) == 5
    for a, b in zip(model(images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert isinstance(model.neck[0].norm, nn.BatchNorm2d)
