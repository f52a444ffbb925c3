"""A convolution and its BatchNorm again: of a fused model, and of a fused file."""

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from bn_det import BatchNorm2d, DomainBatchNorm2d, forward_levels, fuse, unfold, unfuse
from bn_det.errors import InputError
from bn_det.layers.folded import is_folded
from bn_det.layers.kinds import batch_norms
from reference import EIGHT_CHOICES

C = 6


def fill(model):
    """Every parameter and statistic matters; activations keep their scale."""
    torch.manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(t, 0.5, 2)
        elif name.endswith(("running_mean", "bias")):
            nn.init.uniform_(t, -0.5, 0.5)
        elif t.dim() == 1:
            nn.init.uniform_(t, 0.5, 1.5)
            t.data[0] *= -1
    return model.double().eval()


class WithNorm(nn.Conv2d):
    """As Detectron2's convolution."""

    def __init__(self, *args, norm, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm

    def forward(self, x):
        x = super().forward(x)
        return x if self.norm is None else self.norm(x)


MODELS = {
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, C, 3, groups=3), nn.BatchNorm2d(C), nn.ReLU(),
        nn.ConvTranspose2d(C, 4, 2, bias=False), BatchNorm2d(4, affine=False),
    ),
    "frozen": lambda: nn.Sequential(nn.Conv2d(3, C, 1, bias=False), FrozenBatchNorm2d(C)),
    "inside": lambda: nn.Sequential(WithNorm(3, C, 1, norm=nn.BatchNorm2d(C)), nn.ReLU()),
    "inside, alone": lambda: WithNorm(3, C, 1, norm=nn.BatchNorm2d(C)),
    "resnet": resnet18,
}  # fmt: skip


def same(found, expected, tolerance=1e-9):
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= tolerance * scale


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_fused_model(kind):
    """Its layers are the objects that they were, and its weights as they were but for rounding."""
    model = fill(MODELS[kind]())
    before, names = copy.deepcopy(model), {n: m for m, n in batch_norms(model).items()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fuse(model)
    assert not batch_norms(model)
    model = copy.deepcopy(model) if kind == "resnet" else model
    assert unfuse(model) is model
    found = {n: m for m, n in batch_norms(model).items()}
    assert found.keys() == names.keys()
    assert kind == "resnet" or found == names
    assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    same(model(x), before(x))
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=1e-9, atol=1e-12)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(InputError, match="no BatchNorm of this model has been fused"):
        unfuse(model)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_fused_file(kind, as_file, tmp_path):
    """Folded statistics; real ones by unfold, with the same function."""
    model = fill(MODELS[kind]())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = copy.deepcopy(model)
    fuse(fused)
    state, into = fused.state_dict(), MODELS[kind]().double().eval()
    if as_file:
        torch.save({"model": state}, tmp_path / "fused.pth")
        state = tmp_path / "fused.pth"
    unfuse(into, state)
    with torch.no_grad():
        same(into(x), model(x))
    folded = [m for m in batch_norms(into) if is_folded(m)]
    assert len(folded) == sum(m.weight is not None for m in batch_norms(into))
    unfold(into, [x, x + 1], 2)
    with torch.no_grad():
        same(into(x), model(x))
    assert not any(map(is_folded, batch_norms(into)))


class Head(nn.Module):
    def __init__(self, choices):
        super().__init__()
        names = ("statistics", "population", "affine")
        norm = DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)))
        self.tower = nn.Sequential(nn.Conv2d(4, C, 3, padding=1), norm, nn.ReLU())

    def forward(self, features):
        return forward_levels([self.tower], features)


@pytest.mark.parametrize("choices", EIGHT_CHOICES)
def test_levels(choices):
    """A convolution for each level becomes one for all, of a model and of a file."""
    head = fill(Head(choices))
    xs = [torch.randn(2, 4, k, k, dtype=torch.float64) for k in (4, 2, 1)]
    with torch.no_grad():
        expected, state = head(xs), copy.deepcopy(head.state_dict())
        fuse(head)
        into = unfuse(Head(choices).double().eval(), head.state_dict())
        unfuse(head)
        for model in (head, into):
            for found, y in zip(model(xs), expected, strict=True):
                same(found, y)
    torch.testing.assert_close(head.state_dict(), state, rtol=1e-9, atol=1e-12)


def test_channels_of_zeros():
    """What a scale of 0 has wiped out cannot come back; the function does."""
    model = fill(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)))
    model[1].weight.data[2] = 0
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        into = unfuse(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)).double().eval(),
                      model.state_dict())  # fmt: skip
        for found in (unfuse(model), into):
            same(found(x), expected)


def test_what_is_no_fused_file(tmp_path):
    model = fill(MODELS["sequential"]())
    before = copy.deepcopy(model.state_dict())
    fused = copy.deepcopy(model)
    fuse(fused)
    state = fused.state_dict()
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint")
    number = io.BytesIO()
    torch.save(3, number)
    number.seek(0)
    for file, words in [
        (before, "not those of a fused model of this kind"),
        (text, "cannot be loaded as a checkpoint"),
        (tmp_path / "none.pth", "none.pth: cannot be loaded as a checkpoint"),
        (number, "is no state dict"),
        ({**state, "0.weight": torch.zeros(2, 2)}, "do not fit the model"),
        ({**state, "more": torch.zeros(2)}, "do not fit the model"),
    ]:
        with pytest.raises(InputError, match=words):
            unfuse(model, file)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    head = fill(Head(("per_domain",) * 3))
    fuse(head)
    broken = head.state_dict()
    nn.init.normal_(broken["tower.0.1.weight"])
    with pytest.raises(InputError, match="not multiples of each other"):
        unfuse(Head(("per_domain",) * 3), broken)
    del broken["tower.0.2.bias"]
    with pytest.raises(InputError, match="have no tower.0.2.bias"):
        unfuse(Head(("per_domain",) * 3), broken)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_has_changed_since(inside):
    """Each BatchNorm is what the model, and its convolution, have become."""
    conv = WithNorm(3, C, 1, norm=nn.BatchNorm2d(C)) if inside else nn.Conv2d(3, C, 1)
    model = fill(nn.Sequential(conv, *([] if inside else [nn.BatchNorm2d(C)]))).float()
    norm = conv.norm if inside else model[1]
    fuse(model)
    unfuse(model.double().train().requires_grad_(False))
    assert norm.training and norm.running_var.dtype == torch.float64
    assert not any(p.requires_grad for p in model.parameters())
    fuse(model.eval())
    unfuse(model)
    assert not norm.training
