"""Ranks that are not in the same layer, or do not come, are told; statistics are never mixed."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bn_det import BatchNorm2d, convert_batchnorm, name_layers, shuffle, shuffled
from bn_det.errors import InputError
from ranks import run_ranks

C = 4


def make_model(timeout=300.0):
    """Two layers over processes with as many channels."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(C))
    convert_batchnorm(model, lambda n: BatchNorm2d(n, group="world"))
    return name_layers(model, timeout=timeout)


def raised(call, error=RuntimeError):
    begin = time.monotonic()
    with pytest.raises(error) as caught:
        call()
    return str(caught.value), time.monotonic() - begin


def other_order(rank):
    model = make_model()
    x = torch.randn(2, C, 3, 3)
    model(x)
    layers = reversed(model) if rank else model
    before = [b.clone() for b in model.buffers()]
    message, _ = raised(lambda: [layer(x) for layer in layers])
    # Nothing was exchanged, and so nothing has moved.
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    return message


def test_layers_in_another_order():
    messages = run_ranks(other_order, 3)
    assert len(set(messages)) == 1
    assert messages[0] == (
        "ranks of the group are in different layers that exchange something: rank(s) 0 in 0, call "
        "2, forward pass; rank(s) 1, 2 in 1, call 2, forward pass; all were last together in 1, "
        "call 1, forward pass. Every rank has to call every layer that normalizes over processes, "
        "one without samples included (timeout: bn_det.name_layers, SOLVER.SYNC_BN_TIMEOUT)"
    )


def unnamed_in_another_order(rank):
    layers = [BatchNorm2d(C, group="world") for _ in range(2)]
    x = torch.randn(2, C, 3, 3)
    return raised(lambda: layers[rank](x))[0]


def test_layers_without_names_in_another_order():
    messages = run_ranks(unnamed_in_another_order, 2)
    assert messages[0] == messages[1]
    assert "rank(s) 0 in BatchNorm2d number 1 (see bn_det.name_layers), call 1" in messages[0]
    assert "rank(s) 1 in BatchNorm2d number 2" in messages[0]


def off_a_known_way(rank):
    """One rank waits where all have been before, and does not ask; the other goes elsewhere."""
    model = make_model()
    x = torch.randn(2, C, 3, 3)
    for _ in range(4):
        model(x)
    before = [b.clone() for b in model.buffers()]
    message, seconds = raised(lambda: model[rank](x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    return message, seconds


def test_a_rank_that_leaves_a_known_way():
    for message, seconds in run_ranks(off_a_known_way, 2):
        assert "different layers that exchange something: rank(s) 0 in 0, call 5" in message
        assert "rank(s) 1 in 1, call 5, forward pass (num_features 4, dtype torch" in message
        assert "; all were last together in 1, call 4, forward pass" in message
        assert seconds < 30, "long before the time is up"


def waits_on_a_known_way(rank):
    model = make_model(timeout=3.0)
    x = torch.randn(2, C, 3, 3)
    for _ in range(4):
        model(x)
    if rank == 1:
        time.sleep(9)
        return None
    return raised(lambda: model(x))[0]


def test_a_rank_that_does_not_come_on_a_known_way():
    first, _, last = run_ranks(waits_on_a_known_way, 3)
    assert first == last
    assert first.startswith("rank(s) 1 of the group did not come to 0, call 5, forward pass in 3 s")


def into_another_collective(rank):
    """On a known way one rank goes to a collective of the user's, of as many numbers."""
    layer = BatchNorm2d(2, group="world", timeout=3.0, momentum=1.0)
    gathered = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    for _ in range(4):
        layer(torch.randn(4, 2, 3, 3) + 10)
    if rank == 0:
        return raised(lambda: layer(torch.randn(4, 2, 3, 3)))[0], layer.running_mean.mean().item()
    with pytest.raises(RuntimeError):  # as the other ends
        dist.all_gather(gathered, torch.full((5,), 100.0, dtype=torch.float64))
    return gathered


def test_a_users_collective_gets_nothing_of_a_layer():
    (message, mean), gathered = run_ranks(into_another_collective, 2, stay=False)
    assert message.startswith("rank(s) 1 of the group did not come to BatchNorm2d number 1")
    assert 9 < mean < 11 and not torch.stack(gathered).any()


def after_an_error(rank):
    model = make_model()
    x = torch.randn(2, C, 3, 3)
    for _ in range(4):
        model(x)
    first, _ = raised(lambda: model[rank](x))
    return first, raised(lambda: model(x))[0]


def test_ranks_that_have_parted_do_not_go_on():
    for first, second in run_ranks(after_an_error, 2):
        assert second == f"0, call {second[8]}, forward pass: the ranks have parted before: {first}"


def backward_in_another_order(rank):
    """A layer that is called twice, and one rank's backward passes in the order of the calls."""
    layer = BatchNorm2d(1, group="world")
    for step in range(4):
        losses = [
            (layer(torch.randn(4, 1, 2, 2, requires_grad=True)) * (k + torch.rand(1))).sum()
            for k in range(2)
        ]
        losses = losses if rank == 0 or step < 3 else losses[::-1]
        if step < 3:
            for loss in losses:
                loss.backward()
    return raised(lambda: [loss.backward() for loss in losses])[0]


def test_backward_passes_in_another_order():
    for message in run_ranks(backward_in_another_order, 2):
        assert "rank(s) 0 in BatchNorm2d number 1 (see bn_det.name_layers), call 7" in message
        assert "rank(s) 1 in BatchNorm2d number 1 (see bn_det.name_layers), call 8" in message


def copies_in_another_order(rank):
    layer = BatchNorm2d(C, group="world")
    layers = [layer, copy.deepcopy(layer)]
    return raised(lambda: layers[rank](torch.randn(2, C, 3, 3)))[0]


def test_a_copy_is_another_layer():
    for message in run_ranks(copies_in_another_order, 2):
        assert "rank(s) 0 in BatchNorm2d number 1" in message
        assert "rank(s) 1 in BatchNorm2d number 2" in message


def restored_in_another_order(rank):
    opened = [shuffle(torch.arange(2.0) + 10 * rank) for _ in range(2)]
    first, last = opened if rank == 0 else opened[::-1]
    return raised(lambda: [restore(x) for x, restore in (first, last)])[0]


def test_shuffles_that_are_restored_in_another_order():
    for message in run_ranks(restored_in_another_order, 2):
        assert "rank(s) 0 in shuffle, call 1, restore; rank(s) 1 in shuffle, call 2, restore" in (
            message
        )


def one_pass_behind(rank):
    """A backward pass meets a forward pass."""
    model = make_model()
    x = torch.randn(2, C, 3, 3, requires_grad=True)
    y = model(x)
    return raised(lambda: model(x) if rank else y.sum().backward())[0]


def test_a_backward_pass_meets_a_forward_pass():
    for message in run_ranks(one_pass_behind, 2):
        assert "rank(s) 0 in 1, call 1, backward pass" in message
        assert "rank(s) 1 in 0, call 2, forward pass" in message


def one_skips(rank):
    model = make_model(timeout=3.0)
    x = torch.randn(2, C, 3, 3)
    model(x)
    if rank == 1:
        time.sleep(9)  # somewhere else, while the others wait and tell each other
        return None
    if rank == 2:
        time.sleep(1.5)  # comes late, and ends with the first
    return raised(lambda: model(x))


def test_a_rank_that_does_not_come():
    first, missing, late = run_ranks(one_skips, 3)
    assert missing is None
    assert first[0] == late[0]
    assert "rank(s) 1 of the group did not come to 0, call 2, forward pass in 3 s" in first[0]
    assert "all were last together in 1, call 1, forward pass" in first[0]
    assert first[1] < 9 and late[1] < 9


def one_ends(rank):
    model = make_model()
    x = torch.randn(2, C, 3, 3)
    model(x)
    return None if rank else raised(lambda: model(x))


def test_a_rank_that_has_ended():
    message, seconds = run_ranks(one_ends, 2, stay=False)[0]
    assert message.startswith("a rank has ended while this one was in 0, call 2, forward pass: ")
    assert seconds < 30


def another_dtype(rank, num_calls):
    layer = make_model()[0]
    for _ in range(num_calls):
        layer(torch.randn(2, C, 3, 3))
    dtype = torch.float64 if rank else torch.float32
    error = InputError if num_calls == 1 else RuntimeError
    return raised(lambda: layer.to(dtype)(torch.randn(2, C, 3, 3, dtype=dtype)), error)[0]


def test_another_dtype_on_a_known_way():
    for message in run_ranks(another_dtype, 2, 4):
        assert (
            "rank(s) 0 in 0, call 5, forward pass (num_features 4, dtype torch.float32" in message
        )
        assert (
            "rank(s) 1 in 0, call 5, forward pass (num_features 4, dtype torch.float64" in message
        )


def test_another_dtype_after_the_first_call():
    for message in run_ranks(another_dtype, 2, 1):
        assert message == (
            "0: ranks of the group disagree: dtype is 'torch.float32' on rank 0 and "
            "'torch.float64' on rank 1"
        )


def shuffle_meets_a_layer(rank):
    model = nn.Sequential(shuffled(nn.Sequential(nn.ReLU())), BatchNorm2d(C, group="world"))
    name_layers(model)
    x = torch.randn(2, C, 3, 3)
    model(x)
    return raised(lambda: model[rank](x))[0]


def test_a_shuffle_meets_a_layer():
    for message in run_ranks(shuffle_meets_a_layer, 2):
        assert "rank(s) 0 in 0, call 2, shuffle; rank(s) 1 in 1, call 2, forward" in message
        assert "all were last together in 1, call 1, forward pass" in message


def shuffle_alone(rank):
    if rank == 0:
        return raised(lambda: shuffle(torch.randn(3, 2), timeout=2.0))[0]
    time.sleep(6)
    return None


def test_a_shuffle_that_one_rank_skips():
    message, _ = run_ranks(shuffle_alone, 2)
    assert message.startswith("rank(s) 1 of the group did not come to shuffle, call 1, shuffle in")


def in_a_group_of_two(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = BatchNorm2d(C, group=groups[rank // 2], timeout=2.0)
    x = torch.randn(2, C, 3, 3)
    if rank < 2:
        return [layer(x).shape for _ in range(3)]
    if rank == 3:
        time.sleep(6)
        return None
    return raised(lambda: layer(x))[0]


def test_ranks_of_a_group():
    first, second, waited, _ = run_ranks(in_a_group_of_two, 4)
    assert first == second
    assert waited.startswith("rank(s) 1 of the group did not come to BatchNorm2d number 1")


def without(rank):
    layer = BatchNorm2d(C, group="world", timeout=0.0)
    alone = BatchNorm2d(C)
    xs = torch.randn(2, 2, C, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(xs[rank]), alone(xs.flatten(0, 1)).split(2)[rank])


def test_without():
    run_ranks(without, 2)


@pytest.mark.parametrize("timeout", [-1.0, float("inf"), float("nan")])
def test_timeouts_that_are_refused(timeout):
    for call in (
        lambda: BatchNorm2d(C, group="world", timeout=timeout),
        lambda: shuffle(torch.ones(2), timeout=timeout),
        lambda: shuffled(nn.ReLU(), timeout=timeout),
        lambda: name_layers(nn.ReLU(), timeout=timeout),
    ):
        with pytest.raises(InputError, match="timeout: .* is not accepted; use seconds, or 0.0"):
            call()
