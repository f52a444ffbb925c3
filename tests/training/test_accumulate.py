"""Gradient accumulation against one large batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_det import BatchNorm2d
from bn_det.errors import InputError
from bn_det.training.accumulate import GradientAccumulation, accumulate
from ranks import run_ranks


def make_model(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers).double()


def make_images(num=8):
    return torch.randn(num, 3, 6, 5, dtype=torch.float64, generator=torch.manual_seed(1))


def losses_of(model, x):
    y = model(x)
    return {"loss_a": y.square().mean(), "loss_b": y.abs().mean()}


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_equals_the_large_batch_where_no_layer_looks_at_it():
    model, x = make_model(lambda channels: nn.GroupNorm(2, channels)), make_images()
    large = copy.deepcopy(model)
    expected = losses_of(large, x)
    sum(expected.values()).backward()
    losses = accumulate(model, x.split(2), losses_of)
    assert not any(v.requires_grad for v in losses.values())
    torch.testing.assert_close(losses, {k: v.detach() for k, v in expected.items()})
    torch.testing.assert_close(gradients(model), gradients(large), rtol=0, atol=1e-12)
    accumulate(model, x.split(2), losses_of)  # on top of what there is
    twice = [2 * g for g in gradients(large)]
    torch.testing.assert_close(gradients(model), twice, rtol=0, atol=1e-12)


def test_normalization_batches_stay_small():
    """As ghost batches of a large one, and its statistics are those of each batch in turn."""
    model, x = make_model(BatchNorm2d), make_images()
    ghosts = copy.deepcopy(model)
    ghosts[1].ghost_size = 2
    sum(losses_of(ghosts, x).values()).backward()
    accumulate(model, x.split(2), losses_of)
    torch.testing.assert_close(gradients(model), gradients(ghosts), rtol=0, atol=1e-10)
    assert model[1].num_batches_tracked == 4


def test_losses_that_not_every_batch_has():
    model = nn.Linear(2, 1, bias=False)
    given = [{"a": 2.0, "b": 4.0}, {"a": 6.0}]

    def some(model, values):
        return {name: model.weight.sum() * 0 + value for name, value in values.items()}

    losses = accumulate(model, given, some)
    assert {name: value.item() for name, value in losses.items()} == {"a": 4.0, "b": 2.0}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_that_accumulates(kind):
    """Called with each batch, it does a step with the mean gradient, and nothing between."""
    model, x = make_model(lambda channels: nn.GroupNorm(2, channels)), make_images()
    large = copy.deepcopy(model)
    optimizers = [kind(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, large)]
    GradientAccumulation(2).attach(optimizers[0])
    for k in range(4):
        before = copy.deepcopy(model.state_dict())
        optimizers[0].zero_grad()
        sum(losses_of(model, x[2 * k : 2 * k + 2]).values()).backward()
        optimizers[0].step()
        if k % 2 == 0:
            assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
            continue
        optimizers[1].zero_grad()
        sum(losses_of(large, x[2 * k - 2 : 2 * k + 2]).values()).backward()
        optimizers[1].step()
        torch.testing.assert_close(model.state_dict(), large.state_dict(), rtol=0, atol=1e-12)


def test_a_step_of_no_batches():
    with pytest.raises(InputError, match="num_batches: 0 is not accepted; use 1 or more"):
        GradientAccumulation(0)


def in_parallel(rank):
    model = DistributedDataParallel(make_model(lambda channels: nn.GroupNorm(2, channels)))
    exchanged = []

    def note(state, bucket):
        exchanged.append(bucket.index())
        future = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, note)
    mine = make_images().chunk(2)[rank]
    for _ in range(2):
        model.zero_grad()
        accumulate(model, mine.split(1), losses_of)
    return gradients(model), len(exchanged)


def test_processes_exchange_gradients_once_a_step():
    large = make_model(lambda channels: nn.GroupNorm(2, channels))
    sum(losses_of(large, make_images()).values()).backward()
    for found, num_exchanges in run_ranks(in_parallel, 2):
        torch.testing.assert_close(found, gradients(large), rtol=0, atol=1e-12)
        assert num_exchanges == 2


@pytest.mark.parametrize("number", [1, 3])
def test_backward_of_ones_own(number):
    """As a scaler of gradients needs it."""
    model, shares = make_model(nn.Identity), []
    accumulate(model, [make_images(2)] * number, losses_of, lambda loss: shares.append(loss))
    assert len(shares) == number and all(p.grad is None for p in model.parameters())
    total = sum(losses_of(model, make_images(2)).values())
    torch.testing.assert_close(sum(shares), total)
