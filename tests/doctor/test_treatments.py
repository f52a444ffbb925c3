"""What mends a model: each treatment against its definition, and what is left of a failure."""

import copy
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bn_det
from bn_det import DomainBatchNorm2d, examine
from bn_det.doctor import RULES
from bn_det.doctor.evaluation import keep_best
from bn_det.doctor.findings import Finding, Tried, how_much, make_report
from bn_det.doctor.prescriptions import RECOMPUTED
from bn_det.doctor.treatments import Treatment

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = ((12, 1.0, 0.0), (6, 2.0, 3.0), (3, 0.5, -3.0))
"""Size, contrast and brightness of each."""


class Head(nn.Module):
    """Convolution, norm and ReLU on three levels that differ, which share all of it."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        levels = [self.conv(contrast * x[..., :k, :k] + light) for k, contrast, light in LEVELS]
        is_list = isinstance(self.norm, DomainBatchNorm2d)
        levels = self.norm(levels) if is_list else [self.norm(level) for level in levels]
        return [self.out(F.relu(level)).mean((2, 3)) for level in levels]


def batches(number, seed=2):
    """Images of one color, which is their class, or of none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        classes = torch.randint(4, (16,), generator=generator)
        images = 0.7 * torch.randn(16, 3, 12, 12, generator=generator)
        for image, k in zip(images, classes.tolist(), strict=True):
            image[k:][:1] += 0.5
        found.append((images, classes))
    return found


def loss(model, batch):
    images, classes = batch
    return [F.cross_entropy(scores, classes) for scores in model(images)]


def trained(model):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
    for batch in batches(60, seed=1):
        optimizer.zero_grad()
        sum(loss(model, batch)).backward()
        optimizer.step()
    return model.eval()


def with_shared():
    return DomainBatchNorm2d(8, 3, population="shared")


NORMS = {"a list": with_shared, "calls": lambda: nn.BatchNorm2d(8)}


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    return {kind: trained(Head(norm())) for kind, norm in NORMS.items()}


@pytest.fixture(params=NORMS)
def kind(request):
    return request.param


@pytest.fixture
def model(heads, kind):
    return copy.deepcopy(heads[kind])


def passes(data):
    """Those of the batches that are not held apart."""
    return [batch for k, batch in enumerate(data) if k % 3 != 2]


def losses(model, data):
    with torch.no_grad():
        return [float(sum(loss(model, batch))) for batch in data]


def mean(values):
    return sum(values) / len(values)


def levels_of(model, data):
    """What the norm sees of each level in training mode: shape (8, number of values)."""
    model, seen = copy.deepcopy(model).train(), [[], [], []]
    with torch.no_grad():
        for images, _ in data:
            for k, (size, contrast, light) in enumerate(LEVELS):
                y = model.conv(contrast * images[..., :size, :size] + light)
                seen[k].append(y.transpose(0, 1).flatten(1).double())
    return [torch.cat(of_level, 1) for of_level in seen]


def with_own_statistics(model, data):
    """The same head with a norm that has statistics for each level, by their definition."""
    reference = Head(DomainBatchNorm2d(8, 3))
    reference.load_state_dict(model.state_dict(), strict=False)
    for k, values in enumerate(levels_of(model, data)):
        of_level = reference.norm.population_of(k)
        of_level.running_mean.copy_(values.mean(1))
        of_level.running_var.copy_(values.var(1, correction=0))
    return reference.eval()


def named(report):
    return {of.name: of for of in report.tried}


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_it_was(model, before, layers):
    """Values, keys, classes, attributes and hooks."""
    state = model.state_dict()
    assert list(state) == list(before)
    for name, value in state.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == layers


def layers_of(model):
    return [(type(m), dict(vars(m))) for m in model.modules()]


def test_statistics_for_each_level(model, kind):
    """Kept where the layer takes a list of levels; elsewhere what it would bring is told."""
    data = batches(48)
    held = [batch for k, batch in enumerate(data) if k % 3 == 2]
    expected = with_own_statistics(model, passes(data))
    before, weight = mean(losses(model, held)), model.norm.weight
    report = examine(model, data, call=loss, treat=True)
    tried = named(report)["recomputed statistics, for each level its own"]
    assert tried.before == pytest.approx(before, rel=1e-5)
    assert tried.after == pytest.approx(mean(losses(expected, held)), rel=1e-4)
    assert tried.helps and tried.gain > named(report)["recomputed statistics"].gain > 0
    found = {of.rule: of for of in report.findings}
    assert found["BN202"].gain == tried.gain and found["BN202"].severity == "error"
    # What each level's statistics mend does not show that the model reads its batch.
    assert "BN303" not in found
    assert report.verdict.startswith("statistics, not weights: levels or sources that differ share")
    if kind == "calls":
        assert not tried.kept and named(report)["recomputed statistics"].kept
        assert "call a bn_det.DomainBatchNorm2d" in tried.needs
        assert type(model.norm) is nn.BatchNorm2d
        return
    assert tried.kept and "population per_domain" in report.verdict
    assert model.norm.weight is weight and not model.norm.training
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert mean(losses(model, batches(16, 3))) == pytest.approx(
        mean(losses(expected, batches(16, 3))), rel=1e-4
    )
    assert "BN202" not in [of.rule for of in examine(model, batches(48, 3), call=loss).findings]


class FrozenHead(Head):
    """With a normalization of the images, that no training moves."""

    def __init__(self, norm):
        super().__init__(norm)
        self.stem = bn_det.freeze(nn.BatchNorm2d(3))

    def forward(self, x):
        return super().forward(self.stem(x))


@pytest.mark.parametrize("norm", NORMS)
def test_levels_that_share_behind_frozen_statistics(norm):
    """Both are mended together, where there is a place for statistics of each level."""
    model = trained(FrozenHead(NORMS[norm]()))
    model.stem.running_mean.fill_(3.0)
    data = batches(48)
    expected = FrozenHead(DomainBatchNorm2d(8, 3))
    expected.load_state_dict(model.state_dict(), strict=False)
    bn_det.update_bn_stats(expected, passes(data), 32, call=loss, frozen=True, initial=True)
    report = examine(model, data, call=loss, treat=True)
    assert {"BN202", "BN304"} <= {of.rule for of in report.findings}
    both = "recomputed statistics, for each level its own, of frozen layers, too"
    if norm == "calls":
        assert both not in named(report)
        return
    tried = named(report)[both]
    assert tried.rules == ("BN202", "BN304") and tried.kept and tried.needs
    assert tried.gain == max(of.gain for of in report.tried)
    held = [batch for k, batch in enumerate(data) if k % 3 == 2]
    assert tried.after == pytest.approx(mean(losses(expected.eval(), held)), rel=1e-4)
    assert state_of(model).keys() == state_of(expected).keys()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_nothing_changes_where_a_treatment_fails(model, kind):
    """In the midst of a score, when the model has other layers or hooks."""
    before, layers = state_of(model), layers_of(model)

    def score(model):
        norm = model.norm
        if getattr(norm, "population", "") == "per_domain" or norm._forward_pre_hooks:
            raise ZeroDivisionError
        return 50.0

    with pytest.raises(ZeroDivisionError):
        examine(model, batches(48), call=loss, treat=True, score=score)
    assert_as_it_was(model, before, layers)


def test_what_harms_is_not_kept(model, kind):
    """Whatever the loss says: a score of those that have other statistics is lower."""
    before, layers = state_of(model), layers_of(model)
    own = model.norm.running_mean.clone()

    def score(model):
        mean = getattr(model.norm, "running_mean", None)
        return 50.0 if mean is not None and mean.equal(own) else 40.0

    report = examine(model, batches(48), call=loss, treat=True, score=score)
    assert [(of.gain, of.helps, of.kept) for of in report.tried] == [(-10.0, False, False)] * 2
    assert "but this does not help: " in report.verdict
    assert "mend: tried, and no help here: " in str(report)
    assert_as_it_was(model, before, layers)


def test_a_treatment_that_fails_half_way_is_undone(heads):
    model = copy.deepcopy(heads["a list"])
    before, layers = state_of(model), layers_of(model)

    def apply(model):
        model.norm.running_mean += 1
        bn_det.convert_batchnorm(model, lambda n: DomainBatchNorm2d(n, 3), "norm")
        raise MemoryError

    tried = Tried("any", ("BN201",), "AP", 1.0, 2.0, 1.0, None, True, False, "")
    with pytest.raises(MemoryError):
        keep_best(model, [tried], [Treatment(RECOMPUTED, apply)], {"BN201"})
    assert_as_it_was(model, before, layers)


@pytest.mark.parametrize("gain", [0.5, 9.0])
def test_what_recomputed_statistics_win_is_not_healthy(gain):
    """Though chance may explain all that passes and losses of few batches show."""
    tried = Tried("recomputed statistics", (), "AP", 37.0, 37.0 + gain, gain, None, True, False, "")
    report = make_report([], RULES, "nothing is wrong", tried=[tried])
    assert ("nothing is wrong" in report.verdict) == (gain < 1)
    assert report.verdict.endswith(str(tried))


@pytest.mark.parametrize(
    "value, words", [(1.5, "1.5 ± 0.2 standard deviations"), (1.4e9, "more than 1000 standard")]
)
def test_a_distance_that_tells_nothing_is_no_number(value, words):
    finding = Finding("BN201", "error", ("a",), value, "why", "treatment", 0.2)
    assert how_much(finding).startswith(words)


def classifier(eps=1e-5, momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, eps, momentum),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16, eps, momentum),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def one_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def trained_classifier(model, loss=one_loss):
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    for batch in batches(60, seed=1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    return model


def darker(data):
    return [(2 * images + 3, classes) for images, classes in data]


def test_frozen_statistics():
    model = bn_det.freeze(trained_classifier(classifier()), "1")
    data = darker(batches(48))
    expected = copy.deepcopy(model).train()
    bn_det.update_bn_stats(expected, passes(data), 32, call=one_loss, frozen=True)
    report = examine(model, data, call=one_loss, treat=True)
    tried = named(report)["recomputed statistics, of frozen layers, too"]
    assert tried.rules == ("BN304",) and tried.kept and tried.gain > 0.1
    assert next(of for of in report.findings if of.rule == "BN304").gain == tried.gain
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert isinstance(model[1], bn_det.FrozenBatchNorm)


def test_frozen_statistics_that_cannot_be_tried():
    """Some that look folded: what would be written beside their affine is another function."""
    model = bn_det.freeze(trained_classifier(classifier()), "1")
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].running_var.fill_(1)
        model[1].num_batches_tracked.zero_()
    report = examine(model, darker(batches(48)), call=one_loss, evaluate=True)
    found = {of.rule: of for of in report.findings}
    assert found["BN304"].gain is None
    assert found["BN304"].untried.startswith("it could not be tried: update_bn_stats: 1 has mean 0")
    assert [of.name for of in report.tried] == ["recomputed statistics"]


def test_values_of_the_start():
    """Statistics of a momentum of 0.01 after 40 batches are two thirds those of a new layer."""
    model = trained_classifier(classifier(momentum=0.01))
    for layer in (model[1], model[4]):
        layer.reset_running_stats()
    seen = []
    model[1].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for images, _ in batches(40, seed=5):
            model(images)
    model[1]._forward_pre_hooks.clear()
    weights = torch.tensor([0.01 * 0.99 ** (39 - k) for k in range(40)])
    weights /= weights.sum()
    means = sum(w * x.mean((0, 2, 3)) for w, x in zip(weights, seen, strict=True))
    variances = sum(w * x.var((0, 2, 3)) for w, x in zip(weights, seen, strict=True))
    model.eval()
    statistics = []

    def score(model):
        statistics.append((model[1].running_mean.clone(), model[1].running_var.clone()))
        return 0.0

    report = examine(model, batches(48), call=one_loss, evaluate=True, score=score)
    assert [of.name for of in report.tried][1:] == ["statistics without the start's values"]
    found = {of.rule: of for of in report.findings}
    assert found["BN106"].value == pytest.approx(0.99**40)
    torch.testing.assert_close(statistics[-1][0], means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics[-1][1], variances, rtol=1e-4, atol=1e-5)
    by_loss = named(examine(model, batches(48), call=one_loss, evaluate=True))
    assert all(of.helps for of in by_loss.values())
    # A counter that is not theirs would have taken more than there is of the start.
    for layer in (model[1], model[4]):
        layer.num_batches_tracked.fill_(1)
    report = examine(model, batches(48), call=one_loss, evaluate=True)
    assert [of.name for of in report.tried] == ["recomputed statistics"]


def agreement_with(expected):
    """A score: 100 where outputs are those of another model, 1 less for each hundredth."""
    images, _ = batches(1, 4)[0]

    @torch.no_grad()
    def score(model):
        return 100 - 100 * float((model(images) - expected(images)).abs().max())

    return score


def test_another_eps():
    """A model whose first layer sees little of half its channels, loaded with a smaller eps."""
    expected = classifier(eps=1e-3)
    with torch.no_grad():
        expected[0].weight[:4] *= 0.02
    expected[0].requires_grad_(False)
    trained_classifier(expected)
    bn_det.update_bn_stats(expected, batches(32, 5), 32, call=one_loss)
    expected.eval()
    model = copy.deepcopy(expected)
    for layer in (model[1], model[4]):
        layer.eps = 1e-5
    agreement = agreement_with(expected)
    report = examine(model, batches(48), call=one_loss, treat=True, score=agreement)
    tried = named(report)["eps 0.001"]
    assert tried.before < 90 and tried.after == pytest.approx(100, abs=1e-2)
    assert tried.rules == ("BN110",) and tried.kept and "eps 0.001" in report.verdict
    assert next(of for of in report.findings if of.rule == "BN110").severity == "error"
    images, _ = batches(1, 4)[0]
    torch.testing.assert_close(model(images), expected(images))
    report = examine(expected, batches(48), call=one_loss, evaluate=True)
    assert "eps 0.001" not in named(report) and named(report)["eps 1e-05"].gain < 0
    assert next(of for of in report.findings if of.rule == "BN110").severity == "note"


def test_an_eps_that_is_too_large():
    """In all layers, so that none differs from the others; statistics alone do not mend it."""
    expected = trained_classifier(classifier())
    bn_det.update_bn_stats(expected, batches(32, 5), 32, call=one_loss)
    expected.eval()
    model = copy.deepcopy(expected)
    for layer in (model[1], model[4]):
        layer.eps = 0.1
    agreement = agreement_with(expected)
    (of_state,) = examine(model).findings
    assert (of_state.rule, of_state.severity) == ("BN110", "warning")
    assert of_state.why.startswith("eps is 0.1, larger than usual ones; ")
    assert not examine(expected).findings
    report = examine(model, batches(48), call=one_loss, treat=True, score=agreement)
    tried = named(report)["eps 1e-05"]
    assert tried.before < 90 and tried.after == pytest.approx(100, abs=1e-2)
    assert tried.rules == ("BN110",)
    assert tried.needs == "give its layers eps 1e-05, where the model is made"
    found = next(of for of in report.findings if of.rule == "BN110")
    assert found.severity == "error" and found.gain == tried.gain > report.tried[0].gain
    # A file has no place for it: what is kept is the best of the others.
    assert [of.name for of in report.tried if of.kept] == ["recomputed statistics"]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_price_is_told_and_paid(frozen, caplog):
    model, number = trained_classifier(classifier()).eval(), [0]
    if frozen:
        bn_det.freeze(model, "1")

    def call(model, batch):
        if not number[0]:
            said.append(caplog.text)
        number[0] += 1
        return one_loss(model, batch)

    said = []
    with caplog.at_level(logging.INFO, "bn_det.doctor"):
        report = examine(model, batches(48), call=call, evaluate=True, progress="log")
    assert not [of for of in report.findings if of.severity != "note"]
    (before,) = said
    looked, held, each = map(
        int, re.search(r"look: (\d+) batches.*: (\d+) batches more, (\d+) passes", before).groups()
    )
    # One tells whether the model sees other samples in evaluation, which this one does not.
    assert number[0] == looked + held * each + 1
    assert "num_iters" in before and "the first batch took" not in before
    assert "the first batch took" in caplog.text


def test_what_was_not_tried_is_called_so():
    model = trained_classifier(classifier()).eval()
    model[4].running_mean += 5
    report = examine(model, batches(48), call=one_loss)
    (found,) = [of for of in report.findings if of.rule == "BN201"]
    assert found.gain is None and found.untried.startswith("it may harm where ")
    assert f"; untried: {found.treatment}" in report.verdict
    assert f"mend: untried: {found.treatment}\n  {found.untried}" in str(report)


@pytest.mark.parametrize("has_score", [False, True])
def test_an_eps_of_one_layer(has_score):
    """It is an error where one eps in all layers mends the model, and recomputing does not."""
    expected = trained_classifier(classifier())
    bn_det.update_bn_stats(expected, batches(32, 5), 32, call=one_loss)
    expected.eval()
    model = copy.deepcopy(expected)
    model[4].eps = 1.0
    (found,) = [of for of in examine(model).findings if of.rule == "BN404"]
    assert found.severity == "note" and found.where == ("4",)
    score = agreement_with(expected) if has_score else None
    report = examine(model, batches(48), call=one_loss, evaluate=True, score=score)
    tried = named(report)["eps 1e-05"]
    assert "BN404" in tried.rules and tried.gain > 0
    found = next(of for of in report.findings if of.rule == "BN404")
    assert found.severity == "error" and found.gain == tried.gain > report.tried[0].gain


def test_a_gain_of_an_eps_that_is_none():
    """By a score, whose chance is not known, what brings less than 1 makes no error."""
    expected = trained_classifier(classifier())
    bn_det.update_bn_stats(expected, batches(32, 5), 32, call=one_loss)
    model = copy.deepcopy(expected.eval())
    model[4].eps = 0.1

    def score(model):
        return 0.01 * agreement_with(expected)(model)

    report = examine(model, batches(48), call=one_loss, evaluate=True, score=score)
    assert 0 < named(report)["eps 1e-05"].gain < 1
    assert next(of for of in report.findings if of.rule == "BN404").severity == "note"


def test_layers_of_two_eps_on_purpose():
    """A larger eps is certain to gain a little; it is less than the noise of an EMA makes."""
    model = trained_classifier(classifier())
    bn_det.update_bn_stats(model, batches(32, 5), 32, call=one_loss)
    model[4].eps = 1e-3

    def loss(model, batch):
        return model(batch[0]).square().mean()

    before = copy.deepcopy(model.state_dict())
    report = examine(model, batches(48), call=loss, treat=True)
    tried = named(report)["eps 0.001"]
    assert tried.helps and not tried.kept and tried.gain > max(0, report.tried[0].gain)
    assert next(of for of in report.findings if of.rule == "BN404").severity == "note"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_loss_that_is_infinite_by_any_statistics():
    """With treatments of their own to try, which nothing can be told of."""
    model = trained_classifier(classifier())
    model[4].eps = 1e-3

    def loss(model, batch):
        return one_loss(model, batch) + float("inf")

    report = examine(model, batches(48), call=loss, evaluate=True)
    assert "eps 0.001" in named(report)
    assert next(of for of in report.findings if of.rule == "BN404").severity == "note"
