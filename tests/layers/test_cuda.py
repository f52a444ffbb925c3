"""The layers on a GPU: as on the CPU, over NCCL, and without waiting for the device.

It needs torch alone, and benchmarks/gpu.py runs it.
"""

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bn_det
from bn_det import BatchNorm2d, DomainBatchNorm2d
from bn_det.layers import forward_levels
from bn_det.training import AdaptiveGradientClipping
from cases import (
    CASES,
    LEVELS,
    SHARED,
    TOLERANCE,
    C,
    assert_same,
    check_as_in_float64,
    domain_layer,
    make_data,
    make_layer,
    run,
)
from ranks import counted_collectives, run_ranks

cuda = pytest.mark.cuda


@cuda
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_is_as_the_cpu(name, memory_format, dtype):
    check_as_in_float64(name, "cuda", dtype, memory_format)


class Head(nn.Module):
    """Convolutions and shared BatchNorm on levels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(C, C, 3, padding=1), domain_layer(SHARED), nn.ReLU(), nn.Conv2d(C, C, 1)
        )

    def forward(self, xs):
        return forward_levels(self.layers, xs)


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_relu_lets_the_same_gradients_through(memory_format, dtype):
    """A million values, of which none may be on the other side of 0 in the backward pass."""
    layer = DomainBatchNorm2d(64, 2, statistics="shared").cuda()
    shapes = [(4, 64, 64, 50), (4, 64, 31, 25)]
    xs = [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]
    xs = [x.to(memory_format=memory_format).requires_grad_() for x in xs]
    grads = [torch.randn_like(x) for x in xs]
    inputs = [*xs, *layer.parameters()]
    found, expected = forward_levels([layer, nn.ReLU()], xs), [y.relu() for y in layer(xs)]
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)
    found, expected = (torch.autograd.grad(ys, inputs, grads) for ys in (found, expected))
    # One that is let through or not is as large as a gradient; the compiler may round otherwise.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@cuda
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_mixed_precision(memory_format):
    head = Head()
    xs = [torch.randn(n, C, h, w) for n, h, w in LEVELS]
    expected = torch.cat([y.flatten() for y in copy.deepcopy(head)(xs)])
    head.to("cuda", memory_format=memory_format)
    with torch.autocast("cuda", torch.float16):
        ys = head([x.cuda().to(memory_format=memory_format) for x in xs])
    assert all(y.dtype == torch.float16 and y.is_cuda for y in ys)
    found = torch.cat([y.flatten() for y in ys]).float()
    assert_same([found], [expected], 3e-2)  # three roundings to float16
    found.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@cuda
@pytest.mark.parametrize("choices", [None, SHARED, ("per_domain",) * 3], ids=str)
def test_nothing_waits_for_the_device(choices):
    layer = (BatchNorm2d(C) if choices is None else domain_layer(choices)).cuda()
    xs = [torch.randn(2, C, h, w, device="cuda", requires_grad=True) for _, h, w in LEVELS]
    call = (lambda: layer(xs)) if choices else (lambda: [layer(xs[0])])
    grads = [torch.randn_like(y) for y in call()]
    try:
        torch.cuda.set_sync_debug_mode("error")
        torch.autograd.grad(call(), [*xs[: len(grads)], *layer.parameters()], grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_population_statistics():
    """Of torch's layers and ours, which are seen in different ways."""
    model = nn.Sequential(
        nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), BatchNorm2d(C, ghost_size=2), nn.BatchNorm2d(C)
    ).double()
    batches = [torch.randn(n, C, 4, 3, dtype=torch.float64) for n in (4, 5, 2)]
    on_cuda = copy.deepcopy(model).cuda()
    state = torch.cuda.get_rng_state()
    report = bn_det.update_bn_stats(on_cuda, [x.cuda() for x in batches], 3)
    assert report.num_batches == 3 and torch.equal(torch.cuda.get_rng_state(), state)
    bn_det.update_bn_stats(model, batches, 3)
    assert_same(on_cuda.buffers(), model.buffers(), 1e-10)


@cuda
def test_fused():
    model = nn.Sequential(nn.Conv2d(C, C, 3), BatchNorm2d(C), nn.ReLU()).double().cuda()
    x = torch.randn(2, C, 5, 5, dtype=torch.float64, device="cuda")
    model(x)
    expected = model.eval()(x)
    assert not bn_det.fuse(model).left
    assert_same([model(x)], [expected], 1e-10)


@cuda
def test_clipped():
    model = nn.Sequential(nn.Conv2d(C, C, 3), nn.Linear(3, 4))
    on_cuda = copy.deepcopy(model).cuda()
    for p, q in zip(model.parameters(), on_cuda.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.cuda()
    for m in (model, on_cuda):
        AdaptiveGradientClipping(m, 0.01, exclude=())()
    grads = ([p.grad for p in m.parameters()] for m in (on_cuda, model))
    assert_same(*grads, 1e-5)


@contextmanager
def exchanging_alone():
    """In the block, a group of one process is one to exchange with: NCCL needs a GPU for each."""
    modules = [m for name, m in sys.modules.items() if name.startswith("bn_det.layers")]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            if hasattr(module, "process_group"):
                patch.setattr(module, "process_group", lambda group: group and dist.group.WORLD)
        yield


def sync_of_one(rank, device):
    """All eight choices over one process, with the collectives that several need."""
    for name, case in CASES.items():
        if not name.startswith("levels ") and name != "BatchNorm2d":
            continue
        alone = make_layer(case)
        synced = copy.deepcopy(alone)
        synced.group = "world"
        data = [make_data(case) for _ in range(3)]
        expected = run(case, alone, data, device, torch.float64)
        with counted_collectives() as counts:
            run(case, synced, data, device, torch.float64)
        assert not counts, "one process has nobody to exchange with"
        with exchanging_alone(), counted_collectives() as counts:
            found = run(case, synced, data, device, torch.float64)
        # Two calls in training mode; some of the former are of where the ranks are.
        assert counts["all_gather_into_tensor"] >= 2 and counts["all_reduce"] == 2, name
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, 1e-10)


def shuffle_of_one(rank, device):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.int64):
        x = (9 * torch.randn(6, 3, 2, device=device)).to(dtype)
        mixed, restore = bn_det.shuffle(x)
        assert mixed is x and restore(x) is x
        with exchanging_alone(), counted_collectives() as counts:
            mixed, restore = bn_det.shuffle(x)
            assert not torch.equal(mixed, x) and mixed.device == x.device
            assert torch.equal(restore(mixed), x)
            assert counts["all_gather_into_tensor"] >= 2 and counts["all_to_all_single"] == 2
            if dtype.is_floating_point:
                leaf = x.clone().requires_grad_()
                mixed, restore = bn_det.shuffle(leaf)
                (grad,) = torch.autograd.grad(restore(mixed * 2), leaf, x)
                assert torch.equal(grad, 2 * x)


def torchs_sync_of_one(rank, device):
    """Ours for each level against nn.SyncBatchNorm, for which one process is nothing special."""
    torch.manual_seed(1)
    xs = [torch.randn(3, C, h, w, device=device, requires_grad=True) for _, h, w in LEVELS]
    grads = [torch.randn_like(x) for x in xs]
    ours = DomainBatchNorm2d(C, 3, affine="per_domain", group="world").to(device)
    theirs = nn.ModuleList(nn.SyncBatchNorm(C) for _ in LEVELS).to(device)
    expected = [layer(x) for layer, x in zip(theirs, xs, strict=True)]
    wanted = torch.autograd.grad(expected, [*xs, *theirs.parameters()], grads)
    with exchanging_alone():
        ys = ours(xs)
        found = torch.autograd.grad(ys, [*xs, *ours.parameters()], grads)
    assert_same([*ys, *found], [*expected, *wanted], 1e-4)
    for name, value in theirs.state_dict().items():
        assert_same([ours.state_dict()[name]], [value], 1e-5)


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=cuda)])
@pytest.mark.parametrize("check", [sync_of_one, shuffle_of_one])
def test_collectives_of_one_process(check, backend):
    run_ranks(check, 1, "cuda" if backend == "nccl" else "cpu", backend=backend)


@cuda
def test_torchs_sync_batch_norm():
    run_ranks(torchs_sync_of_one, 1, "cuda", backend="nccl")
