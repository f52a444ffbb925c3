"""Normalization over processes, against one that holds everything."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import BatchNorm2d, DomainBatchNorm2d, freeze, thaw
from bn_det.errors import InputError
from ranks import counted_collectives, run_ranks
from reference import EIGHT_CHOICES

C = 5
SHAPES = {
    # for each rank, the (N, H, W) of each domain
    "alike": [[(2, 3, 4), (2, 2, 2)]] * 2,
    "uneven": [[(2, 3, 4), (1, 2, 2)], [(5, 1, 7), (3, 4, 1)], [(1, 1, 2), (1, 1, 1)]],
    "empty ranks": [[(0, 3, 4), (0, 2, 2)], [(3, 2, 2), (2, 1, 3)], [(0, 1, 1), (0, 0, 2)]],
    "an empty domain": [[(2, 3, 4), (0, 2, 2)], [(3, 2, 2), (0, 1, 3)]],
    "each rank another domain": [[(2, 3, 4), (0, 2, 2)], [(0, 2, 2), (4, 2, 3)]],
    "single values": [[(1, 1, 1), (1, 1, 1)], [(1, 1, 1), (1, 1, 1)], [(0, 1, 1), (0, 1, 1)]],
    "nothing": [[(0, 3, 4), (0, 2, 2)], [(0, 2, 2), (0, 0, 0)]],
}


def make(shapes, seed=0):
    """Inputs or gradients of all ranks: the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(n, C, h, w, generator=generator, dtype=torch.float64) * (k + 1) + 3 * k
            for k, (n, h, w) in enumerate(of_rank)
        ]
        for of_rank in shapes
    ]


def make_layer(choices, group="world", **kwargs):
    """One of the eight kinds for two domains, or one for a single tensor."""
    torch.manual_seed(1)
    if choices is None:
        layer = BatchNorm2d(C, group=group, **kwargs)
    else:
        names = ("statistics", "population", "affine")
        named = dict(zip(names, choices, strict=True))
        layer = DomainBatchNorm2d(C, 2, group=group, **named, **kwargs)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return layer.double()


def call(layer, xs):
    return layer(xs) if isinstance(layer, DomainBatchNorm2d) else [layer(xs[0])]


def backward_of(layer, xs, grads):
    """Outputs, input gradients, and gradients of parameters by name."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    ys = call(layer, xs)
    named = dict(layer.named_parameters())
    wanted = [*xs[: len(ys)], *named.values()]
    found = torch.autograd.grad(ys, wanted, grads[: len(ys)])
    return {
        "ys": [y.detach() for y in ys],
        "xs": found[: len(ys)],
        "parameters": dict(zip(named, found[len(ys) :], strict=True)),
    }


def all_kinds(rank, shapes):
    xs, grads = make(shapes)[rank], make(shapes, 1)[rank]
    results = []
    for choices in (None, *EIGHT_CHOICES):
        layer = make_layer(choices)
        first = backward_of(layer, xs, grads)
        buffers = {k: b.clone() for k, b in layer.named_buffers()}
        again = backward_of(layer, xs, grads)
        with counted_collectives() as counts:
            backward_of(layer, xs, grads)
        assert counts == {"all_gather_into_tensor": 1, "all_reduce": 1}
        assert all(torch.equal(a, b) for a, b in zip(first["xs"], again["xs"], strict=True))
        results.append({**first, "buffers": buffers})
    return results


def expected(choices, shapes):
    """The same with all tensors in this process, by the definition and by autograd."""
    layer = make_layer(choices, group=None)
    xs = [[x.requires_grad_() for x in of_rank] for of_rank in make(shapes)]
    grads = make(shapes, 1)
    num_domains = 1 if choices is None else 2
    statistics = "shared" if choices is None else choices[0]
    flat = [(r, k) for k in range(num_domains) for r in range(len(shapes))]
    affines = [layer if choices is None else layer.affine_of(k) for k in range(num_domains)]
    ys = {}
    for of_batch in (
        [flat]
        if statistics == "shared"
        else [[(r, k) for r, k in flat if k == domain] for domain in range(num_domains)]
    ):
        if any(xs[r][k].numel() for r, k in of_batch):
            weights, biases = zip(
                *[(affines[k].weight, affines[k].bias) for _, k in of_batch], strict=True
            )
            of_batch_xs = [xs[r][k] for r, k in of_batch]
            found = reference.domain_batch_norm(of_batch_xs, weights, biases, "shared")
        else:
            found = [xs[r][k] * 1 for r, k in of_batch]
        ys.update(zip(of_batch, found, strict=True))
    total = sum((ys[r, k] * grads[r][k]).sum() for r, k in flat)
    named = dict(layer.named_parameters())
    found = torch.autograd.grad(
        total, [*(xs[r][k] for r, k in flat), *named.values()], materialize_grads=True
    )
    return (
        ys,
        dict(zip(flat, found, strict=False)),
        dict(zip(named, found[len(flat) :], strict=True)),
    )


def expected_population(choices, shapes):
    """The EMA after one call, by name of the buffer's module."""
    xs = make(shapes)
    domains = [[of_rank[k] for of_rank in xs] for k in range(2)]
    if choices is None:
        sets = {"": [domains[0]]}
    elif choices[:2] == ("shared", "shared"):
        sets = {"": [domains[0] + domains[1]]}
    elif choices[1] == "shared":
        sets = {"": domains}
    else:
        sets = {"0.": [domains[0]], "1.": [domains[1]]}
    buffers = {}
    for prefix, batches in sets.items():
        mean, var, count = torch.zeros(C).double(), torch.ones(C).double(), 0
        for batch in batches:
            if any(x.numel() for x in batch):
                new_mean, new_var = reference.unbiased(batch)
                mean, var = 0.9 * mean + 0.1 * new_mean, 0.9 * var + 0.1 * new_var
                count += 1
        buffers[f"{prefix}running_mean"] = mean
        buffers[f"{prefix}running_var"] = var
        buffers[f"{prefix}num_batches_tracked"] = torch.tensor(count)
    return buffers


def close(a, b):
    # float64: what is left is the order of summation.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", SHAPES)
def test_equals_one_process(case):
    shapes = SHAPES[case]
    results = run_ranks(all_kinds, len(shapes), shapes)
    for index, choices in enumerate((None, *EIGHT_CHOICES)):
        ys, grad_xs, grad_parameters = expected(choices, shapes)
        of_ranks = [r[index] for r in results]
        for (rank, domain), y in ys.items():
            close(of_ranks[rank]["ys"][domain], y)
            close(of_ranks[rank]["xs"][domain], grad_xs[rank, domain])
        for name, grad in grad_parameters.items():
            close(sum(r["parameters"][name] for r in of_ranks), grad)
        for name, buffer in expected_population(choices, shapes).items():
            close(of_ranks[0]["buffers"][name], buffer)
        for name, buffer in of_ranks[0]["buffers"].items():
            assert all(torch.equal(buffer, r["buffers"][name]) for r in of_ranks), "to the bit"


def single_value(rank):
    caught = []
    for choices in (None, ("shared", "shared", "shared"), ("per_domain", "shared", "shared")):
        layer = make_layer(choices)
        x = torch.ones(1 if rank == 1 else 0, C, 1, 1).double()
        with pytest.raises(InputError) as error:
            call(layer, [x, x[:0]])
        assert layer.running_mean.eq(0).all()
        caught.append(str(error.value))
    return caught


def test_a_single_value_in_all_is_an_error_on_every_rank():
    for messages in run_ranks(single_value, 3):
        for message, prefix in zip(
            messages, ("a normal", "all domains together: ", "domain 0: "), strict=True
        ):
            assert message.startswith(prefix) and "single value" in message


def disagreement(rank, kind):
    channels = C + rank if kind == "num_features" else C
    dtype = torch.float64 if kind == "dtype" and rank else torch.float32
    layer = BatchNorm2d(channels, group="world").to(dtype)
    with pytest.raises(InputError) as error:
        layer(torch.randn(2, channels, 3, 3, dtype=dtype))
    return str(error.value)


@pytest.mark.parametrize(
    "kind, values",
    [("num_features", ("5", "6")), ("dtype", ("'torch.float32'", "'torch.float64'"))],
)
def test_disagreement_is_an_error_on_every_rank(kind, values):
    messages = run_ranks(disagreement, 2, kind)
    assert messages[0] == messages[1]
    assert messages[0] == (
        f"BatchNorm2d: ranks of the group disagree: {kind} is {values[0]} on rank 0 and "
        f"{values[1]} on rank 1"
    )


def in_ddp(rank, world_size):
    """Two layers of convolution and SyncBN; rank 1 has nothing."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, C, 3), BatchNorm2d(C, group="world"), nn.ReLU(),
        nn.Conv2d(C, C, 1), BatchNorm2d(C, group="world"),
    ).double()  # fmt: skip
    x = torch.randn(7, 3, 6, 6, generator=torch.Generator().manual_seed(3)).double()
    direction = torch.randn(7, C, 4, 4, generator=torch.Generator().manual_seed(4)).double()
    if world_size > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False)
        x, direction = ((t[:4], t[:0], t[4:])[rank] for t in (x, direction))
    (model(x) * direction).sum().backward()
    return {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}


def test_distributed_data_parallel():
    alone = in_ddp(0, 1)
    for grads in run_ranks(in_ddp, 3, 3):
        for name, grad in alone.items():
            close(3 * grads[name], grad)  # DDP averages


def without_gradient(rank):
    """A rank with nothing whose input, unlike the others', needs no gradient; frozen affine."""
    layer = make_layer(None).requires_grad_(False)
    x = torch.randn(0 if rank == 0 else 3, C, 2, 2).double()
    x.requires_grad_(rank != 0)
    y = layer(x)
    (y**3).sum().backward()
    return None if x.grad is None else x.grad.abs().amax()


def test_every_rank_takes_part_in_the_backward_pass():
    nothing, *others = run_ranks(without_gradient, 3)
    assert nothing is None and all(g > 1e-3 for g in others)


def checkpointed(rank, use_reentrant):
    shapes = SHAPES["uneven"]
    xs, grads = make(shapes)[rank], make(shapes, 1)[rank]
    plain, layer = make_layer(None), make_layer(None)
    expected = backward_of(plain, xs, grads)
    x = xs[0].clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(grads[0])
    close(x.grad, expected["xs"][0])
    for name, buffer in plain.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    run_ranks(checkpointed, 3, use_reentrant)


def low_precision(rank, dtype, memory_format):
    xs, grads = make(SHAPES["uneven"])[rank], make(SHAPES["uneven"], 1)[rank]
    layer = make_layer(None).float()
    xs, grads = ([t[0].to(dtype).contiguous(memory_format=memory_format)] for t in (xs, grads))
    result = backward_of(layer, xs, grads)
    assert result["ys"][0].dtype == dtype and result["xs"][0].dtype == dtype
    return {**result, "running_var": layer.running_var}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype, tolerance",
    # the rounding of inputs and outputs of size up to 5
    [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
)
def test_low_precision(dtype, tolerance, memory_format):
    shapes = SHAPES["uneven"]
    ys, grad_xs, _ = expected(None, shapes)
    population = expected_population(None, shapes)
    for rank, result in enumerate(run_ranks(low_precision, 3, dtype, memory_format)):
        for found, wanted in ((result["ys"], ys), (result["xs"], grad_xs)):
            wanted = wanted[rank, 0].detach()
            torch.testing.assert_close(found[0].double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            result["running_var"].double(), population["running_var"], rtol=tolerance, atol=0
        )


def copied_with_a_group(rank):
    """A copy normalizes over the group that the layer has, frozen and thawed again, too."""
    del rank
    group = dist.new_group([0, 1])
    layer = freeze(copy.deepcopy(make_layer(None, group=group)))
    copied = thaw(copy.deepcopy(layer)).train()
    with pytest.raises(InputError, match='a ProcessGroup cannot be pickled; use group "world"'):
        pickle.dumps(copied)
    return copied.group is group


def test_a_copy_of_a_layer_with_a_group():
    assert run_ranks(copied_with_a_group, 2) == [True, True]


def jacobian(rank):
    """Whether a derivative by this rank's input is nonzero, for each output of each rank."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for name, group in (("world", "world"), ("half", groups[rank // 2])):
        layer = make_layer(None, group=group)
        x = torch.randn(1 + rank % 2, C, 2, 2).double().requires_grad_()
        y = layer(x)
        rows = []
        for other in range(4):
            for sample in range(1 + other % 2):
                grad = torch.zeros_like(y)
                if rank == other:
                    grad[sample] = torch.randn_like(grad[sample])
                (dx,) = torch.autograd.grad(y, x, grad, retain_graph=True)
                rows.append(dx.flatten(1).abs().amax(1) > 1e-12)
        found[name] = torch.stack(rows)
    return found


def test_jacobian():
    results = run_ranks(jacobian, 4)
    assert torch.cat([r["world"] for r in results], 1).all()
    half = torch.zeros(6, 6, dtype=torch.bool)
    half[:3, :3] = half[3:, 3:] = True
    assert torch.equal(torch.cat([r["half"] for r in results], 1), half)


def in_evaluation(rank):
    layer = make_layer(None).eval()
    with counted_collectives() as counts:
        y = layer(torch.ones(1, C, 2, 2).double())
        layer.eval_statistics = "batch"
        layer(torch.randn(rank, C, 2, 2).double())
    assert not counts and y.shape == (1, C, 2, 2)


def test_evaluation_is_each_ranks_own():
    run_ranks(in_evaluation, 2)


def test_one_process():
    x = torch.randn(4, C, 3, 3)
    ours, theirs = BatchNorm2d(C, group="world"), nn.BatchNorm2d(C)
    assert torch.equal(ours(x), theirs(x))
    assert "all samples of 1 process(es)" in repr(ours)
    with pytest.raises(ValueError, match='group: .*use None, "world" or a ProcessGroup'):
        BatchNorm2d(C, group="node")
