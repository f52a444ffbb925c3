"""What a caller gives examine, and does with the model and the batches, makes no other verdict."""

import math

import pytest
import torch
from torch import nn

import bn_det
from bn_det import examine
from bn_det.doctor import RULES
from bn_det.doctor.findings import Finding, Tried, make_report
from bn_det.doctor.prescriptions import FROZEN, RECOMPUTED
from bn_det.errors import InputError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )

    def forward(self, x):
        return self.body(x).mean((1, 2, 3))


def batches(number=12, seed=1):
    """Of pixels that a caller is to normalize."""
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(4, 3, 12, 12, generator=generator) + 2 for _ in range(number)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for x in batches(60, seed=2):
            model((x - 2) / 3)
    return model


def loss(model, x):
    return model((x - 2) / 3).square().mean()


def in_place(model, x):
    return model(x.sub_(2).div_(3)).square().mean()


def of_one_buffer():
    buffer = torch.empty(4, 3, 12, 12)
    for batch in batches():
        yield buffer.copy_(batch)


@pytest.mark.parametrize("frozen", [False, True])
def test_batches_that_change(frozen, model):
    """Each pass sees a batch as the loader gave it; also those that are run again for a frozen."""
    if frozen:
        bn_det.freeze(model, "body.1")
        model.body[1].running_mean += 5
    expected = examine(model, batches(), call=loss, evaluate=True)
    assert any(of.name == FROZEN.name for of in expected.tried) == frozen
    for given, call in (
        (batches(), in_place),
        (of_one_buffer(), loss),
        (of_one_buffer(), in_place),
    ):
        assert examine(model, given, call=call, evaluate=True) == expected


def test_a_batch_of_which_there_is_no_copy(model):
    def call(model, batch):
        return loss(model, next(batch))

    with pytest.raises(InputError, match="a list_iterator is given|a generator is given"):
        examine(model, ((x for x in [x]) for x in batches()), call=call, evaluate=True)


@pytest.mark.parametrize(
    ("mode", "evaluate", "where"),
    [
        ("eval", False, "the model into evaluation"),
        ("train", True, "body.1 into training"),
        ("eval", True, "the model into evaluation"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_call_that_sets_the_mode(whole, mode, evaluate, where, model):
    def call(model, x):
        getattr(model, mode)()
        return (model(x) if whole else model.body(x)).square().mean()

    was = [of.training for of in model.modules()]
    with pytest.raises(InputError, match=f"^call: it puts {where} mode; call the model"):
        examine(model, batches(), call=call, evaluate=evaluate)
    assert [of.training for of in model.modules()] == was


def test_modes_that_the_model_sets_are_its_own(model):
    """Such as of a teacher in it."""

    class Student(Net):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher

        def forward(self, x):
            with torch.no_grad():
                self.teacher.eval()(x)
            return super().forward(x)

    report = examine(Student(model), batches(), call=loss)
    assert "fit the weights" in report.verdict or "BN2" in report.verdict


def test_gradients_that_a_call_leaves(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second, *_ = model.parameters()
    first.grad = torch.ones_like(first)

    def step(model, x):
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=False)
            found = loss(model, x)
            found.backward()
            optimizer.step()
        return found

    before = {name: value.clone() for name, value in model.state_dict().items()}
    examine(model, batches(), call=step)
    assert torch.equal(first.grad, torch.ones_like(first)) and second.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_learns(model):
    """That frozen layers are looked at thawed, and what a call does, changes no parameter."""
    bn_det.freeze(model, "body.1")

    def call(model, x):
        model.body[3].requires_grad_(False)
        model.body[1].requires_grad_(True)
        return loss(model, x)

    learn = [parameter.requires_grad for parameter in model.parameters()]
    for of_call in (loss, call):
        examine(model, batches(24), call=of_call, evaluate=True)
        assert [parameter.requires_grad for parameter in model.parameters()] == learn


def test_layers_of_mean_deviations():
    model = nn.Sequential(bn_det.L1BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    for x in batches(60, seed=2):
        model(x)
    words = "; not seen on images: 0, which has mean absolute deviations, and no variances"
    assert examine(model, batches()).verdict.endswith(words)
    verdict = examine(model[:1], batches()).verdict
    assert verdict == f"nothing is wrong with the state of its 1 BatchNorm layer{words}"


@pytest.mark.parametrize("number", [2, 7, 8])
def test_few_batches(number, model):
    few = f"; {number} batches are few to tell a fault from chance, and for statistics of them: 8"
    assert (few in examine(model, batches(number), call=loss).verdict) == (number < 8)


@pytest.mark.parametrize("measure", ["loss", "AP"])
def test_what_is_never_finite_judges_nothing(measure, model):
    def call(model, x):
        return loss(model, x) * (math.nan if measure == "loss" else 1.0)

    score = (lambda _: math.nan) if measure == "AP" else None
    report = examine(model, batches(24), call=call, evaluate=True, score=score)
    words = f"; the {measure} is NaN or infinite by any statistics, so that they cannot be judged"
    assert words in report.verdict


@pytest.mark.parametrize(
    "made",
    [
        torch.jit.script,
        lambda model: torch.jit.trace(model.eval(), torch.randn(2, 3, 12, 12)),
        lambda model: torch.export.export(model, (torch.randn(2, 3, 12, 12),)).module(),
    ],
    ids=["scripted", "traced", "exported"],
)
def test_layers_that_are_no_modules(made, model):
    made = made(model)
    healthy = "nothing is wrong with the state of its 2 BatchNorm layers"
    assert examine(made).verdict == healthy
    words = f"{healthy}; not seen on images: body.1 and 1 more, of a class ("
    assert examine(made, batches()).verdict.startswith(words)


def test_a_part_that_is_scripted(model):
    """It is in evaluation mode where losses are compared, and stays as it is."""

    class Around(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.norm = body, nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.body(x)).mean((1, 2, 3))

    whole = Around(model.body)
    with torch.no_grad():
        for x in batches(60, seed=3):
            whole((x - 2) / 3)
    with torch.no_grad(), bn_det.evaluated_losses(whole):
        expected = loss(whole, batches()[0])
    whole.body = torch.jit.script(whole.body)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with torch.no_grad(), bn_det.evaluated_losses(whole):
        assert loss(whole, batches()[0]) == pytest.approx(expected.item(), rel=1e-5)
    verdict = examine(whole, batches(), call=loss, evaluate=True).verdict
    assert "; not seen on images: body.1 and 1 more, of a class (BatchNorm2d)" in verdict
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


def test_nothing_is_seen_of_empty_batches(model):
    nothing = [torch.zeros(0, 3, 12, 12)] * 12
    with pytest.raises(InputError, match="^batches: no batch has a value for any of the layers"):
        examine(model, nothing)
    report = examine(model, nothing[:6] + batches(8), call=loss)
    assert report.verdict.endswith("on 8 batches")


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("model", "resnet", "a torch.nn.Module"),
        ("model", None, "a torch.nn.Module"),
        ("batches", 5, "a data loader, or a list of batches"),
        ("batches", "abc", "a data loader, or a list of batches"),
        ("target", 5, "a data loader, or a list of batches"),
        ("call", "loss", "a function of the model and a batch"),
        ("score", 1.5, "a function of the model"),
        ("step", 2, "a bn_det.doctor.Step"),
        ("optimizer", "SGD", "a torch.optim.Optimizer"),
    ],
)
def test_arguments_of_another_type(key, value, accepted, model):
    given = {"model": model, "batches": batches(), key: value}
    kind = type(value).__name__
    with pytest.raises(
        InputError, match=f"^{key}: what is given is of type {kind}; use {accepted}$"
    ):
        examine(**given)


@pytest.mark.parametrize("scored", [None, "high", [1.0, 2.0]])
def test_a_score_that_is_no_number(scored, model):
    with pytest.raises(InputError, match="^score: gives a .*; it has to give a number"):
        examine(model, batches(), call=loss, score=lambda _: scored, evaluate=True)


@pytest.mark.parametrize("momentum", [-1.0, 2.0, math.nan, math.inf])
def test_a_momentum_that_is_no_weight(momentum, model):
    model.body[4].momentum = momentum
    (finding,) = [
        of for of in examine(model, batches(), call=loss).findings if of.severity != "note"
    ]
    assert finding.rule == "BN403" and "no weight of a mean, 0 to 1" in finding.why


def test_tensors_of_inference_mode():
    torch.manual_seed(0)
    with torch.inference_mode():
        model = Net().train()
        for x in batches(60, seed=2):
            model((x - 2) / 3)
    assert "fit the weights" in examine(model, batches(), call=loss).verdict


@pytest.mark.parametrize(
    ("gain", "words"),
    [(3.2, "too few batches to tell whether this helps"), (-3.2, "but this does not help")],
)
def test_what_chance_may_explain_is_not_called_useless(gain, words):
    finding = Finding("BN201", "error", ("a",), 1.0, "why", "a treatment")
    tried = Tried(RECOMPUTED.name, ("BN201",), "loss", 3.5, 3.5 - gain, gain, 0.1, False, False, "")
    report = make_report([finding], RULES, "healthy", tried=[tried])
    assert f", in a (BN201); {words}" in report.verdict


def test_any_number_of_batches(model):
    assert "fit the weights" in examine(model, batches(), 10**30, call=loss, progress="log").verdict
