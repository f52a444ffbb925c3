"""Shuffling, in several processes, against forms in which each process holds everything."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather as differentiable_all_gather
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bn_det import shuffle, shuffled
from bn_det.errors import InputError
from ranks import run_ranks

COUNTS = {
    2: [[5, 2], [0, 3], [1, 0], [4, 4], [0, 0]],
    3: [[4, 0, 3], [1, 1, 0], [2, 9, 5], [0, 0, 0]],
    4: [[1, 0, 6, 2], [0, 2, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]],
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat(1, 1, 2, 2)[:, :, ::2, 1::2],
}


def center_and_square(x):
    """Not sample-wise: each output depends on all samples of the process."""
    return (x - x.mean((0, 2, 3), keepdim=True)) * x


def data(rank, count, dtype=torch.float64, channels=3):
    """What a rank holds; each rank can make every rank's."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, channels, 2, 2, dtype=torch.float64, generator=generator).to(dtype)


def split_evenly(x, world_size):
    """Equal shares, the larger ones first: not torch.chunk, which rounds up."""
    sizes = [len(x) // world_size + (r < len(x) % world_size) for r in range(world_size)]
    return x.split(sizes)


def gather_uneven(x):
    """Every rank's samples on every rank, with gradients: padded, gathered, cut."""
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(x))
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    parts = differentiable_all_gather(padded)
    return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)])


def ids(rank, counts):
    """The numbers of a rank's samples among all ranks'."""
    return torch.arange(sum(counts)).split(counts)[rank]


def order_of(seed, counts):
    """The permutation that a global seed stands for: torch's, by the first number drawn."""
    torch.manual_seed(seed)
    drawn = int(torch.randint(2**63 - 1, ()))
    return torch.randperm(sum(counts), generator=torch.Generator().manual_seed(drawn))


def gather_everything_form(x, rank, counts, order, function):
    mixed = split_evenly(gather_uneven(x)[order], len(counts))[rank]
    return mixed, gather_uneven(function(mixed))[order.argsort()].split(counts)[rank]


def one_process_form(xs, order, function):
    """All ranks' outputs from all ranks' inputs, without any communication."""
    mixed = split_evenly(torch.cat(xs)[order], len(xs))
    return torch.cat([function(m) for m in mixed])[order.argsort()].split([len(x) for x in xs])


def equals_other_forms(rank, world_size):
    for seed, counts in enumerate(COUNTS[world_size]):
        order = order_of(seed, counts)
        for dtype in DTYPES:
            for layout in LAYOUTS.values():
                x = layout(data(rank, counts[rank], dtype)).requires_grad_()
                direction = data(rank + 10, counts[rank], dtype)
                expected = gather_everything_form(x, rank, counts, order, center_and_square)
                (expected_grad,) = torch.autograd.grad(expected[1], x, direction)
                torch.manual_seed(seed)
                mixed, restore = shuffle(x)
                share = split_evenly(order, world_size)[rank]
                assert len(mixed) == len(share)  # to one sample, larger shares first
                y = restore(center_and_square(mixed))
                assert torch.equal(mixed, expected[0]) and torch.equal(y, expected[1])
                (grad,) = torch.autograd.grad(y, x, direction)
                assert torch.equal(grad, expected_grad)
                assert y.dtype == grad.dtype == dtype
                assert torch.equal(restore(mixed), x)

        def batch_norm(x):
            return nn.functional.batch_norm(x, None, None, training=True) if len(x) else x

        xs = [data(r, n).requires_grad_() for r, n in enumerate(counts)]
        directions = [data(r + 10, n) for r, n in enumerate(counts)]
        expected = one_process_form(xs, order, batch_norm)
        expected_grads = torch.autograd.grad(expected, xs, directions)
        torch.manual_seed(seed)
        mixed, restore = shuffle(xs[rank])
        y = restore(batch_norm(mixed))
        (grad,) = torch.autograd.grad(y, xs[rank], directions[rank])
        assert torch.equal(y, expected[rank]) and torch.equal(grad, expected_grads[rank])


@pytest.mark.parametrize("world_size", COUNTS)
def test_equals_other_forms_to_the_bit(world_size):
    run_ranks(equals_other_forms, world_size, world_size)


def other_tensors(rank):
    counts = [2, 0, 3]
    for shape in [(), (4,), (0,), (2, 0, 3), (1, 2, 1, 2, 1, 2)]:
        for dtype in [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float64]:
            x = torch.randn(counts[rank], *shape).to(dtype)
            mixed, restore = shuffle(x)
            assert mixed.dtype == dtype and mixed.shape[1:] == shape
            # Others than the shuffled tensor can come back, more than once.
            for y in (mixed, mixed, mixed.to(torch.complex128).unsqueeze(1)):
                assert torch.equal(restore(y), x.to(y.dtype).view(len(x), *y.shape[1:]))


def test_any_shape_and_dtype():
    run_ranks(other_tensors, 3)


def random_orders(rank, rounds):
    counts = [3, 0, 3]
    # Only rank 0's seed counts.
    torch.manual_seed(rank)
    mine = torch.stack([shuffle(ids(rank, counts))[0] for _ in range(rounds)], 1)
    return gather_uneven(mine).T


def test_permutations_are_uniform():
    rounds, n = 400, 6
    orders, *others = run_ranks(random_orders, 3, rounds)
    assert all(torch.equal(orders, other) for other in others)
    assert (orders.sort(1).values == torch.arange(n)).all()
    assert len({tuple(o.tolist()) for o in orders}) > rounds / 2  # of 720
    # How often each sample comes to each place, and which sample follows which.
    at = torch.stack([(orders == s).sum(0) for s in range(n)])
    pairs = torch.zeros(n, n)
    for first, second in zip(orders[:, :-1].flatten(), orders[:, 1:].flatten(), strict=True):
        pairs[first, second] += 1
    for counts, p in [(at, 1 / n), (pairs[~torch.eye(n, dtype=bool)], 1 / n)]:
        # Five standard deviations of a binomial count.
        assert (counts - rounds * p).abs().max() < 5 * (rounds * p * (1 - p)) ** 0.5


def repeated(rank):
    x = data(rank, 5)
    torch.manual_seed(3)
    first, second = shuffle(x)[0], shuffle(x)[0]
    torch.manual_seed(3)
    return torch.equal(shuffle(x)[0], first), torch.equal(first, second)


def test_the_global_seed_repeats_a_permutation():
    assert run_ranks(repeated, 2) == [(True, False)] * 2


def jacobian(rank, counts):
    x = data(rank, counts[rank]).requires_grad_()
    mixed, restore = shuffle(ids(rank, counts))
    new_ranks = gather_uneven(restore(torch.full_like(mixed, rank)))
    torch.manual_seed(0)
    mixed, restore = shuffle(x)
    y = restore(center_and_square(mixed))
    rows = []
    for i in range(sum(counts)):
        mine = ids(rank, counts) == i
        direction = torch.randn_like(y) * mine.view(-1, 1, 1, 1)
        (grad,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        rows.append(gather_uneven(grad.flatten(1).abs().amax(1)) > 1e-12)
    return torch.stack(rows), new_ranks


@pytest.mark.parametrize("counts", [[6, 0], [3, 4, 1]], ids=str)
def test_jacobian(counts):
    """Samples depend on each other exactly where they have been on one rank."""
    for found, new_ranks in run_ranks(jacobian, len(counts), counts):
        assert torch.equal(found, new_ranks[:, None] == new_ranks[None, :])
        assert len(set(new_ranks.tolist())) == len(counts)


class Collectives(TorchDispatchMode):
    """Names of the collectives that run, and the bytes that each brings from other ranks."""

    def __init__(self):
        super().__init__()
        self.names, self.received = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.names.append(func._opname)
            if func._opname == "alltoall_base_":
                splits = args[3]
                row = args[0][0].nbytes if len(args[0]) else 0
                elsewhere = [n for r, n in enumerate(splits) if r != dist.get_rank()]
                self.received.append(row * sum(elsewhere))
        return result


def collectives(rank):
    counts = [3, 9]
    x = data(rank, counts[rank], torch.bfloat16).requires_grad_()
    for _ in range(3):  # then the ranks know where they go
        with Collectives() as forward:
            torch.manual_seed(0)
            mixed, restore = shuffle(x)
        with Collectives() as back:
            y = restore(mixed)
        with Collectives() as backward:
            y.sum().backward()
    own = ids(rank, counts)
    torch.manual_seed(0)
    came = shuffle(own)[0]
    return forward, back, backward, own, came


def test_each_sample_travels_once():
    sample = 3 * 2 * 2 * 2  # bytes of bfloat16
    for forward, back, backward, own, came in run_ranks(recorded, 2):
        assert forward[0] == back[0] == ["_allgather_base_", "alltoall_base_"]
        assert backward[0] == ["alltoall_base_"] * 2
        new = sample * len(set(came) - set(own))
        away = sample * len(set(own) - set(came))
        assert new > 0 and away > 0
        assert (forward[1], back[1], backward[1]) == ([new], [away], [new, away])


def recorded(rank):
    *modes, own, came = collectives(rank)
    return *[(m.names, m.received) for m in modes], own.tolist(), came.tolist()


def only_one_rank_requires_grad(rank):
    x = data(rank, 3).requires_grad_(rank == 1)
    mixed, restore = shuffle(x)
    y = restore(mixed * 2)
    assert mixed.requires_grad and y.requires_grad
    y.sum().backward()
    assert (x.grad is None) if rank == 0 else (x.grad == 2).all()

    # No samples here, and an output that has no graph, as of a head that is skipped.
    x = data(rank, rank).requires_grad_()
    mixed, restore = shuffle(x)
    assert len(mixed) == (rank == 0)
    y = restore(mixed * 2 if len(mixed) else torch.zeros_like(mixed))
    (y.sum() + 0 * mixed.sum()).backward()
    assert (x.grad == 2).all()

    with torch.no_grad():
        assert not shuffle(x)[0].requires_grad
    assert not shuffle(x.detach())[0].requires_grad


def test_all_ranks_take_part_in_the_backward_pass():
    run_ranks(only_one_rank_requires_grad, 2)


def second_derivatives(rank):
    counts = [3, 2]
    order = order_of(0, counts)

    def penalty(ys, xs):
        grads = torch.autograd.grad(sum((y**3).sum() for y in ys), xs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), xs)

    xs = [data(r, n).requires_grad_() for r, n in enumerate(counts)]
    expected = penalty(one_process_form(xs, order, center_and_square), xs)[rank]
    torch.manual_seed(0)
    mixed, restore = shuffle(xs[rank])
    (found,) = penalty([restore(center_and_square(mixed))], [xs[rank]])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
    run_ranks(second_derivatives, 2)


def under_checkpointing(rank, use_reentrant):
    # Two layers, so that two routes are taken again, in the reverse order.
    head = nn.Sequential(*[shuffled(nn.Sequential(Block(), Block())) for _ in range(2)]).double()
    head.load_state_dict({k: torch.randn_like(v) for k, v in head.state_dict().items()})
    found = []
    for run in (lambda part, x: part(x), partial(checkpoint, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        x = data(rank, 2 + 3 * rank).requires_grad_()
        y = x
        for part in head:
            y = run(part, y)
        y.square().sum().backward()
        found.append([y, x.grad, *[p.grad for p in head.parameters()]])
        head.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return center_and_square(self.conv(x)).tanh()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_takes_the_same_route(use_reentrant):
    run_ranks(under_checkpointing, 2, use_reentrant)


def groups_of(rank, members):
    # Every rank has to take part in making every group.
    groups = [dist.new_group(m) for m in members]
    mine = next((k for k, m in enumerate(members) if rank in m), None)
    if mine is None:
        with pytest.raises(ValueError, match="group: .* is not accepted"):
            shuffle(data(rank, 1), groups[0])
        return None
    orders = []
    x = torch.arange(5) + 10 * rank
    for _ in range(20):
        mixed, restore = shuffle(x, groups[mine])
        assert torch.equal(restore(mixed), x)
        orders.append(mixed)
    leaf = data(rank, 2).requires_grad_()
    mixed, restore = shuffle(leaf, groups[mine])
    restore(mixed).backward(data(rank + 10, 2))
    assert torch.equal(leaf.grad, data(rank + 10, 2))
    return torch.cat(orders) // 10


@pytest.mark.parametrize("members", [[[0, 1], [2, 3]], [[1, 3]]], ids=str)
def test_a_part_of_the_world(members):
    came_from = run_ranks(groups_of, 4, members)
    for rank, ranks in enumerate(came_from):
        group = next((m for m in members if rank in m), None)
        assert ranks is None if group is None else set(ranks.tolist()) == set(group)


def disagreement(rank):
    def message(f, error=InputError):
        with pytest.raises(error) as e:
            f()
        return str(e.value)

    found = [
        message(lambda: shuffle(torch.zeros(2, 3, dtype=[torch.float32, torch.bfloat16][rank]))),
        message(lambda: shuffle(torch.zeros(2 * rank, 3 + rank, 5))),
        message(lambda: shuffle(torch.zeros([(2, 3), (2, 3, 1)][rank]))),
        message(lambda: shuffle(torch.zeros(())), ValueError),
        message(lambda: shuffle(torch.zeros((1,) * 9)), ValueError),
    ]
    mixed, restore = shuffle(torch.zeros(3, 2))
    found += [
        message(lambda: restore(mixed[rank:]), ValueError),
        message(lambda: restore(mixed.to([torch.float32, torch.float64][rank]))),
    ]
    # The group is still of use.
    assert torch.equal(restore(mixed), torch.zeros(3, 2))
    return found


def test_bad_input_fails_on_every_rank():
    first, second = run_ranks(disagreement, 2)
    assert first == second
    for message, *words in zip(
        first,
        ["shuffle", "shuffle", "shuffle", "shuffle", "shuffle", "restore", "restore"],
        ["dtype", "shape of a sample", "number of dim", "(N, *)", "at most 8", "2", "dtype"],
        ["float32 on rank 0", "(3, 5) on rank 0", "2 on rank 0", "()", "1, 1)", "rank 1", "rank 0"],
        ["bfloat16 on rank 1", "(4, 5) on rank 1", "3 on rank 1", "", "", "3", "float64 on rank 1"],
        strict=True,
    ):
        assert all(word in message for word in words), message


def single_rank(rank):
    x = torch.zeros(2)
    state = torch.get_rng_state()
    with Collectives() as mode:
        mixed, restore = shuffle(x)
        assert mixed is x and restore(x) is x
    assert mode.names == [] and torch.equal(state, torch.get_rng_state())


def test_one_process_mixes_nothing():
    single_rank(0)
    run_ranks(single_rank, 1)
    with pytest.raises(ValueError, match="group: 3 is not accepted"):
        shuffle(torch.zeros(2), 3)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def layers(self, x, scale, *, shift=0.0):
        y = self.bn(x) * scale + shift
        return y, {"mean": y.mean((1, 2, 3))}

    def forward(self, x):
        return self.layers(x, 2.0, shift=1.0)


def copies(head):
    return {
        "itself": head,
        "deep copy": copy.deepcopy(head),
        "pickled": pickle.loads(pickle.dumps(head)),
        "within a module": copy.deepcopy(nn.Sequential(head))[0],
    }


def around_a_method(rank):
    x = data(rank, 1 + 4 * rank, torch.float32)
    head = shuffled(Head(), "layers", "world")
    assert list(head.state_dict()) == list(Head().state_dict())
    for k, (name, module) in enumerate(copies(head).items()):
        nn.init.constant_(module.bn.weight, k + 1.0)
        torch.manual_seed(k)
        y, extra = module(x)
        # Each copy uses its own parameters and buffers.
        torch.manual_seed(k)
        mixed, restore = shuffle(x)
        plain = Head()
        nn.init.constant_(plain.bn.weight, k + 1.0)
        expected = restore(plain(mixed)[0])
        assert torch.equal(y, expected), name
        assert torch.equal(extra["mean"], expected.mean((1, 2, 3))), name
        assert torch.equal(module.bn.running_mean, plain.bn.running_mean), name
        assert not torch.equal(y, copy.deepcopy(plain)(x)[0]), name

        module.eval()
        with Collectives() as mode:
            y, _ = module(x)
        assert torch.equal(y, plain.eval()(x)[0]) and mode.names == [], name
        module.train()
        module.bn.reset_running_stats()
    assert [m.bn.weight[0].item() for m in copies(head).values()] == [1.0] * 4

    # A group cannot be copied or pickled; a deep copy uses the same one.
    part = copy.deepcopy(shuffled(nn.Identity(), group=dist.new_group([0, 1])))
    with Collectives() as mode:
        assert torch.equal(part(x), x)
    assert mode.names.count("alltoall_base_") == 2


def test_shuffled_module_and_its_copies():
    run_ranks(around_a_method, 2)


def test_shuffled_bad_method():
    head = shuffled(Head())
    for method in ("nothing", "bn", "forward"):
        with pytest.raises(ValueError, match=f"method: '{method}' is not accepted.*Head"):
            shuffled(head, method)
    with pytest.raises(ValueError, match="group: 'node' is not accepted"):
        shuffled(Head(), group="node")(torch.zeros(1, 3, 2, 2))
