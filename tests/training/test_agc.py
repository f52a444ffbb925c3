"""Adaptive gradient clipping against its definition, and timm's where it is installed."""

import copy

import pytest
import torch
from torch import nn

from bn_det.errors import InputError
from bn_det.training.agc import AdaptiveGradientClipping


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2), nn.Conv1d(6, 2, 1),
        nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip
    for k, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) * 10.0 ** (-2 - k % 3)
    with torch.no_grad():
        model[0].weight[1] = 0  # the limit is that of eps
        model[0].weight.grad[2] = 0
        model[4].bias.grad.zero_()
    return model


def by_definition(weight, grad, clip_factor, eps, dim):
    """Unit by unit, in a loop."""
    grad = grad.clone()
    units = [...] if weight.dim() <= 1 else range(weight.shape[dim])
    for unit in units:
        w, g = (t if unit is ... else t.select(dim, unit) for t in (weight, grad))
        limit = clip_factor * max(w.square().sum().sqrt().item(), eps)
        norm = g.square().sum().sqrt().item()
        if norm > limit:
            g.mul_(limit / norm)
    return grad


@pytest.mark.parametrize("clip_factor, eps", [(0.01, 1e-3), (1e-4, 0.5), (100, 1e-3)])
def test_definition(clip_factor, eps):
    model = make_model()
    before = copy.deepcopy(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    AdaptiveGradientClipping(model, clip_factor, eps)()
    for name, p in model.named_parameters():
        dim = 1 if name == "2.weight" else 0
        expected = by_definition(p, grads[name], clip_factor, eps, dim)
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(p, before.get_parameter(name))
    unchanged = all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())
    assert unchanged == (clip_factor == 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_timm(dtype):
    """To 1e-6 where the two treat a parameter alike: not a transposed convolution."""
    timm = pytest.importorskip("timm.utils.agc", reason="timm is not installed")
    ours, theirs = make_model(dtype), make_model(dtype)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = p.grad.clone()
    AdaptiveGradientClipping(ours)()
    timm.adaptive_clip_grad(list(theirs.parameters()), clip_factor=0.01, eps=1e-3)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name != "2.weight":
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Norms and factors are in float32: those of this gradient would leave float16."""
    model = nn.Linear(4, 2).to(dtype)
    model.weight.grad = torch.full_like(model.weight, 4e4)
    model.bias.grad = torch.zeros_like(model.bias)
    expected = by_definition(model.weight.double(), model.weight.grad.double(), 0.01, 1e-3, 0)
    AdaptiveGradientClipping(model)()
    torch.testing.assert_close(model.weight.grad.double(), expected, rtol=1e-2, atol=0)


def test_excluded_and_missing_gradients():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "cls_score": nn.Conv2d(4, 4, 1)})
    model["conv"].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model["conv"].bias.grad = None
    AdaptiveGradientClipping(model)()
    assert (model["conv"].weight.grad < 1).all()
    assert all((p.grad == 1).all() for p in model["cls_score"].parameters())
    for p in model["conv"].parameters():
        p.grad = None
    AdaptiveGradientClipping(model)()
    AdaptiveGradientClipping(model, exclude=["conv"])()
    assert (model["cls_score"].weight.grad < 1).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"clip_factor": 0}, "clip_factor: 0 is not accepted; use more than 0"),
        ({"eps": -1.0}, "eps: -1.0 is not accepted"),
        ({"exclude": ["weight", "bias"]}, "exclude: .* leaves no parameter to clip"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        AdaptiveGradientClipping(nn.Linear(2, 2), **arguments)


def test_before_each_step_of_an_optimizer_and_after_unscaling():
    """As if the gradients had been clipped by hand, also where a GradScaler has scaled them."""
    model = nn.Linear(3, 2)
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    AdaptiveGradientClipping(model, exclude=()).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(4, 3)
    for m in (model, by_hand):
        loss = m(x).square().sum()
        (scaler.scale(loss) if m is model else loss).backward()
    scaler.step(optimizer)
    AdaptiveGradientClipping(by_hand, exclude=())()
    with torch.no_grad():
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q - q.grad, rtol=1e-6, atol=1e-7)
