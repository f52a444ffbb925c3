"""update_bn_stats against brute force in float64, and what it must leave alone."""

import copy
import itertools
import json
import random
from collections import deque

import numpy as np
import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats as fvcore_update_bn_stats
from torch import nn

from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    convert_batchnorm,
    ghost_groups,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers import forward_levels
from reference import EIGHT_CHOICES, values

pytestmark = pytest.mark.usefixtures("one_thread")

UNEVEN = (3, 1, 4, 2, 6, 5)


def make_batches(sizes=UNEVEN, shape=(3, 5, 6), mean=0.0):
    return [mean + torch.randn(n, *shape) * (1 + k) for k, n in enumerate(sizes)]


class Model(nn.Module):
    """Layers that are used once, twice, now and then, and never; state of every kind."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.once = norm(4)
        self.twice = norm(4)
        self.sometimes = norm(4)
        self.never = norm(4)
        self.frozen = norm(4).eval()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros(()))
        self.normalizer, self.memory, self.by_name = 100.0, deque(maxlen=3), {"calls": []}

    def forward(self, x):
        self.counter += 1
        self.normalizer = 0.9 * self.normalizer + len(x)
        self.memory.append(len(x))
        self.by_name["calls"].append(len(x))
        x = self.frozen(self.twice(self.once(self.conv(x))).relu())
        if len(x) % 2:
            x = self.sometimes(x)
        return self.drop(self.twice(x + 1))


def seen_by(model, batches):
    """What each BatchNorm gets in training, by name: a list for each batch of its inputs."""
    model, seen = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            record = seen.setdefault(name, [])
            module.register_forward_pre_hook(lambda m, a, record=record: record[-1].append(a[0]))
    for batch in batches:
        for record in seen.values():
            record.append([])
        with torch.no_grad():
            model(batch)
    return seen


def brute_force(inputs, estimator="population_variance"):
    """Mean and variance of all inputs, or the mean of their variances weighted by values."""
    every = values([x.double() for x in inputs])
    if estimator == "population_variance":
        return every.mean(0), every.var(0, correction=0)
    own = [values([x.double()]) for x in inputs]
    return every.mean(0), sum(len(v) * v.var(0) for v in own) / len(every)


def assert_statistics(bn, mean, var, tolerance=1e-6):
    """Up to a part of the standard deviation, and of the variance."""
    assert ((bn.running_mean.double() - mean).abs() <= tolerance * var.sqrt()).all()
    assert ((bn.running_var.double() - var).abs() <= tolerance * var).all()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("estimator", ["population_variance", "mean_of_batch_variances"])
def test_equals_brute_force(norm, estimator):
    model, batches = Model(norm), make_batches()
    seen = seen_by(model if norm is not nn.SyncBatchNorm else _as_bn(model), batches)
    before = copy.deepcopy(model.state_dict())
    report = update_bn_stats(model, batches, len(batches), estimator=estimator)
    for name in ("once", "twice", "sometimes"):
        inputs = list(itertools.chain(*seen[name]))
        # Float32's rounding of a mean or a variance is 6e-8 of it.
        assert_statistics(model.get_submodule(name), *brute_force(inputs, estimator))
        of_layer = next(layer for layer in report.layers if layer.name == name)
        assert of_layer.num_samples == sum(map(len, inputs))
        assert of_layer.num_batches == sum(map(bool, seen[name]))
    assert report.unused == ["never"]
    kept = {k: v for k, v in model.state_dict().items() if k.split(".")[-1] not in RUNNING}
    for name in ("never", "frozen"):
        kept |= {f"{name}.{k}": before[f"{name}.{k}"] for k in RUNNING}
    assert all(torch.equal(v, before[k]) for k, v in kept.items())


RUNNING = ("running_mean", "running_var")


def _as_bn(model):
    return convert_batchnorm(copy.deepcopy(model), nn.BatchNorm2d)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_dimensions(dim):
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dim](8)
    weight = norm.weight.clone()
    batches = make_batches([16] * 4, (8, 6, 5, 4)[: dim + 1])
    update_bn_stats(norm, itertools.cycle(batches), 20)
    assert_statistics(norm, *brute_force(batches))
    assert torch.equal(norm.weight, weight)


def test_equals_fvcore():
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), make_batches()
    theirs = copy.deepcopy(model)
    fvcore_update_bn_stats(theirs, batches, len(batches))
    update_bn_stats(model, batches, len(batches))
    # Theirs is E[x^2] - E[x]^2 in float32.
    torch.testing.assert_close(model[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(model[1].running_var, theirs[1].running_var)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d])
def test_large_mean(norm):
    """Where E[x^2] - E[x]^2 in float32 is off by a tenth."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        batches = [
            x.contiguous(memory_format=memory_format) for x in make_batches([4] * 6, mean=1e3)
        ]
        bn, theirs = norm(3), nn.BatchNorm2d(3)
        update_bn_stats(bn, batches, 6)
        mean, var = brute_force(batches)
        assert ((bn.running_mean - mean).abs() <= 1e-7 * mean).all()  # a float32 holds no more
        assert ((bn.running_var - var).abs() <= 1e-6 * var).all()
        fvcore_update_bn_stats(theirs, batches, 6)
        assert ((theirs.running_var - var).abs() > 1e-3 * var).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    bn = nn.BatchNorm2d(3, dtype=torch.float64 if dtype == torch.float64 else None)
    batches = [x.to(dtype) for x in make_batches()]
    update_bn_stats(bn, batches, len(batches))
    mean, var = brute_force(batches)
    assert_statistics(bn, mean, var, 1e-12 if dtype == torch.float64 else 1e-6)


class Levels(nn.Module):
    def __init__(self, choices, **others):
        super().__init__()
        statistics, population, affine = choices
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))
        self.norms = nn.ModuleList(
            DomainBatchNorm2d(
                3, 2, statistics=statistics, population=population, affine=affine, **others
            )
            for _ in range(2)
        )

    def forward(self, xs):
        layers = [layer for pair in zip(self.convs, self.norms, strict=True) for layer in pair]
        return forward_levels(layers, xs)


@pytest.mark.parametrize("ghost_size", [None, 2])
@pytest.mark.parametrize("choices", EIGHT_CHOICES)
def test_domains(choices, ghost_size):
    """Per domain under the scheme that will use them; shared as in training."""
    model = Levels(choices, ghost_size=ghost_size)
    batches = [(x, 3 + 2 * x[:, :, ::2]) for x in make_batches()]
    scheme = copy.deepcopy(model)
    for norm in scheme.norms:
        norm.statistics = "per_domain" if choices[1] == "per_domain" else choices[0]
    seen = seen_by(scheme, batches)
    update_bn_stats(model, batches, len(batches))
    for k, norm in enumerate(model.norms):
        levels = list(zip(*(xs for (xs,) in seen[f"norms.{k}"]), strict=True))
        if choices[1] == "shared":
            assert_statistics(norm, *brute_force([x for level in levels for x in level]))
        else:
            for domain, level in enumerate(levels):
                assert_statistics(norm.population_of(domain), *brute_force(level))
        assert norm.statistics == choices[0] and not norm._observers


def test_ghost_batches_are_normalization_batches():
    bn, batches = BatchNorm2d(3, ghost_size=2), make_batches((4, 5))
    update_bn_stats(bn, batches, 2, estimator="mean_of_batch_variances")
    ghosts = [batches[0][:2], batches[0][2:], batches[1][:2], batches[1][2:]]
    assert_statistics(bn, *brute_force(ghosts, "mean_of_batch_variances"))


def test_arguments_that_are_named():
    """Also in a block that adds one."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = DomainBatchNorm2d(3, 2)

        def forward(self, x):
            return self.norm(xs=[x, x])

    model, batches = Model().train(), [torch.randn(4, 3, 5, 5) for _ in range(3)]
    with ghost_groups(model, torch.tensor([0, 1, 0, 1])):
        report = update_bn_stats(model, batches, 3)
    assert report.num_samples == 12


def test_empty_inputs():
    bn, batches = nn.BatchNorm2d(3), make_batches((0, 3, 0, 2))
    report = update_bn_stats(bn, batches, 4)
    assert_statistics(bn, *brute_force(batches))
    assert report.layers[0].num_batches == 2
    before = copy.deepcopy(bn.state_dict())
    report = update_bn_stats(bn, batches[:1], 1)
    assert not report.layers and report.unused == [""]
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())


def state_of(model):
    """All that a caller can see of a model, and of the random numbers to come."""
    return (
        copy.deepcopy(model.state_dict()),
        {n: (m.training, getattr(m, "momentum", None)) for n, m in model.named_modules()},
        [len(v) for m in model.modules() for v in vars(m).values() if isinstance(v, dict)],
        [sorted(vars(m)) for m in model.modules()],
        (model.normalizer, list(model.memory), list(model.by_name["calls"])),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    )


def assert_same_state(model, before, but_statistics=False):
    after = state_of(model)
    for name, value in after[0].items():
        if not (but_statistics and name.split(".")[-1] in RUNNING):
            assert torch.equal(value, before[0][name]), name
    assert after[1:5] == before[1:5]
    assert torch.equal(after[5][0], before[5][0]) and after[5][1:] == before[5][1:]


class Failing(Model):
    """Fails in the middle of its 3rd pass, after it has changed what it can."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        with torch.no_grad():
            self.conv.weight.mul_(1.5)
        self.once.momentum = None
        self.new, self.twice.hook = 1, self.twice.register_forward_hook(lambda *_: None)
        self.eval()
        self.train()
        self.frozen.eval()
        random.random(), np.random.rand(), torch.rand(1)
        x = super().forward(x)
        if len(self.by_name["calls"]) == 3 or self.counter >= 3:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("oh"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failing_model_is_left_as_it_was(error):
    model, batches = Failing(error), make_batches()
    before = state_of(model)
    with pytest.raises(type(error)):
        update_bn_stats(model, batches, len(batches))
    assert_same_state(model, before)


@pytest.mark.parametrize("error", [OSError("oh"), KeyboardInterrupt()])
def test_a_failing_loader_changes_nothing(error):
    model, batches = Model(), make_batches()

    def loader():
        yield from batches[:3]
        random.random(), np.random.rand(), torch.rand(1)
        raise error

    before = state_of(model)
    with pytest.raises(type(error)):
        update_bn_stats(model, loader(), len(batches))
    assert_same_state(model, before)


def test_an_interrupted_write_writes_nothing(monkeypatch):
    model = Model()
    before, batches = state_of(model), make_batches()

    class Interrupted(torch.Tensor):
        def copy_(self, *_):
            raise KeyboardInterrupt

    model.twice.running_var = model.twice.running_var.as_subclass(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_bn_stats(model, batches, len(batches))
    model.twice.running_var = model.twice.running_var.as_subclass(torch.Tensor)
    torch.testing.assert_close(model.once.running_mean, before[0]["once.running_mean"])
    assert_same_state(model, (*before[:5], state_of(model)[5]))


def test_success_changes_statistics_only():
    model, batches = Model(), make_batches()
    before, iterator = state_of(model), iter(batches)
    buffers = [id(b) for b in model.buffers()]
    update_bn_stats(model, iterator, len(batches))
    assert_same_state(model, before, but_statistics=True)
    assert [id(b) for b in model.buffers()] == buffers, "in place"
    assert not torch.equal(model.once.running_mean, before[0]["once.running_mean"])


def test_computes_what_training_computes():
    """Dropout included: it is drawn from the same random numbers."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.3),
        BatchNorm2d(4, ghost_size=2),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
    )
    batches, outputs = make_batches([4, 3]), []
    handle = model.register_forward_hook(lambda m, a, y: outputs.append(y))
    torch.manual_seed(1)
    update_bn_stats(model, batches[:1], 1)
    handle.remove()
    torch.manual_seed(1)
    torch.testing.assert_close(outputs[0], model(batches[0]).detach())  # float32's rounding


class Counting(nn.Module):
    """Calls two layers as often as its batch says, then something without a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.finished = []

    def forward(self, batch):
        x, calls = batch
        x = self.first(x)
        for _ in range(calls):
            x = self.last(2 * x + 1)
        FINISHED.append(len(x))
        return x


FINISHED = []


@pytest.mark.parametrize(
    ("calls", "whole"),
    [
        # Numbers 1, 2, 4, 8 and so on run to their end; all do once calls are seen to vary.
        ([2] * 9, [1, 2, 4, 8]),
        ([2, 2, 2, 1, 2, 2, 2, 2, 2], [1, 2, 4, 5, 6, 7, 8, 9]),
        ([0, 2, 1, 1, 3, 1], [1, 2, 3, 4, 5, 6]),
        ([0, 0, 2, 2, 2, 2], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_passes_end_after_the_last_layer(calls, whole):
    model, batches = Counting(), list(zip(make_batches(range(2, 11)), calls, strict=False))
    seen = seen_by(model, batches)
    FINISHED.clear()
    update_bn_stats(model, batches, len(batches))
    for name in ("first", "last"):
        inputs = list(itertools.chain(*seen[name]))
        assert_statistics(model.get_submodule(name), *brute_force(inputs))
    assert [size - 1 for size in FINISHED] == whole


def test_calls_that_are_seen_too_late_are_reported(caplog):
    model, batches = Counting(), list(zip(make_batches([3] * 4), [1, 1, 2, 2], strict=True))
    update_bn_stats(model, batches, 4)
    assert "more often in some batches" in caplog.text


@pytest.mark.parametrize("estimator", ["population_variance", "mean_of_batch_variances"])
@pytest.mark.parametrize("sizes", [[4] * 12, [2, 9] * 6])
def test_standard_error(estimator, sizes):
    """What is reported is what estimates from fresh batches deviate by, values in a batch alike."""

    def batches():
        for n in sizes:
            spread, centre = 1 + torch.rand(1, 96, 1, 1), torch.randn(1, 96, 1, 1)
            yield centre + spread * torch.randn(n, 96, 4, 4)

    reported, means, variances = [], [], []
    for _ in range(25):
        bn = nn.BatchNorm2d(96)
        report = update_bn_stats(bn, list(batches()), len(sizes), estimator=estimator)
        reported.append(report.layers[0])
        means.append(bn.running_mean.double())
        variances.append(bn.running_var.double())
    means, variances = torch.stack(means), torch.stack(variances)
    var = variances.mean()
    true_mean_error = float(means.var(0).mean().sqrt() / var.sqrt())
    true_var_error = float(variances.var(0).mean().sqrt() / var)
    mean_error = np.sqrt(np.mean([r.mean_error**2 for r in reported]))
    var_error = np.sqrt(np.mean([r.var_error**2 for r in reported]))
    # 25 runs of 96 channels know an error to 2 %; an estimate from 12 batches is a little low.
    assert mean_error == pytest.approx(true_mean_error, rel=0.12)
    assert var_error == pytest.approx(true_var_error, rel=0.15)


@pytest.mark.parametrize("estimator", ["population_variance", "mean_of_batch_variances"])
@pytest.mark.parametrize(("mean", "dtype"), [(300.0, torch.float32), (1e7, torch.float64)])
def test_standard_error_by_definition(estimator, mean, dtype):
    """The sums about a pivot against the formula on all batches, with a mean that is large."""
    bn, batches = nn.BatchNorm2d(3, dtype=dtype), [x.to(dtype) + mean for x in make_batches()]
    report = update_bn_stats(bn, batches, len(batches), estimator=estimator)
    mean, var = brute_force(batches, estimator)
    n = torch.tensor([float(x[:, 0].numel()) for x in batches]).double().unsqueeze(1)
    m = torch.stack([values([x.double()]).mean(0) for x in batches])
    if estimator == "population_variance":
        s = torch.stack([(values([x.double()]) - mean).square().mean(0) for x in batches])
    else:
        s = torch.stack([values([x.double()]).var(0) for x in batches])
    scale = len(n) / (len(n) - 1) / n.sum() ** 2
    mean_error = (scale * (n * (m - mean)).square().sum(0) / var).mean().sqrt()
    var_error = (scale * (n * (s - var)).square().sum(0) / var.square()).mean().sqrt()
    # The layer's means are float32, a few millionths of a standard deviation at this mean.
    assert report.layers[0].mean_error == pytest.approx(float(mean_error), rel=1e-4)
    assert report.layers[0].var_error == pytest.approx(float(var_error), rel=1e-4)


def test_tolerance():
    def endless():
        while True:
            yield torch.randn(4, 3, 5, 6)

    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    report = update_bn_stats(model, endless(), 10000, tolerance=0.01)
    assert report.reason == "tolerance" and report.error < 0.01
    assert 20 < report.num_batches < 1000 and report.num_samples == 4 * report.num_batches
    assert report.last_layer in ("0", "2")
    few = update_bn_stats(model, endless(), report.num_batches // 2, tolerance=0.01)
    assert few.reason == "num_iters" and few.error > 0.01
    assert few.last_layer == max(few.layers, key=lambda of: max(of[3:5])).name
    alike = [torch.randn(1, 3, 1, 1) + torch.randn(4, 3, 20, 20) for _ in range(1000)]
    report = update_bn_stats(nn.BatchNorm2d(3), alike, 1000, tolerance=0.05)
    assert report.num_batches > 150, "1 / 0.05^2 = 400 batches, half of the variance in between"


def test_a_tolerance_waits_for_what_has_seen_nothing():
    """A layer that is called with nothing at first; not for one that is not called."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.late, self.other = (nn.BatchNorm2d(3) for _ in range(3))
            self.num_batches = 0

        def forward(self, x):
            self.num_batches += 1
            return self.late(self.first(x)[: None if x.mean() > 5 else 0])

    model = Late()
    batches = [torch.randn(8, 3, 20, 20) + (10 if k > 10 else 0) for k in range(40)]
    report = update_bn_stats(model, batches, 40, tolerance=0.9)
    assert report.reason == "tolerance" and report.num_batches > 11
    assert [of.name for of in report.layers] == ["first", "late"] and report.unused == ["other"]
    assert report.last_layer == "late"


def test_report():
    model, batches = Model(), make_batches((4, 4, 2, 6))
    for bn in (model.once, model.twice):
        bn.running_mean.fill_(0.5)
        bn.running_var.fill_(3.0)
    report = update_bn_stats(model, batches, 4)
    shift = ((0.5 - model.once.running_mean) / model.once.running_var.sqrt()).square().mean().sqrt()
    assert report.layers[0].mean_shift == pytest.approx(float(shift), rel=1e-5)
    shift = (3 / model.once.running_var - 1).square().mean().sqrt()
    assert report.layers[0].var_shift == pytest.approx(float(shift), rel=1e-5)
    again = update_bn_stats(model, batches, 4)
    assert again.layers[0].mean_shift < 1e-6 and again.layers[0].var_shift < 1e-6
    assert "| once " in str(report) and "left as they were: sometimes, never" in str(report)
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["layers"][1]["name"] == "twice" and content["reason"] == "num_iters"
    single = update_bn_stats(model, batches, 1).as_dict()
    assert single["error"] is None, "a single batch says nothing about its error"


def test_a_channel_without_variance():
    batches = [torch.cat([torch.randn(4, 1, 3, 3), torch.ones(4, 1, 3, 3)], 1) for _ in range(9)]
    bn = nn.BatchNorm2d(2)
    report = update_bn_stats(bn, batches, 9)
    assert bn.running_var[1] == 0 and bn.running_mean[1] == 1
    assert 0 < report.error < 1 and report.layers[0].mean_shift < 1


def test_without_layers(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    report = update_bn_stats(model, make_batches(), 2)
    assert not report.layers and report.reason == "no layers"
    assert "1 of 1 layers in evaluation mode (call train() before)" in caplog.text
    json.dumps(report.as_dict())
    str(report)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_iters": 0}, "num_iters: 0"),
        ({"tolerance": -0.1}, "tolerance: -0.1"),
        ({"tolerance": float("nan")}, "tolerance: nan"),
        ({"estimator": "median"}, "estimator: 'median'.*population_variance"),
        ({"progress": "dots"}, "progress: 'dots'"),
    ],
)
def test_arguments(kwargs, message):
    def untouched():
        raise AssertionError("before any work")
        yield

    with pytest.raises(InputError, match=message):
        update_bn_stats(nn.BatchNorm2d(3), untouched(), **kwargs)


@pytest.mark.parametrize("as_loader", [list, iter])
def test_short_loader(as_loader):
    model, batches = Model(), make_batches()
    before = state_of(model)
    for kwargs in ({}, {"tolerance": 1e-9}):
        with pytest.raises(AssertionError, match="6 of 7 batches"):
            update_bn_stats(model, as_loader(batches), 7, **kwargs)
    with pytest.raises(InputError, match="0 of 7 batches"):
        update_bn_stats(model, as_loader([]), 7, allow_short=True)
    assert_same_state(model, before)
    report = update_bn_stats(model, as_loader(batches), 7, allow_short=True)
    assert report.reason == "end of data" and report.num_batches == 6


def test_a_known_length_is_checked_before_any_work():
    def forward(_):
        raise RuntimeError("was called")

    bn = nn.BatchNorm2d(3)
    bn.forward = forward
    with pytest.raises(AssertionError, match="has 6 of 7"):
        update_bn_stats(bn, make_batches(), 7)


def test_not_finite():
    model, batches = Model(), make_batches([4] * 6)
    before = state_of(model)
    batches[3][1, 2] = float("inf")
    with pytest.raises(InputError, match="^once: its input has NaN or infinity in batch 3"):
        update_bn_stats(model, batches, 6)
    assert_same_state(model, before)


def test_single_value():
    model = nn.Sequential(nn.Conv2d(3, 3, 5), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="^1: .*single value"):
        update_bn_stats(model, [torch.randn(1, 3, 5, 5)], 1)


def test_progress(capsys):
    update_bn_stats(nn.BatchNorm2d(3), make_batches(), 6, progress="tqdm")
    assert "6/6" in capsys.readouterr().err
    update_bn_stats(nn.BatchNorm2d(3), make_batches(), 6)
    assert not capsys.readouterr().err


def test_compiled_model():
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), make_batches()
    expected = copy.deepcopy(model)
    update_bn_stats(expected, batches, 6)
    report = update_bn_stats(torch.compile(model), batches, 6)
    assert torch.equal(model[1].running_var, expected[1].running_var)
    assert report.layers[0].name == "1"
    model[1].reset_running_stats()
    model[1].compile()
    update_bn_stats(model, batches, 6)
    assert torch.equal(model[1].running_var, expected[1].running_var)
