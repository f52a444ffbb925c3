"""A backbone of timm, whose layers may have an activation in them, in a detector."""

import pytest

timm = pytest.importorskip("timm", reason="timm is not installed")

import copy  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402
from timm.layers import BatchNormAct2d  # noqa: E402
from torch import nn  # noqa: E402

import bn_det  # noqa: E402
import snippets  # noqa: E402


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    return snippets.run("timm")


@pytest.fixture
def model(page):
    return copy.deepcopy(bn_det.thaw(copy.deepcopy(page["model"]))).train()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def with_activation(model):
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BatchNormAct2d)]
    return {name for name, layer in layers if not isinstance(layer.act, nn.Identity)}


def test_the_page(page, model):
    """All is frozen, and tuned."""
    states = bn_det.states(page["model"]).layers
    assert {of.statistics for of in states} == {"frozen"}
    active = with_activation(model)
    assert page["left"] == {} and len(active) > 10
    kinds = {of.name: of.kind for of in states}
    assert {kinds[name] for name in active} == {"timm.BatchNormAct2d (frozen)"}
    frozen = {k: v.clone() for k, v in page["model"].state_dict().items() if "running" in k}
    page["model"].train()(page["loader"][0])
    assert all(torch.equal(page["model"].state_dict()[k], v) for k, v in frozen.items())


def test_what_the_doctor_says(page, model):
    report = bn_det.examine(model, page["loader"])
    assert snippets.rules(report) == snippets.shown_rules("timm")[0] == []
    assert snippets.blocks("timm", "") == [f"{report}\n"]


def test_statistics_of_a_layer_with_an_activation(page, model):
    """They are of what goes into it."""
    name = sorted(with_activation(model))[0]
    layer, seen = model.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for images in page["loader"]:
            model(images)
    hook.remove()
    bn_det.update_bn_stats(model, page["loader"], 4)
    values = torch.cat(seen).double()
    found = layer.running_mean.double()
    torch.testing.assert_close(found, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_all_of_it_becomes_ours(page, model, caplog):
    """In training, it computes what it did before, to the bit."""
    before, active = copy.deepcopy(model), with_activation(model)
    bn_det.convert_batchnorm(model, partial(bn_det.BatchNorm2d, group="world"))
    assert not caplog.records
    assert all(isinstance(m, bn_det.BatchNorm2d) for m in norms(model)) and len(active) > 10
    found, expected = [of(page["loader"][0]) for of in (model, before)]
    for of in (found, expected):
        sum(y.square().sum() for y in of).backward()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_two_sites(page, model):
    """With statistics for each source, images of the one do not move what the other gives."""
    bn_det.convert_batchnorm(model, lambda c: bn_det.SourceBatchNorm2d(c, 2))
    model.train()
    images, others = page["loader"][0], page["loader"][0].clone()
    others[1::2] += 1
    with bn_det.image_sources([0, 1, 0, 1]), torch.no_grad():
        before, after = model(images), model(others)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[::2], b[::2]) and not torch.equal(a[1::2], b[1::2])


def test_fused(page, model):
    images = page["loader"][0]
    model.eval()
    expected = model(images)
    report = bn_det.fuse(model)
    assert report.left == {} and with_activation(model) == set() and len(report.fused) > 20
    for a, b in zip(model(images), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
