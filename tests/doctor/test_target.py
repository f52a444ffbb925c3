"""Domain shift: what layers see on images of a target, against what they see on training images."""

import copy

import pytest
import torch
from test_examine import batches, classifier, rules
from torch import nn

import bn_det
from bn_det import examine
from bn_det.errors import InputError


@pytest.fixture
def model():
    """With precise statistics."""
    torch.manual_seed(0)
    model = classifier().train()
    bn_det.update_bn_stats(model, batches(100, seed=1), 100)
    return model.eval()


def shifted(number=32, seed=5):
    """The second channel is brighter, and of more contrast."""
    scale, offset = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    return [x * scale.view(3, 1, 1) + offset.view(3, 1, 1) for x in batches(number, seed)]


def statistics(model, data):
    """Mean, and mean of the batches' unbiased variances, of what BatchNorm sees in training."""
    seen = {"1": [], "4": []}
    trained = copy.deepcopy(model).train()
    for name, of_layer in seen.items():
        trained.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, of_layer=of_layer: of_layer.append(inputs[0])
        )
    with torch.no_grad():
        for x in data:
            trained(x)
    return {
        name: (
            torch.cat(of).mean((0, 2, 3)),
            torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in of]).mean(0),
        )
        for name, of in seen.items()
    }


@pytest.mark.parametrize("frozen", [False, True])
def test_against_both_by_themselves(frozen, model):
    if frozen:
        bn_det.freeze(model, "1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = examine(model, batches(), target=shifted())
    (finding,) = [of for of in report.findings if of.rule == "BN205"]
    assert finding.severity == "warning" and finding.where[0] in ("1", "4")
    assert ("frozen" in finding.why) == frozen and finding.untried.startswith("it may harm where")
    source, target = statistics(model, batches()), statistics(model, shifted())
    for of in report.on_target:
        (mean, var), (other_mean, other_var) = source[of.name], target[of.name]
        expected = ((other_mean - mean).square() / var).mean().sqrt()
        assert of.mean_shift == pytest.approx(float(expected), rel=1e-4)
        expected = (other_var / var - 1).square().mean().sqrt()
        assert of.var_shift == pytest.approx(float(expected), rel=1e-4)
    assert finding.value == max(max(of.mean_shift, of.var_shift) for of in report.on_target)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [of.name for of in report.layers] == (["4"] if frozen else ["1", "4"])


def lossy(model, x):
    """A loss that is least where the outputs are those of the domain that it was trained on."""
    return model(x).square().mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_targets_statistics_are_tried_there(sign, model):
    """By the score on the target; whatever they bring, the model stays as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = torch.cat([copy.deepcopy(model).train()(x) for x in shifted()]).detach()
    scored = []

    def score(model):
        assert not model.training
        y = torch.cat([model(x) for x in shifted()]).detach()
        scored.append(sign * -float((y - outputs).square().mean()))
        return scored[-1]

    report = examine(
        model,
        batches(),
        call=lossy,
        target=shifted(),
        evaluate=True,
        target_score=score,
        treat=True,
    )
    (finding,) = [of for of in report.findings if of.rule == "BN205"]
    tried = report.tried[-1]
    assert tried.on_target and not tried.kept and not any(of.on_target for of in report.tried[:-1])
    assert (tried.before, tried.after) == tuple(scored)
    adapted = copy.deepcopy(model)
    bn_det.update_bn_stats(adapted.train(), shifted(), 32)
    adapted.eval()
    assert tried.after == pytest.approx(score(adapted), rel=1e-4)
    assert finding.gain == tried.after - tried.before and finding.measure == "AP"
    assert (finding.gain > 0) == (sign > 0) == tried.helps
    assert finding.prescription.startswith("tried, and no help here") == (sign < 0)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_the_same_domain_is_not_scored(model):
    def score(model):
        raise AssertionError

    report = examine(
        model, batches(), call=lossy, target=batches(seed=6), evaluate=True, target_score=score
    )
    assert not any(of.on_target for of in report.tried)


def test_all_frozen(model):
    bn_det.freeze(model)
    report = examine(model, batches(), target=shifted())
    assert rules(report) == ["BN205"] and report.layers == []


def test_the_same_domain(model):
    report = examine(model, batches(), target=batches(seed=6))
    assert rules(report) == [] and len(report.on_target) == 2


def test_what_fails_leaves_the_model(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    broken = [*shifted(3), torch.randn(2, 5, 12, 12)]
    with pytest.raises(RuntimeError, match="channels"):
        examine(model, batches(), target=broken)
    assert not model.training
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"batches": None, "target": []}, "target: batches of a target are not accepted without"),
        ({"target": []}, "target: batches: has 0 of 32 batches"),
        ({"target": shifted(1)}, "target: batches: one is too few"),
        ({"target_score": len}, "target_score: it is not accepted without target"),
        ({"target": shifted(), "target_score": 3}, "target_score: what is given is of type int"),
    ],
)
def test_what_is_no_target(kwargs, words, model):
    with pytest.raises(InputError, match=words):
        examine(model, **{"batches": batches(), **kwargs})


def test_layers_that_few_batches_reach():
    """Chance is that of as many batches as a layer has seen, and not of all."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.seldom = (
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2)
            )

        def forward(self, x, both):
            self.often(x)
            if both:
                self.seldom(x)

    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = Net().train()
        source, target = (
            [(x, k in (3, 9)) for k, x in enumerate(batches(seed=2 * seed + k))] for k in (0, 1)
        )
        report = examine(model, source, target=target, call=lambda model, batch: model(*batch))
        bounds = {of.name: of.bound for of in report.on_target}
        assert bounds["seldom.1"] > 5 * bounds["often.1"]
        found += [of for of in report.findings if of.rule == "BN205"]
    assert not found
