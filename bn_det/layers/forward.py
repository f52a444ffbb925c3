"""The one way through a BatchNorm of ours, whichever batch it normalizes by.

Partition the input into pieces, take their moments, merge them into normalization batches, let
observers see them, normalize each piece by its batch, update the population statistics. A layer
only makes the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import ema
from .batch import Batch, check_size
from .grouping import grouped
from .joint import joint_batch_norm
from .kernels import grid_of, normalize_one, one_launch
from .meeting import Place, meet
from .moments import Moments, Parts
from .partition import Partition
from .pieces import Normalization
from .renorm import RenormLimits, correction, renormalized
from .types import AnyBatchNorm

if TYPE_CHECKING:
    from .triton_lists import Grid

Extension = Callable[[list[Batch], Sequence[int]], list[Batch]]
"""From the batch that each piece is by itself, and the piece's domain, to larger ones."""

Observation = Callable[[AnyBatchNorm, list[Batch]], None]
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
    population: AnyBatchNorm
    affine: AnyBatchNorm
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
        place: with a group, where the ranks have to be.
        relu: whether a ReLU follows, which is applied with it.
        name: what messages call the layer; may be empty.
    """

    domains: Sequence[Domain]
    eps: float
    by_batch: bool = True
    group: dist.ProcessGroup | None = None
    partition: Callable[[int], Partition] | None = None
    renorm: RenormLimits | None = None
    extensions: Sequence[Extension] = ()
    observers: Sequence[Observation] = ()
    place: Place | None = None
    relu: bool = False
    name: str = ""

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
    if not plan.needs_batches():
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


class _Merged(NamedTuple):
    """The sets of values that are normalized together, or that a population sees together.

    Attributes:
        moments: of each set, stacked.
        sizes: of each, as in :class:`Batch`.
        batch_of: for each piece the number of its normalization batch.
        seen: what each population sees: of each normalization batch the part that is its own.
    """

    moments: Moments
    sizes: list[int]
    batch_of: tuple[int, ...]
    seen: list[ema.Seen]

    def batch(self, number: int) -> Batch:
        return Batch(self.moments.row(number), self.sizes[number])


def _in_steps(plan: Plan, partitions: Sequence[Partition]) -> list[Tensor]:
    """The way as the head of this file says it."""
    pieces = [
        _Piece(x, k, (domain.batch, ghost))
        for k, (domain, of) in enumerate(zip(plan.domains, partitions, strict=True))
        for ghost, x in enumerate(of.split(domain.x))
    ]
    grid = grid_of([piece.x for piece in pieces])
    parts, sizes = _parts(plan, pieces, grid)
    merged = _merged(plan, pieces, parts, sizes)
    _show(plan, merged)
    if plan.by_batch:
        ys = _by_batch(plan, pieces, merged, grid)
        parts_of = grouped(ys, [piece.domain for piece in pieces])
        ys = [of.join(parts_of[k]) for k, of in enumerate(partitions)]
    else:
        ys = [_by_population(plan, domain) for domain in plan.domains]
    ema.update(merged.moments, merged.sizes, merged.seen)
    return ys


def _in_one(plan: Plan, domain: Domain) -> Tensor:
    """All steps by torch's own function, for a tensor that is a normalization batch by itself."""
    x, population, affine = domain.x, domain.population, domain.affine
    if x.numel() == 0:  # which has no statistics, and needs none
        return _by_population(plan, domain)
    size = x.numel() // x.shape[1]
    _check_size(size, plan, [domain])
    if plan.observers and not ema.tracks(population):
        y, moments = _with_moments(x, affine, plan.eps)
        _show(plan, _only(population, moments, size))
        return _activated(plan, y)
    if plan.observers:  # that have torch move the EMA as it does without them, to the bit
        _show(plan, _only(population, Moments.of(x), size))
    # A weight of 0 does not keep an infinite variance out, so evaluation gives no buffers.
    # Training does in any case: a recomputation has to save what the first pass saved.
    # Without their versions: what it saves of them its backward pass does not read, and another
    # call of the layer may update them before.
    mean, var, momentum = None, None, 0.0
    if ema.tracks(population):
        mean, var = population.running_mean.data, population.running_var.data
        momentum = ema.count_batch(population)
    y = F.batch_norm(x, mean, var, affine.weight, affine.bias, True, momentum, plan.eps)
    return _activated(plan, y)


def _only(population: AnyBatchNorm, moments: Moments, size: int) -> _Merged:
    """A tensor that is a normalization batch by itself."""
    return _Merged(Moments.stack([moments]), [size], (0,), [(population, [0])])


def _with_moments(x: Tensor, affine: AnyBatchNorm, eps: float) -> tuple[Tensor, Moments]:
    """Normalize x by its own statistics, as torch does it, and say what they are."""
    size, dtype = x.numel() // x.shape[1], torch.promote_types(x.dtype, torch.float32)
    # An EMA with the whole weight on the new batch; weight and bias have to be of its type.
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    weight, bias = (p if p is None else p.to(dtype) for p in (affine.weight, affine.bias))
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    count = torch.tensor(float(size), dtype=torch.float64, device=x.device)
    return y, Moments(count, mean, var * ((size - 1) / size))


def _partitions(plan: Plan) -> list[Partition]:
    """The ghost batches of each domain; where their order is random, of the same samples in each.

    Raises:
        ValueError: domains that are normalized together do not have as many of them.
    """
    if plan.partition is None:
        return [Partition.whole(len(domain.x)) for domain in plan.domains]
    of_size = {n: plan.partition(n) for n in dict.fromkeys(len(d.x) for d in plan.domains)}
    partitions = [of_size[len(domain.x)] for domain in plan.domains]
    numbers = grouped([len(of.sizes) for of in partitions], [d.batch for d in plan.domains])
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
    if not are_apart:
        return not any(domain.x.numel() for domain in plan.domains)
    return len(plan.domains) == 1 or one_launch([domain.x for domain in plan.domains]) is None


def _parts(plan: Plan, pieces: Sequence[_Piece], grid: Grid | None) -> tuple[Parts, list[int]]:
    """Moments of the pieces on all processes, with what extensions add; and their sizes."""
    group = plan.group
    meeting = None if group is None else meet(plan.place, group)
    parts = Parts.of([piece.x for piece in pieces], grid)
    sizes = [len(piece.x) * math.prod(piece.x.shape[2:]) for piece in pieces]
    if group is not None and meeting is not None:
        parts = parts.all_gather(group, meeting)
        sizes = parts.sizes(sizes)
    if not plan.extensions:
        return parts, sizes
    each = parts.merge([[k] for k in range(len(pieces))])
    batches = [Batch(each.row(k), n) for k, n in enumerate(sizes)]
    for extend in plan.extensions:
        batches = extend(batches, [piece.domain for piece in pieces])
    return Parts.of_rows([b.moments for b in batches]), [b.size for b in batches]


def _merged(plan: Plan, pieces: Sequence[_Piece], parts: Parts, sizes: Sequence[int]) -> _Merged:
    """Normalization batches, and what populations see of them."""
    populations = [plan.domains[piece.domain].population for piece in pieces]
    holders = list(dict.fromkeys(populations))
    places = tuple([holders.index(population) for population in populations])
    # torch.compile warns of a cache, through which it looks.
    sets_of = _sets if torch.compiler.is_compiling() else _cached_sets
    sets, batch_of, seen = sets_of(tuple([piece.batch for piece in pieces]), places)
    totals = [sum([sizes[k] for k in of_set]) for of_set in sets]
    for total, of_set in zip(totals, sets, strict=True):
        if total == 1:
            _check_size(total, plan, [plan.domains[pieces[k].domain] for k in of_set])
    seen_by = [(holders[holder], numbers) for holder, numbers in seen]
    return _Merged(parts.merge(sets), totals, batch_of, seen_by)


def _sets(
    batches: tuple[tuple[int, int], ...], populations: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], tuple[int, ...], list[tuple[int, list[int]]]]:
    """The sets of pieces whose moments are needed.

    Args:
        batches: the key of each piece's batch.
        populations: the number of each piece's population.

    Returns:
        the sets, without repetition; for each piece the number of its batch's; and what populations
        see, in order: of each normalization batch of a domain the number of their own part.
    """
    sets: dict[tuple[int, ...], int] = {}

    def number(of_pieces: Sequence[int]) -> int:
        of_set = tuple(of_pieces)
        if of_set not in sets:  # as in grouped
            sets[of_set] = len(sets)
        return sets[of_set]

    numbers = range(len(batches))
    number_of = {key: number(of_batch) for key, of_batch in grouped(numbers, batches).items()}
    owners = [
        (batch, population) for (batch, _), population in zip(batches, populations, strict=True)
    ]
    seen = []
    for (_, population), of_population in grouped(numbers, owners).items():
        by_batch = grouped(of_population, [batches[k] for k in of_population])
        seen.append((population, [number(of_batch) for of_batch in by_batch.values()]))
    return list(sets), tuple([number_of[key] for key in batches]), seen


_cached_sets = lru_cache(maxsize=1024)(_sets)


def _check_size(size: int, plan: Plan, domains: Iterable[Domain]) -> None:
    """Raise InputError for a batch of a single value per channel, from these domains."""
    if size == 1:
        names = {domain.name for domain in domains}
        name = names.pop() if len(names) == 1 else "all domains together"
        check_size(size, "".join(f"{of}: " for of in (plan.name, name) if of))


def _show(plan: Plan, merged: _Merged) -> None:
    for observe in plan.observers:
        for population, numbers in merged.seen:
            observe(population, [merged.batch(number) for number in numbers])


def _by_batch(
    plan: Plan, pieces: Sequence[_Piece], merged: _Merged, grid: Grid | None
) -> list[Tensor]:
    """Each piece normalized by its batch."""
    domains = [plan.domains[piece.domain] for piece in pieces]
    affines: list[tuple[Tensor, Tensor]]
    if plan.renorm is None:
        holders = list(dict.fromkeys(domain.affine for domain in domains))
        affines = [(holder.weight, holder.bias) for holder in holders]
        affine_of = tuple([holders.index(domain.affine) for domain in domains])
    else:
        affines = [
            _renormalizing(plan.eps, plan.renorm, domain, merged.moments.row(number))
            for domain, number in zip(domains, merged.batch_of, strict=True)
        ]
        affine_of = tuple(range(len(pieces)))
    weights, biases = zip(*affines, strict=True)
    of_affines = weights, biases, affine_of
    how = Normalization(merged.moments, merged.batch_of, *of_affines, plan.eps, plan.relu)
    xs = [piece.x for piece in pieces]
    return joint_batch_norm(xs, how, grid, plan.group, plan.place)


def _renormalizing(
    eps: float, limits: RenormLimits, domain: Domain, moments: Moments
) -> tuple[Tensor, Tensor]:
    """Weight and bias that turn normalization by a batch into batch renormalization."""
    ema.refuse_recomputation("batch renormalization")
    r, d = correction(moments, domain.population, eps, limits)
    return renormalized(domain.affine.weight, domain.affine.bias, r, d)


def _by_population(plan: Plan, domain: Domain) -> Tensor:
    """A domain normalized by its population statistics as they are before the call."""
    population, affine = domain.population, domain.affine
    mean, var = population.running_mean, population.running_var
    if not plan.by_batch and ema.tracks(population):
        ema.refuse_recomputation("normalizing by an EMA that is updated")
        mean, var = ema.snapshot(population)  # the update comes before the backward pass
    y = normalize_one(domain.x, mean, var, affine.weight, affine.bias, plan.eps)
    return _activated(plan, y)


def _activated(plan: Plan, y: Tensor) -> Tensor:
    return F.relu(y) if plan.relu else y
