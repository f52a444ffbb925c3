"""Layers that a train() of the model's own keeps in evaluation mode."""

import copy

import pytest
import torch
from torch import nn

import bn_det
from bn_det.layers.kept import as_frozen, kept_in_evaluation


class NormEval(nn.Sequential):
    """Keeps the BatchNorm of its first part in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        for module in self[0].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        self[0].requires_grad_(False)  # as frozen_stages does; returns nothing


def make():
    model = nn.Sequential(
        NormEval(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        ),
        nn.BatchNorm2d(4),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.weight)
    return model.train()


def modes(model):
    return [module.training for module in model.modules()]


def test_they_are_found_by_trying():
    model = make()
    (kept,) = kept_in_evaluation(model)
    assert kept is model[0][0][1]
    model[0][1].eval()  # which train() undoes
    model[0][1].requires_grad_(True)
    before = modes(model), [p.requires_grad for p in model.parameters()]
    assert kept_in_evaluation(model) == {kept}
    assert before == (modes(model), [p.requires_grad for p in model.parameters()])
    assert set(bn_det.states(model).contradictions) == {"0.1.1"}
    rules = {of.rule: of.where for of in bn_det.examine(model).findings}
    assert rules == {"BN402": ("0.1.1",)}


def test_also_where_all_of_it_is_in_evaluation_mode():
    model = make()
    model[0].eval()
    assert set(bn_det.states(model).contradictions) == {"0.1.1"}


def test_a_train_that_is_assigned():
    """As a function, and as one that knows the module."""
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3).eval()).train()
    model[0].train = lambda mode=True: None
    model[1].train = model[1].train
    for layer in model:
        layer.training = False
    assert kept_in_evaluation(model) == {model[0]} and modes(model) == [True, False, False]


def test_a_train_that_fails():
    class Exported(nn.Sequential):
        def train(self, mode=True):
            raise NotImplementedError

    model = Exported(nn.BatchNorm2d(3))
    model[0].eval()
    assert kept_in_evaluation(model) == set()
    assert set(bn_det.states(model).contradictions) == {"0"}


def test_frozen_for_a_while():
    model = make()
    before = [(type(m), m.training, list(vars(m))) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), as_frozen(model):
        assert [of.statistics for of in bn_det.states(model).layers] == [
            "frozen",
            "moving",
            "moving",
        ]
        raise ZeroDivisionError
    assert before == [(type(m), m.training, list(vars(m))) for m in model.modules()]
    without = make()
    without[0][0][1] = nn.BatchNorm2d(4, track_running_stats=False)
    with as_frozen(without.train()):
        assert type(without[0][0][1]) is nn.BatchNorm2d  # which cannot be frozen


def test_update_bn_stats():
    """frozen=True means them, too; without it the report says why they are left."""
    batches = [torch.randn(4, 3, 5, 5) for _ in range(3)]
    model, expected = make(), None
    report = bn_det.update_bn_stats(model, batches, 3)
    (why,) = report.left.values()
    assert list(report.left) == ["0.0.1"]
    assert (
        why == "kept in evaluation mode by a train() of the model's own (frozen=True updates them)"
    )
    expected = copy.deepcopy(model)
    bn_det.update_bn_stats(model, batches, 3, frozen=True)
    expected[0][0][1].train()
    bn_det.update_bn_stats(expected, batches, 3)
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not model[0][0][1].training


def test_the_doctor_takes_them_for_frozen():
    """Statistics that do not fit are BN304, and are treated; the model is as it was otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        NormEval(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    stem = model[0][0]
    batches = [(torch.randn(16, 3, 6, 6) + torch.tensor([1.0, 0, 0]).view(3, 1, 1),
                torch.randint(0, 2, (16,))) for _ in range(24)]  # fmt: skip
    for x, y in batches:
        x[y == 1, 1] += 1
    stem.train()
    with torch.no_grad():
        for x, _ in batches * 2:
            stem(x)
    optimizer = torch.optim.SGD(model[3].parameters(), 1.0)
    model.train()
    for x, y in batches * 4:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    stem[1].running_mean += 3 * stem[1].running_var.sqrt()
    weight = model[3].weight.clone()

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = bn_det.examine(model, batches, 24, call=loss, treat=True)
    assert report.findings[0].rule == "BN304" and "the model has them now" in report.verdict
    kept = next(of for of in report.tried if of.kept)
    assert kept.rules == ("BN304",) and kept.after < kept.before
    assert type(stem[1]) is nn.BatchNorm2d and not stem[1].training
    assert torch.equal(weight, model[3].weight)
    assert "BN304" not in {of.rule for of in bn_det.examine(model, batches, 24, call=loss,
                                                            evaluate=True).findings}  # fmt: skip
