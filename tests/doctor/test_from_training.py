"""Optimizers and batches of which something is wrong for BatchNorm, and what is found."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import bn_det
from bn_det import BatchNorm2d, DomainBatchNorm2d, RoILevelBatchNorm2d, examine, roi_levels
from bn_det.doctor.from_training import Step
from bn_det.errors import InputError


@pytest.fixture
def model():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(8, 4, 3), BatchNorm2d(4), nn.BatchNorm2d(4))
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(0.5, 1.5)
    return model


def found(model, batches=None, severity=("error", "warning", "note"), **kwargs):
    report = examine(model, batches, **kwargs)
    of_rules = [of for of in report.findings if of.rule.startswith("BN5")]
    return {of.rule: of for of in of_rules if of.severity in severity}


def moves(model, optimizer, gradient):
    """By how much a step moves weight and bias of each BatchNorm, where every gradient is that."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    by = {n: float((p.detach() - before[n]).abs().max()) for n, p in model.named_parameters()}
    return {layer: max(of for n, of in by.items() if n.startswith(layer)) for layer in names}


def groups(model, decays):
    """A group for each parameter, of the weight decay that its module's name has."""
    return [
        {"params": [p], "weight_decay": decays.get(name.split(".")[0], 0)}
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
@pytest.mark.parametrize("decays", [{}, {"0": 0.1, "3": 0.1}, {"4": 0.1}, {"1": 0.01, "5": 0.2}])
def test_weight_decay(kind, decays, model):
    """What is named is what a step without gradients moves."""
    optimizer = kind(groups(model, decays), lr=0.1)
    finding = found(model, optimizer=optimizer).get("BN501")
    moved = {layer for layer, by in moves(model, optimizer, 0.0).items() if by > 0}
    assert moved == (set() if finding is None else set(finding.where))
    if finding is not None:
        assert finding.severity == "note"
        assert finding.value == max(decays[layer] for layer in moved)


def test_defaults_of_torch_and_a_scale_alone(model):
    assert "BN501" not in found(model, optimizer=SGD(model.parameters(), lr=0.1))
    every = found(model, optimizer=AdamW(model.parameters()))["BN501"]  # whose default is 0.01
    assert every.where == ("1", "4", "5") and every.value == 0.01
    rest = [p for p in model.parameters() if p is not model[1].weight]
    both = [{"params": [model[1].weight], "weight_decay": 1e-4}, {"params": rest}]
    assert found(model, optimizer=SGD(both, lr=0.1))["BN501"].where == ("1",)


def test_what_the_optimizer_does_not_have(model):
    """It is what a step with gradients leaves as it is."""
    optimizer = SGD([p for p in model.parameters() if p is not model[4].bias], lr=0.1)
    assert found(model, optimizer=optimizer)["BN504"].where == ("4",)
    optimizer = SGD([*model[0].parameters(), *model[5].parameters()], lr=0.1)
    finding = found(model, optimizer=optimizer)["BN504"]
    assert finding.severity == "warning" and finding.value == 2
    moved = moves(model, optimizer, 1.0)
    assert finding.where == tuple(layer for layer, by in moved.items() if by == 0) == ("1", "4")
    bn_det.freeze(model, ["1", "4"])
    assert found(model, optimizer=optimizer) == {}


def test_what_it_has_twice(model):
    """A step moves that by twice the learning rate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, once
        optimizer = SGD([*model.parameters(), *model[4].parameters()], lr=0.1)
    finding = found(model, optimizer=optimizer)["BN504"]
    assert finding.where == ("4",) and "2 times" in finding.why
    moved = moves(model, optimizer, 1.0)
    assert {name: round(by, 5) for name, by in moved.items()} == {"1": 0.1, "4": 0.2, "5": 0.1}


def test_layers_that_were_thawed_after_it_was_made(model):
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    model.append(frozen)
    optimizer = SGD(model.parameters(), lr=0.1)
    assert found(model, optimizer=optimizer) == {}
    bn_det.thaw(model)
    assert found(model, optimizer=optimizer)["BN504"].where == ("6",)
    optimizer.add_param_group({"params": model[6].parameters()})
    assert found(model, optimizer=optimizer) == {}


def test_another_models_optimizer(model):
    other = SGD(nn.Conv2d(3, 3, 1).parameters(), lr=0.1)
    with pytest.raises(InputError, match="optimizer: it has none of the model's parameters"):
        examine(model, optimizer=other)


def batches(size, number=3):
    return [torch.randn(size, 3, 12, 12) for _ in range(number)]


def small(model, size, **kwargs):
    return found(model, batches(size), **kwargs).get("BN502")


def test_small_batches(model):
    assert small(model, 3) is None
    finding = small(model, 2)
    assert finding.severity == "warning" and finding.where == ("1", "4", "5")
    assert finding.value == 2 and "3 layers is of 2 samples: " in finding.why
    assert "SyncBN" not in finding.treatment and "GN" in finding.treatment
    bn_det.freeze(model, ["1", "4"])
    assert small(model, 1).where == ("5",) and small(model, 1).value == 1
    bn_det.freeze(model)
    assert small(model, 1) is None


def test_a_step_of_several_batches(model):
    """Neither processes nor accumulation help; what is normalized over processes is as large."""
    step = Step(processes=8, batches=4)
    finding = small(model, 2, step=step)
    assert "of 2 samples, where a step of the optimizer has 32 of these: " in finding.why
    assert finding.treatment.startswith("SyncBN, or ")
    assert small(model, 8, step=step) is None
    assert small(model, 8, step=step._replace(share=0.25)).value == 2
    model[4].group = "world"
    model[1] = nn.SyncBatchNorm(8)
    assert small(model[:5], 2, step=step) is None
    assert small(model, 2, step=step).where == ("5",)
    finding = small(model[:5], 1, step=Step(processes=2, batches=3))
    assert finding.where == ("1", "4") and finding.value == 2
    assert "has 3 of these" in finding.why and not finding.treatment.startswith("SyncBN")


@pytest.mark.parametrize(
    "choices", [{"ghost_size": 1}, {"renorm": (3.0, 5.0)}, {"train_statistics": "population"}]
)
def test_other_ways_of_small_batches(choices, model):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, **choices))
    with torch.no_grad():
        model.train()(batches(4)[0])
    assert small(model, 2) is None


class Head(nn.Module):
    """On two levels, called with a list or one by one; or on eight RoIs of each image."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        if isinstance(self.norm, RoILevelBatchNorm2d):
            rois = x[..., :6, :6].repeat(8, 1, 1, 1)
            with roi_levels(torch.arange(len(rois)) % 2):
                return self.norm(rois)
        levels = [x, x[..., :6, :6]]
        is_list = isinstance(self.norm, DomainBatchNorm2d)
        return self.norm(levels) if is_list else [self.norm(level) for level in levels]


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(3),
        lambda: DomainBatchNorm2d(3, 2, statistics="shared", population="shared"),
        lambda: DomainBatchNorm2d(3, 2, statistics="per_domain", population="shared"),
        lambda: DomainBatchNorm2d(3, 2, statistics="per_domain", population="per_domain"),
    ],
)
def test_levels_are_of_the_same_images(norm):
    head = Head(norm())
    assert small(head, 3) is None
    assert small(head, 2).value == 2


def test_rois_are_many():
    norm = RoILevelBatchNorm2d(3, 2, statistics="per_domain", population="per_domain")
    assert small(Head(norm), 2) is None  # 8 of each level


@pytest.mark.parametrize("rule", ["BN501", "BN502", "BN503", "BN504", "BN505"])
def test_explained(rule):
    page = bn_det.doctor.RULES[rule].explain(rule)
    assert "Who met it" in page and "What it cannot tell" in page
