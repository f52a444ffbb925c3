"""Weights or statistics: losses by both, the part that is to blame, and what mends it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bn_det
from bn_det import examine
from bn_det.doctor.blame import attribute, parts_of
from bn_det.doctor.losses import Losses, put, statistics_of, total
from bn_det.errors import InputError


def classifier():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(16, 4),
    )


def batches(number, seed):
    """Images with a bright quarter, which is their class."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        classes = torch.randint(4, (16,), generator=generator)
        images = torch.randn(16, 3, 16, 16, generator=generator)
        for image, k in zip(images, classes.tolist(), strict=True):
            row, column = 8 * (k // 2), 8 * (k % 2)
            image[:, row : row + 8, column : column + 8] += 0.4
        found.append((images, classes))
    return found


def loss(model, batch):
    images, classes = batch
    return {"loss": F.cross_entropy(model(images), classes), "accuracy": 1.0}


@torch.no_grad()
def accuracy(model):
    assert not model.training
    right = [float((model(x).argmax(1) == y).float().mean()) for x, y in batches(8, seed=9)]
    return 100 * sum(right) / len(right)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = classifier()
    steps = 240
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    for batch in batches(steps, seed=1):
        optimizer.zero_grad()
        loss(model, batch)["loss"].backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained).eval()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, state):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def rules(report):
    return [of.rule for of in report.findings if of.severity != "note"]


def test_healthy(model):
    state = state_of(model)
    report = examine(model, batches(48, seed=2), call=loss, evaluate=True)
    assert rules(report) == []
    (tried,) = report.tried
    assert tried.measure == "loss" and tried.rules == () and not tried.helps
    assert report.verdict.endswith(f"; with {tried}")
    assert not any(module.training for module in model.modules())
    assert_same(model, state)


@pytest.mark.parametrize("index", [1, 4])
def test_statistics_are_to_blame(index, model):
    model[index].running_mean += 1.5 * model[index].running_var.sqrt()
    state = state_of(model)
    report = examine(model, batches(48, seed=2), call=loss, evaluate=True, score=accuracy)
    found = {of.rule: of for of in report.findings}
    assert found["BN301"].where[0] == found["BN302"].where[0] == str(index)
    assert found["BN301"].value > 3 * found["BN301"].standard_error > 0
    (tried,) = report.tried
    assert tried.gain > 5 and {"BN201", "BN301", "BN302"} <= set(tried.rules)
    assert found["BN301"].gain == found["BN201"].gain == tried.gain
    assert found["BN301"].measure == tried.measure == "AP"
    assert report.verdict.startswith("statistics, not weights: ")
    assert f"AP {tried.before:.4g} before" in report.verdict
    assert_same(model, state)


def test_weights_are_to_blame(model):
    """Whatever the statistics, a model of other weights is no better."""
    with torch.no_grad():
        model[9].weight.neg_()
    report = examine(model, batches(48, seed=2), call=loss, evaluate=True, score=accuracy)
    (tried,) = report.tried
    assert rules(report) == [] and abs(tried.gain) < 5 and tried.before < 30


def test_treated(model):
    healthy = accuracy(model)
    model[4].running_var[3] = math.nan
    report = examine(model, batches(48, seed=2), call=loss, treat=True, score=accuracy)
    (tried,) = report.tried
    assert tried.kept and tried.measure == "AP"
    assert {"BN107", "BN301", "BN302"} <= set(rules(report))
    # Of 128 images 88 % are right, with a standard error of 3 %.
    assert accuracy(model) == tried.after > healthy - 6
    assert rules(examine(model, batches(48, seed=3), call=loss, evaluate=True)) == []


def test_treatment_that_is_not_kept(model):
    """Nothing is wrong; so the statistics stay, though others might do a little better."""
    state = state_of(model)
    report = examine(model, batches(48, seed=2), call=loss, treat=True)
    assert [of.kept for of in report.tried] == [False]
    assert_same(model, state)


def test_a_score_that_fails_leaves_the_model(model):
    state = state_of(model)

    def score(model):
        if not torch.equal(model[1].running_mean, state["1.running_mean"]):
            raise ZeroDivisionError
        return 50.0

    with pytest.raises(ZeroDivisionError):
        examine(model, batches(48, seed=2), call=loss, treat=True, score=score)
    assert_same(model, state)


def test_frozen_statistics(model):
    """Images of another brightness, and statistics that cannot follow."""
    bn_det.freeze(model, "1")
    shifted = [(2 * x + 3, y) for x, y in batches(48, seed=2)]
    found = {of.rule: of for of in examine(model, shifted, call=loss, evaluate=True).findings}
    # The treatment that it names helps more than recomputing the others.
    assert found["BN304"].severity == "error" and "frozen=True" in found["BN304"].treatment
    same = examine(model, batches(48, seed=2), call=loss, evaluate=True).findings
    assert "BN304" not in [of.rule for of in same]


def test_all_layers_frozen(model):
    """No passes are needed, and losses are compared all the same."""
    bn_det.freeze(model)
    shifted = [(2 * x + 3, y) for x, y in batches(48, seed=2)]
    report = examine(model, shifted, call=loss, evaluate=True)
    recomputed, frozen = report.tried
    assert "BN304" in rules(report) and recomputed.gain == 0 and not recomputed.helps
    assert frozen.rules == ("BN304",) and frozen.helps and frozen.before > 0


def test_losses_are_those_of_evaluation_and_of_training(model):
    """Against the model in each mode by itself, in which dropout is off."""
    held = batches(3, seed=4)
    losses = Losses(model, loss, held)
    with torch.no_grad():
        expected = [float(loss(model, batch)["loss"]) for batch in held]
    assert losses.of().tolist() == pytest.approx(expected, rel=1e-6)
    copied = copy.deepcopy(model).train()
    copied[8].p = 0.0
    with torch.no_grad():
        expected = [float(loss(copied, batch)["loss"]) for batch in held]
    assert losses.by_batch([model[1], model[4]]).tolist() == pytest.approx(expected, rel=1e-6)


def test_thawed_losses(model):
    held = batches(3, seed=4)
    expected = Losses(model, loss, held).by_batch([model[1], model[4]])
    bn_det.freeze(model)
    state = state_of(model)
    torch.testing.assert_close(Losses(model, loss, held).thawed(), expected)
    assert_same(model, state)


def test_blame_of_two_parts_sums_up(model):
    """Shapley's values of two players do."""
    old, losses = statistics_of(model), Losses(model, loss, batches(3, seed=4))
    new = {name: (mean + 0.3, var * 1.5) for name, (mean, var) in old.items()}
    of_old = losses.of()
    put(model, new)
    of_new = losses.of()
    parts = {"first": ["1"], "second": ["4"]}
    blamed = attribute(losses, old, new, parts, (of_old, of_new))
    torch.testing.assert_close(blamed["first"] + blamed["second"], of_old - of_new)


def test_parts():
    names = [f"backbone.layer{k}.{n}.bn" for k in range(1, 5) for n in range(6)]
    parts = parts_of(["backbone.stem", *names, "head.bn"])
    assert list(parts) == ["backbone.stem", *(f"backbone.layer{k}" for k in range(1, 5)), "head"]
    assert parts["head"] == ["head.bn"] and len(parts["backbone.layer2"]) == 6
    assert parts_of(["1", "4"]) == {"1": ["1"], "4": ["4"]}
    assert parts_of(["only"]) == {"only": ["only"]}
    assert parts_of([str(k) for k in range(9)]) == {"": [str(k) for k in range(9)]}


@pytest.mark.parametrize(
    "outputs, expected",
    [
        (torch.tensor(2.0), 2.0),
        ({"loss_cls": torch.tensor([1.0]), "loss_box": 2, "num_pos": 7}, 3.0),
        ({"a": 1.0, "b": 2.0}, 3.0),
        ([torch.tensor(1.0), torch.tensor(0.5)], 1.5),
    ],
)
def test_a_loss(outputs, expected):
    assert total(outputs) == expected


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_loss_that_refuses_what_is_no_number(value, model):
    """As fvcore's GIoU of boxes that are NaN; by any other statistics it is the model's error."""

    def call(model, batch):
        found = loss(model, batch)
        assert found["loss"].isfinite(), "bad box"
        return found

    model[4].running_var[0] = value
    report = examine(model, batches(48, seed=2), call=call, evaluate=True)
    assert report.tried[0].before == math.inf and report.tried[0].after < 1.5
    model[4].running_var[0] = 1.0
    with torch.no_grad():
        model[9].weight[0, 0] = math.nan
    with pytest.raises(AssertionError, match="bad box"):
        examine(model, batches(48, seed=2), call=call, evaluate=True)


def test_an_error_that_is_not_of_statistics(model):
    """Though some are NaN, of a layer that nothing uses."""
    model.unused = nn.BatchNorm2d(3)
    model.unused.running_mean.fill_(math.nan)

    def call(model, batch):
        if not model[8].training:  # where losses are compared
            raise KeyError("a mistake")
        return loss(model[:10], batch)

    with pytest.raises(KeyError, match="a mistake"):
        examine(model, batches(48, seed=2), call=call, evaluate=True)


def test_a_refusal_that_is_told_as_another_error(model):
    """As the commands tell what a user's function raises."""

    def call(model, batch):
        found = loss(model, batch)
        if not found["loss"].isfinite():
            raise InputError("--call: the model cannot be called") from AssertionError("bad box")
        return found

    model[4].running_mean[0] = math.nan
    report = examine(model, batches(48, seed=2), call=call, evaluate=True)
    assert report.tried[0].before == math.inf and report.tried[0].after < 1.5


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"call": lambda m, b: m(b[0])}, r"gives a tensor of shape \(16, 4\); to evaluate, it has"),
        ({"call": lambda m, b: [m(b[0])][1:]}, "gives a list; to evaluate"),
        ({"num_iters": 4}, "num_iters: 4 is not accepted; to evaluate, use 5 or more"),
        ({"batches": None}, "evaluate: True is not accepted without batches"),
        ({"batches": batches(5, seed=2)}, "batches: 5 are too few to evaluate, which takes 6"),
        ({"batches": []}, "batches: 0 are too few to evaluate, which takes 6"),
    ],
)
def test_what_cannot_be_evaluated(kwargs, words, model):
    arguments = {"batches": batches(20, seed=2), "call": loss, **kwargs}
    state = state_of(model)
    with pytest.raises(InputError, match=words):
        examine(model, evaluate=True, **arguments)
    assert_same(model, state)


def test_a_batch_that_tells_nothing(model):
    """Of which no image has a label: its loss is NaN whatever the statistics are."""
    model[4].running_mean += 1.5 * model[4].running_var.sqrt()
    data = batches(48, seed=2)
    expected = examine(model, data[:5] + data[6:], call=loss, evaluate=True)
    data[5] = (data[5][0], torch.full_like(data[5][1], -100))
    report = examine(model, data, call=loss, evaluate=True)
    assert rules(report) == rules(expected) and "BN301" in rules(report)
    (found,) = [of for of in report.findings if of.rule == "BN301"]
    assert "on 15 batches apart" in found.why and "; 1 more have no finite loss" in found.why
    (tried,) = report.tried
    assert tried.helps and math.isfinite(tried.before) and report.verdict.startswith("statistics, ")


def test_what_helps_is_not_said_to_be_none_of_it(model):
    """Beside a first finding that prescribes other things than statistics."""
    before = float(model[4].running_mean.mean())
    model[4].running_mean += 3 * model[4].running_var.sqrt()

    def score(model):
        return 50 - 10 * abs(float(model[4].running_mean.mean()) - before)

    few = [(x[:2], y[:2]) for x, y in batches(48, seed=2)]
    report = examine(model, few, call=loss, evaluate=True, score=score, rules=["BN502"])
    assert [of.rule for of in report.findings] == ["BN502"] and report.tried[0].helps
    assert report.verdict.endswith(f"; and {report.tried[0]}")
