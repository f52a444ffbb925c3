"""The one way through a BatchNorm of ours, whichever batch it normalizes by.

Partition the input into pieces, take their moments, merge them into normalization batches, let
observers see them, normalize each piece by its batch, update the population statistics. A layer
only makes the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import ema
from .batch import Batch, check_size
from .joint import joint_batch_norm
from .kernels import normalize
from .moments import Moments
from .partition import Partition
from .renorm import RenormLimits, correction, renormalized

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

Extension = Callable[[list[Batch], Sequence[int]], list[Batch]]
"""From the batch that each piece is by itself, and the piece's domain, to larger ones."""

Observation = Callable[[_BatchNorm, list[Batch]], None]
"""Gets a layer with population statistics, and what it sees of the normalization batches."""


class Domain(NamedTuple):
    """What a plan says of one tensor.

    Attributes:
        x: shape (N, C, *); it may be empty.
        population: the layer that holds its population statistics.
        affine: the layer that holds its weight and bias.
        batch: the number of the normalization batch that it is in.
        name: what messages call it; may be empty.
    """

    x: Tensor
    population: _BatchNorm
    affine: _BatchNorm
    batch: int = 0
    name: str = ""


class Plan(NamedTuple):
    """A call of a layer.

    Attributes:
        domains: one for each tensor.
        eps: added to the variance.
        by_batch: whether batch statistics normalize, and not those of the population.
        group: the processes that batches are merged over.
        partition: from a number of samples to the ghost batches that they are in; None for all
            samples together.
        renorm: the limits of batch renormalization, if any.
        extensions: what adds to the batches.
        observers: what is shown the batches.
    """

    domains: Sequence[Domain]
    eps: float
    by_batch: bool = True
    group: dist.ProcessGroup | None = None
    partition: Callable[[int], Partition] | None = None
    renorm: RenormLimits | None = None
    extensions: Sequence[Extension] = ()
    observers: Sequence[Observation] = ()

    @property
    def needs_batches(self) -> bool:
        """Whether anything depends on them."""
        updates = any(ema.tracks(d.population) for d in self.domains)
        return self.by_batch or updates or bool(self.observers)


def batch_norm(plan: Plan) -> list[Tensor]:
    """Normalize the tensors of all domains; each result has its tensor's shape and dtype.

    Raises:
        InputError: a normalization batch, or a population's part of one, has a single value per
            channel.
    """
    if not plan.needs_batches:
        return [_by_population(plan, domain) for domain in plan.domains]
    partitions = _partitions(plan)
    if not _are_alone(plan, partitions):
        return _in_steps(plan, partitions)
    ys = []
    for domain in plan.domains:
        if domain.x.device.type == "cpu" and not domain.x.is_contiguous():
            ys += _in_steps(plan._replace(domains=[domain]), [Partition.whole(len(domain.x))])
        else:
            ys.append(_in_one(plan, domain))
    return ys


class _Piece(NamedTuple):
    """The samples of a domain that are in one normalization batch.

    Attributes:
        batch: its key: the number that domains have in common, and that of the ghost batch.
    """

    x: Tensor
    domain: int
    batch: tuple[int, int]


Seen = list[tuple[_BatchNorm, list[Batch]]]
"""What populations see in a call: of each normalization batch the part that is theirs."""


def _in_steps(plan: Plan, partitions: Sequence[Partition]) -> list[Tensor]:
    """The way as the head of this file says it."""
    pieces = [
        _Piece(x, k, (domain.batch, ghost))
        for k, (domain, of) in enumerate(zip(plan.domains, partitions, strict=True))
        for ghost, x in enumerate(of.split(domain.x))
    ]
    parts = _batch_of_each(plan, pieces)
    batches, seen = _merged(plan, pieces, parts)
    _show(plan, seen)
    if plan.by_batch:
        ys = _by_batch(plan, pieces, batches)
        of_domain = _grouped(ys, [piece.domain for piece in pieces])
        ys = [of.join(of_domain[k]) for k, of in enumerate(partitions)]
    else:
        ys = [_by_population(plan, domain) for domain in plan.domains]
    _update(seen)
    return ys


def _in_one(plan: Plan, domain: Domain) -> Tensor:
    """All steps by torch's own function, for a tensor that is a normalization batch by itself."""
    x, population, affine = domain.x, domain.population, domain.affine
    if x.numel() == 0:  # which has no statistics, and needs none
        return _by_population(plan, domain)
    size = x.numel() // x.shape[1]
    _check_size(size, [domain])
    if plan.observers:
        y, batch = _with_moments(x, affine, plan.eps)
        seen = [(population, [batch])]
        _show(plan, seen)
        _update(seen)
        return y
    # A weight of 0 does not keep an infinite variance out, so evaluation gives no buffers.
    # Training does in any case: a recomputation has to save what the first pass saved.
    is_tracked = ema.tracks(population)
    running = (population.running_mean, population.running_var) if is_tracked else (None, None)
    momentum = ema.count_batch(population) if is_tracked else 0.0
    return F.batch_norm(x, *running, affine.weight, affine.bias, True, momentum, plan.eps)


def _with_moments(x: Tensor, affine: _BatchNorm, eps: float) -> tuple[Tensor, Batch]:
    """Normalize x by its own statistics, as torch does it, and say what they are."""
    size, dtype = x.numel() // x.shape[1], torch.promote_types(x.dtype, torch.float32)
    # An EMA with the whole weight on the new batch; weight and bias have to be of its type.
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    weight, bias = (p if p is None else p.to(dtype) for p in (affine.weight, affine.bias))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    count = torch.tensor(float(size), dtype=torch.float64, device=x.device)
    return y, Batch(Moments(count, mean, var * ((size - 1) / size)), size)


def _partitions(plan: Plan) -> list[Partition]:
    """The ghost batches of each domain; where their order is random, of the same samples in each.

    Raises:
        ValueError: domains that are normalized together do not have as many of them.
    """
    if plan.partition is None:
        return [Partition.whole(len(domain.x)) for domain in plan.domains]
    of_size = {n: plan.partition(n) for n in dict.fromkeys(len(d.x) for d in plan.domains)}
    partitions = [of_size[len(domain.x)] for domain in plan.domains]
    numbers = _grouped([len(of.sizes) for of in partitions], [d.batch for d in plan.domains])
    if any(len(set(of_batch)) > 1 for of_batch in numbers.values()):
        raise ValueError(
            f"domains of {[sum(of.sizes) for of in partitions]} samples have no ghost batches in "
            "common; use statistics 'per_domain', or as many samples in each"
        )
    return partitions


def _are_alone(plan: Plan, partitions: Sequence[Partition]) -> bool:
    """Whether each tensor is a normalization batch by itself, and as it is."""
    if not plan.by_batch or plan.group is not None or plan.renorm is not None or plan.extensions:
        return False
    if any(len(of.sizes) > 1 for of in partitions):
        return False
    are_apart = len({domain.batch for domain in plan.domains}) == len(plan.domains)
    return are_apart or not any(domain.x.numel() for domain in plan.domains)


def _batch_of_each(plan: Plan, pieces: Sequence[_Piece]) -> list[Batch]:
    """Each piece on all processes as a batch by itself, and what extensions add to it."""
    moments = Moments.of_each([piece.x for piece in pieces])
    sizes = [piece.x.numel() // piece.x.shape[1] for piece in pieces]
    if plan.group is not None:
        moments = Moments.all_reduce(moments, plan.group)
        # With more than one value here there is no need to wait for the device.
        sizes = [n if n > 1 else int(m.count) for n, m in zip(sizes, moments, strict=True)]
    parts = [Batch(m, n) for m, n in zip(moments, sizes, strict=True)]
    for extend in plan.extensions:
        parts = extend(parts, [piece.domain for piece in pieces])
    return parts


def _merged(
    plan: Plan, pieces: Sequence[_Piece], parts: Sequence[Batch]
) -> tuple[dict[tuple[int, int], Batch], Seen]:
    """The normalization batches by their keys, and what populations see of them."""
    unions: dict[tuple[int, ...], Batch] = {}

    def union(numbers: Sequence[int]) -> Batch:
        key = tuple(numbers)
        if key not in unions:
            unions[key] = Batch.merge([parts[k] for k in numbers])
            _check_size(unions[key].size, [domains[k] for k in numbers])
        return unions[key]

    numbers = range(len(pieces))
    domains = [plan.domains[piece.domain] for piece in pieces]
    keys = [piece.batch for piece in pieces]
    batches = {key: union(of_batch) for key, of_batch in _grouped(numbers, keys).items()}
    seen = []
    owners = [(domain.batch, domain.population) for domain in domains]
    for (_, population), of_population in _grouped(numbers, owners).items():
        by_batch = _grouped(of_population, [keys[k] for k in of_population])
        seen.append((population, [union(of_batch) for of_batch in by_batch.values()]))
    return batches, seen


def _check_size(size: int, domains: Iterable[Domain]) -> None:
    """Raise InputError for a batch of a single value per channel, from these domains."""
    if size == 1:
        names = {domain.name for domain in domains}
        name = names.pop() if len(names) == 1 else "all domains together"
        check_size(size, f"{name}: " if name else "")


def _show(plan: Plan, seen: Seen) -> None:
    for observe in plan.observers:
        for population, batches in seen:
            observe(population, batches)


def _update(seen: Seen) -> None:
    for population, batches in seen:
        if ema.tracks(population):
            ema.update(population, batches)


def _by_batch(
    plan: Plan, pieces: Sequence[_Piece], batches: Mapping[tuple[int, int], Batch]
) -> list[Tensor]:
    """Each piece normalized by its batch."""
    affines = [_affine(plan, plan.domains[p.domain], batches[p.batch]) for p in pieces]
    number = {key: k for k, key in enumerate(batches)}
    return joint_batch_norm(
        [piece.x for piece in pieces],
        [batch.moments for batch in batches.values()],
        [number[piece.batch] for piece in pieces],
        *zip(*affines, strict=True),
        plan.eps,
        plan.group,
    )


def _affine(plan: Plan, domain: Domain, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias to use after normalization by a batch."""
    weight, bias = domain.affine.weight, domain.affine.bias
    if plan.renorm is None:
        return weight, bias
    ema.refuse_recomputation("batch renormalization")
    r, d = correction(batch.moments, domain.population, plan.eps, plan.renorm)
    return renormalized(weight, bias, r, d)


def _by_population(plan: Plan, domain: Domain) -> Tensor:
    """A domain normalized by its population statistics as they are before the call."""
    population, affine = domain.population, domain.affine
    mean, var = population.running_mean, population.running_var
    if not plan.by_batch and ema.tracks(population):
        ema.refuse_recomputation("normalizing by an EMA that is updated")
        mean, var = mean.clone(), var.clone()  # the update comes before the backward pass
    (y,) = normalize([domain.x], [mean], [var], [affine.weight], [affine.bias], plan.eps)
    return y


def _grouped(values: Iterable[T], keys: Iterable[K]) -> dict[K, list[T]]:
    """The values of each key, keys in the order in which they come first."""
    grouped: dict[K, list[T]] = {}
    for value, key in zip(values, keys, strict=True):
        grouped.setdefault(key, []).append(value)
    return grouped
