"""Averaging of the ranks' EMAs, and when it happens."""

import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d
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


def averaged(rank):
    torch.manual_seed(rank)
    model = make_model(rank)
    weight = model[0].weight.clone()
    with counted_collectives() as counts:
        average_population_statistics(model)
    assert counts == {"all_gather_into_tensor": 1}
    assert torch.equal(model[0].weight, weight), "only statistics"
    return dict(model.named_buffers())


def test_average():
    results = run_ranks(averaged, 3)
    own = [dict(make_model(rank).named_buffers()) for rank in range(3)]
    assert len(own[0]) == 9
    for name in own[0]:
        assert all(torch.equal(results[0][name], r[name]) for r in results), "to the bit"
        mean = torch.stack([b[name] for b in own]).double().mean(0)
        torch.testing.assert_close(results[0][name].double(), mean)  # float32's rounding


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
