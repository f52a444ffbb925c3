"""Lists of pieces with everything in them, and what each kernel has to make of them, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from bn_det.layers.pieces import Normalization

EPS = 1e-3
SHAPES = {
    "one": [(2, 3, 5, 7)],
    "levels": [(2, 3, 5, 7), (0, 3, 4, 4), (4, 3, 1, 1), (1, 3, 2, 2)],
    "many channels": [(2, 34, 2, 3)],
    "more channels": [(1, 70, 4, 4), (2, 70, 1, 2)],
    "one place a sample": [(5, 4), (3, 4)],
    "volumes": [(2, 3, 2, 4, 3), (1, 3, 2, 2, 2)],
    "divisible": [(2, 16, 4, 4), (1, 16, 4, 8)],
    "tiles": [(2, 2, 40, 60), (1, 2, 33, 41)],
}
"""Of the pieces of a list: empty ones, single values, more than one tile or block of channels."""


class Case(NamedTuple):
    """Pieces that are in two batches and have two affines, or none."""

    xs: list[Tensor]
    dys: list[Tensor]
    batch_of: list[int]
    affine_of: list[int]
    weights: list[Tensor | None]
    biases: list[Tensor | None]

    @property
    def sets(self) -> list[list[int]]:
        """The pieces of each batch."""
        numbers = range(max(self.batch_of) + 1)
        return [[k for k, b in enumerate(self.batch_of) if b == number] for number in numbers]

    def how(self, batches, relu=False) -> Normalization:
        of_affines = self.weights, self.biases, tuple(self.affine_of)
        return Normalization(batches, tuple(self.batch_of), *of_affines, EPS, relu)


def make_case(name, dtype, memory_format, affine=True, mean=3.0) -> Case:
    shapes = SHAPES[name]
    if len(shapes[0]) != 4:
        memory_format = torch.contiguous_format
    elif name == "more channels":  # than one program takes, in channels_last
        memory_format = torch.channels_last
    xs, dys = (
        [
            (2 * torch.randn(s, dtype=torch.float64) + offset)
            .to(dtype)
            .to(memory_format=memory_format)
            for s in shapes
        ]
        for offset in (mean, 0.0)
    )
    numbers = range(len(shapes))
    of_parameters = torch.promote_types(dtype, torch.float32)
    num = min(2, len(shapes))

    def parameters():
        if not affine:
            return [None] * num
        return [torch.randn(shapes[0][1], dtype=of_parameters) for _ in range(num)]

    # The last is in a batch by itself where there are three, so that batches have gaps.
    batch_of = [int(len(shapes) > 2 and k == 0) for k in numbers]
    batch_of = [1 - b for b in batch_of] if any(batch_of) else batch_of
    return Case(xs, dys, batch_of, [k % num for k in numbers], parameters(), parameters())


def column(v: Tensor, x: Tensor) -> Tensor:
    return v.double().view(1, -1, *[1] * (x.dim() - 2))


def values(xs) -> Tensor:
    """Of all of them, (C, number of values), float64."""
    return torch.cat([x.double().movedim(1, 0).flatten(1) for x in xs], 1)


def statistics(xs) -> tuple[int, Tensor, Tensor]:
    """Count, mean and biased variance; zeros of nothing."""
    rows = values(xs)
    if not rows.shape[1]:
        return 0, *torch.zeros(2, len(rows), dtype=torch.float64)
    return rows.shape[1], rows.mean(1), rows.var(1, correction=0)


def by_autograd(case: Case, relu=False):
    """Outputs and gradients of inputs, weights and biases, of batch normalization as it is said.

    A ReLU is that of what the pieces' type has of its input.
    """
    xs = [x.double().requires_grad_() for x in case.xs]
    weights, biases = (
        [None if p is None else p.double().requires_grad_() for p in of]
        for of in (case.weights, case.biases)
    )
    ys = []
    for x, b, a in zip(xs, case.batch_of, case.affine_of, strict=True):
        of_batch = values([xs[k] for k in case.sets[b]])
        mean, var = of_batch.mean(1), of_batch.var(1, correction=0)
        y = (x - column(mean, x)) * (column(var, x) + EPS).rsqrt()
        if weights[a] is not None:
            y = y * column(weights[a], x) + column(biases[a], x)
        ys.append(y * (y.to(case.xs[0].dtype) > 0) if relu else y)
    inputs = [*xs, *(p for p in (*weights, *biases) if p is not None)]
    grads = torch.autograd.grad(ys, inputs, [dy.double() for dy in case.dys])
    return ys, grads[: len(xs)], grads[len(xs) :]
