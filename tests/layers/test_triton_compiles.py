"""Triton's kernels are compiled for GPUs that are not here, from the arguments of real calls."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton", "3.6")  # before that the arguments of its compiler are others
import triton
from kernel_cases import make_case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from bn_det.layers import triton_kernels, triton_lists

KERNELS = ("moments", "merge", "normalize", "sums", "add_up", "inputs", "update_emas")
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


class Recorder:
    """In place of a kernel: keeps what it is called with."""

    def __init__(self, calls, kernel):
        self.calls, self.kernel = calls, kernel

    def __getitem__(self, grid):
        assert len(grid) == 3
        return lambda *args: self.calls.append((self.kernel, args))


@pytest.fixture
def calls(monkeypatch):
    """Of the kernels, by every function, on 16 channels."""
    calls = []
    for name in KERNELS:
        monkeypatch.setattr(triton_kernels, name, Recorder(calls, getattr(triton_kernels, name)))
    return calls


def call_all(dtype, memory_format, relu):
    case = make_case("divisible", dtype, memory_format)
    grid = triton_lists.grid_of(case.xs)
    stack, firsts = triton_lists.moments(case.xs, grid), grid.firsts
    batches = triton_lists.merge(stack, firsts, [[0, 1]])
    packed = triton_lists.pack(stack, firsts)
    triton_lists.merge_packed(torch.stack([packed, packed]), [[0, 1], [0]], batches[1].dtype)
    how = case.how(batches, relu)
    triton_lists.normalize(case.xs, how, grid)
    sums, _ = triton_lists.backward_sums(case.dys, case.xs, how, grid)
    triton_lists.backward_inputs(case.dys, case.xs, how, sums, grid)
    triton_lists.update_emas(batches, [[0]], [nn.BatchNorm2d(16, momentum=None)])


def compiled(kernel, args, capability, **options):
    signature, constants, attributes = {}, {}, {}
    for k, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=True)):
        if name.isupper():
            signature[name], constants[name] = "constexpr", arg
            continue
        several = arg if isinstance(arg, tuple) else (arg,)
        types = tuple(type_of(value) for value in several)
        signature[name] = types if isinstance(arg, tuple) else types[0]
        for n, of_type in enumerate(types):
            if of_type.startswith("*"):
                path = (k, n) if isinstance(arg, tuple) else (k,)
                attributes[path] = [["tt.divisibility", 16]]
        if name == "num_channels":
            attributes[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def type_of(arg):
    if isinstance(arg, torch.Tensor):
        return TYPES[arg.dtype]
    return "i32" if arg < 2**31 else "i64"


OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def spilled_bytes(of_kernel, folder):
    """What a thread of the machine's code has no register for; registers are given out by ptxas."""
    path = folder / "kernel.cubin"
    path.write_bytes(of_kernel.asm["cubin"])
    command = [OBJDUMP, "-res-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(re.search(rf"{of}:(\d+)", text)[1]) for of in ("STACK", "LOCAL"))


needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="Triton needs a C compiler")


@needs_cc
def test_spills_are_found(calls, tmp_path):
    """With fewer registers than it needs."""
    call_all(torch.float32, torch.channels_last, relu=True)
    kernel, args = next((k, a) for k, a in calls if k.fn.__name__ == "sums")
    assert spilled_bytes(compiled(kernel, args, 90, maxnreg=24), tmp_path) > 0


@needs_cc
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_compile(dtype, memory_format, capability, calls, tmp_path):
    call_all(dtype, memory_format, relu=True)
    assert {kernel.fn.__name__ for kernel, _ in calls} == set(KERNELS)
    for kernel, args in calls:
        of_kernel = compiled(kernel, args, capability)
        assert spilled_bytes(of_kernel, tmp_path) == 0
        if kernel.fn.__name__ in ("moments", "normalize", "sums", "inputs"):
            # Four values of float32 at once, where a level's rows are aligned.
            assert re.search(r"ld\.global\S*\.v[248]", of_kernel.asm["ptx"])
