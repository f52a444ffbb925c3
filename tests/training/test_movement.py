"""What is told from the moves of running statistics, against the batches themselves."""

import copy
import math

import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d
from bn_det.population.observation import places_with_statistics
from bn_det.training.movement import Snapshot, moves

pytestmark = pytest.mark.usefixtures("one_thread")


class Uncounted(nn.BatchNorm2d):
    """Moves its EMA by itself, as Detectron2's NaiveSyncBatchNorm does."""

    def forward(self, x):
        with torch.no_grad():
            self.running_mean += self.momentum * (x.mean((0, 2, 3)) - self.running_mean)
            self.running_var += self.momentum * (x.var((0, 2, 3)) - self.running_var)
        return x


LAYERS = {
    "torch": nn.BatchNorm2d(3),
    "ours": BatchNorm2d(3),
    "momentum": nn.BatchNorm2d(3, momentum=0.02),
    "cumulative": nn.BatchNorm2d(3, momentum=None),
    "uncounted": Uncounted(3),
    "double": nn.BatchNorm2d(3).double(),
}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (
        2 + 3 * torch.randn(4, 3, 5, 5, generator=generator) + torch.randn(1, generator=generator)
    )


def look(model, steps):
    """What the moves of some steps say; each is a function that runs the model."""
    places = places_with_statistics(model)
    befores, afters = [], []
    for step in steps:
        befores.append(Snapshot.of(places))
        step()
        afters.append(Snapshot.of(places))
    return moves(places, befores, afters)[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_shift_and_noise_are_those_of_the_batches(kind):
    layer = copy.deepcopy(LAYERS[kind])
    for k in range(5):
        layer(batch(100 + k).to(layer.weight.dtype))
    means, variances, mean_gaps, var_gaps = [], [], [], []

    def step(k):
        x = batch(k).to(layer.weight.dtype)
        means.append(x.double().mean((0, 2, 3)))
        variances.append(x.double().var((0, 2, 3)))
        mean_gaps.append(means[-1] - layer.running_mean)
        var_gaps.append(variances[-1] - layer.running_var)
        layer(x)

    found = look(layer, [lambda k=k: step(k) for k in range(6)])
    var = torch.stack(variances).mean(0) + layer.eps

    def rms(values):
        return values.square().mean().sqrt()

    def noise(of):
        gaps = torch.stack(of[1:]) - torch.stack(of[:-1])
        return gaps, (gaps.square().sum(0) / 10).sqrt()

    torch.testing.assert_close(
        (found.mean_shift, found.var_shift, found.mean_noise, found.var_noise),
        (
            rms(torch.stack(mean_gaps).mean(0) / var.sqrt())[None],
            rms(torch.stack(var_gaps).mean(0) / var)[None],
            rms(noise(means)[1] / var.sqrt())[None],
            rms(noise(variances)[1] / var)[None],
        ),
        rtol=1e-4,
        atol=1e-5,
    )
    assert (found.steps, found.pairs, found.updates) == (6, 5, 1)


def test_a_step_with_several_updates_moves_by_their_weight_together():
    """Of the same batch twice, as activation checkpointing has it, what one of the batch says."""
    once, twice = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    twice.momentum = 1 - math.sqrt(1 - once.momentum)
    of_once = look(once, [lambda k=k: once(batch(k)) for k in range(6)])
    of_twice = look(twice, [lambda k=k: (twice(batch(k)), twice(batch(k))) for k in range(6)])
    assert (of_once.updates, of_twice.updates) == (1, 2)
    for left, right in zip(of_once[3:], of_twice[3:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_steps_without_an_update_are_left_out():
    layer = nn.BatchNorm2d(3)
    steps = [lambda k=k: layer(batch(k)) for k in range(4)]
    found = look(layer, [steps[0], steps[1], lambda: None, steps[2], steps[3]])
    assert (found.steps, found.pairs) == (4, 2)
    still = look(layer, [lambda: None] * 3)
    assert still.steps == 0 and still.mean_shift.isnan() and still.mean_noise.isnan()


def test_a_dead_channel_is_as_far_as_its_output():
    """Its variance is eps, not rounding."""
    layer = nn.BatchNorm2d(2)
    layer.running_var.fill_(3e-5)
    x = torch.zeros(2, 2, 4, 4)
    found = look(layer, [lambda: layer(x)] * 4)
    assert found.mean_shift == 0 and 1 < found.var_shift < 3


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.5])
def test_what_chance_explains(momentum):
    """Of a model that stays as it is: the shifts of many windows have the size that is derived."""
    layer = nn.BatchNorm1d(4, momentum=momentum)
    generator = torch.Generator().manual_seed(0)

    def step():
        layer(torch.randn(64, 4, generator=generator))

    for _ in range(round(5 / momentum)):
        step()
    ratios, ema_ratios = [], []
    for _ in range(150):
        found = look(layer, [step] * 8)
        ratios.append((found.mean_shift / (found.chance * 64**-0.5)).square())
        ema_ratios.append((layer.running_mean.norm() / 2 / (found.ema_chance * 64**-0.5)).square())
        assert 0.3 < found.mean_noise * 64**0.5 < 2
    assert 0.7 < torch.stack(ratios).mean() < 1.3
    if momentum > 0.05:  # an EMA forgets slowly, and so do its looks
        assert 0.7 < torch.stack(ema_ratios).mean() < 1.3


def test_places_do_not_depend_on_modes():
    """So that ranks exchange as much."""
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        DomainBatchNorm2d(3, 2),
        DomainBatchNorm2d(3, 2, population="shared"),
    )
    names = [place.name for place in places_with_statistics(model)]
    assert names == ["0", "2.0", "2.1", "3"]
    model[0].eval()
    assert [place.name for place in places_with_statistics(model)] == names
