"""Averaging of the ranks' EMAs, and when it happens."""

import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, freeze
from bn_det.errors import InputError
from bn_det.population.average import average_population_statistics
from bn_det.training.hooks import AverageStatistics
from ranks import counted_collectives, run_ranks


def make_model(rank):
    """With statistics that every rank has other ones of."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        DomainBatchNorm2d(4, 2),
        nn.GroupNorm(2, 4),
    )
    generator = torch.Generator().manual_seed(rank)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(3 + 2 * rank)
        else:
            buffer.uniform_(0.5, 2, generator=generator)
    return model


def averaged(rank, how):
    torch.manual_seed(rank)
    model = make_model(rank)
    weight = model[0].weight.clone()
    with counted_collectives() as counts:
        average_population_statistics(model, how=how)
    assert counts == {"all_gather_into_tensor": 1, "all_gather_object": 1}
    assert torch.equal(model[0].weight, weight), "only statistics"
    return dict(model.named_buffers())


@pytest.mark.parametrize("how", ["averaged", "pooled"])
def test_average(how):
    """Weighted by the batches of each rank, as a mean over all batches is."""
    results = run_ranks(averaged, 3, how)
    own = [dict(make_model(rank).named_buffers()) for rank in range(3)]
    assert len(own[0]) == 9
    weights = torch.tensor([3, 5, 7], dtype=torch.float64).unsqueeze(1) / 15
    for name in own[0]:
        assert all(torch.equal(results[0][name], r[name]) for r in results), "to the bit"
        values = torch.stack([b[name] for b in own]).double()
        if name.endswith("tracked"):
            assert results[0][name] == 5
            continue
        expected = (weights * values).sum(0)
        if name.endswith("var") and how == "pooled":
            means = torch.stack([b[name.replace("_var", "_mean")] for b in own]).double()
            expected += (weights * (means - (weights * means).sum(0)).square()).sum(0)
        torch.testing.assert_close(results[0][name].double(), expected)  # float32's rounding


def pooled_by_rank(rank):
    """A mean over all batches (momentum None) on each rank, and pooled."""
    layer = nn.BatchNorm2d(4, momentum=None).double()
    for x in batches_of(rank):
        layer(x)
    average_population_statistics(layer, how="pooled")
    return layer.running_mean, layer.running_var


def batches_of(rank):
    generator = torch.Generator().manual_seed(rank)
    number = 1 + 2 * rank
    return torch.randn(number, 64, 4, 5, 5, generator=generator, dtype=torch.float64) + rank


def test_pooled_is_the_variance_of_all_values():
    (mean, var), _ = run_ranks(pooled_by_rank, 2)
    values = torch.cat([batches_of(rank).flatten(0, 1) for rank in range(2)])
    torch.testing.assert_close(mean, values.mean((0, 2, 3)), rtol=0, atol=1e-12)
    # Means of the batches of a rank differ by noise, which each rank's own EMA does not count.
    torch.testing.assert_close(var, values.var((0, 2, 3)), rtol=2e-3, atol=0)


def unusual(rank, case):
    model = make_model(rank)
    if case == "no batch":
        model[1].num_batches_tracked.fill_(4 * rank)
        if rank == 0:
            model[1].running_var.fill_(float("nan"))
    elif case == "none at all":
        model[1].num_batches_tracked.zero_()
    elif case == "no counter":
        model[1].num_batches_tracked = None
    elif case == "NaN" and rank == 1:
        model[3].get_submodule("1").running_mean[2] = float("nan")
    elif case == "other layers" and rank == 1:
        model[1] = nn.Identity()
    elif case == "other channels" and rank == 1:
        model[1] = BatchNorm2d(5)
    elif case == "another order" and rank == 1:
        first, last = model[0], model[1]
        model = nn.ModuleDict({"1": last, "3": model[3], "0": first})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        average_population_statistics(model)
    except InputError as e:
        after = model.state_dict()
        same = all(torch.allclose(v, after[k], equal_nan=True) for k, v in before.items())
        return str(e), same
    return model.state_dict()["1.running_mean"].clone()


@pytest.mark.parametrize(
    "case, expected",
    [
        ("no batch", lambda first, second: second),
        ("none at all", lambda first, second: (first + second) / 2),
        ("no counter", lambda first, second: (first + second) / 2),
        ("another order", lambda first, second: (3 * first + 5 * second) / 8),
    ],
)
def test_unusual_ranks(case, expected):
    first, second = run_ranks(unusual, 2, case)
    own = [make_model(rank)[1].running_mean for rank in range(2)]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected(*own))


@pytest.mark.parametrize(
    "case, words",
    [
        ("NaN", "3.1: statistics of rank 1 are NaN or infinite; nothing is changed"),
        ("other layers", "layers with population statistics is ['1', '3.0', '3.1'] on rank 0 and"),
        ("other channels", "ranks of the group disagree: 1 is '4 channels' on rank 0"),
    ],
)
def test_errors_are_of_all_ranks(case, words):
    for message, is_same in run_ranks(unusual, 2, case):
        assert message.startswith("average_population_statistics: ") and words in message
        assert is_same


def frozen(rank):
    model = make_model(rank)
    freeze(model, modules=["3"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    average_population_statistics(model)
    return {k.split(".")[0]: torch.equal(v, before[k]) for k, v in model.state_dict().items()}


def test_what_is_frozen_is_left_alone():
    """The statistics of each domain, too, which are layers of their own."""
    for is_same in run_ranks(frozen, 2):
        assert is_same["3"] and not is_same["1"]


def test_one_process_is_left_alone():
    model = make_model(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    average_population_statistics(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Trainer:
    def __init__(self, rank):
        self.iter, self.max_iter, self.model = 0, 11, make_model(rank)


def steps_averaged(rank):
    trainer = Trainer(rank)
    hook = AverageStatistics([4, 0, 3])
    hook.trainer = trainer
    hook.before_train()
    averaged = []
    for step in range(trainer.max_iter):
        trainer.iter = step
        hook.before_step()
        with counted_collectives() as counts:
            hook.after_step()
        if counts:
            averaged.append(step + 1)
    hook.after_train()
    return averaged


def test_hook():
    assert run_ranks(steps_averaged, 2) == [[3, 4, 6, 8, 9, 11]] * 2
