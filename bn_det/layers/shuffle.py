"""Shuffling of samples across processes, so that no normalization batch is made of one image.

The RoIs that a process has at once come from one or two images, and a BN in the RoI head can read
hints from them: leakage (Wu & Johnson, *Rethinking "Batch" in BatchNorm*, Sec. 6 and Figure 9).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .comm import Group, gather_into, process_group, report_disagreement
from .kinds import check_module
from .meeting import TIMEOUT, Calls, Place, check_timeout, meet

Restore = Callable[[Tensor], Tensor]
M = TypeVar("M", bound=nn.Module)


def shuffle(x: Tensor, group: Group = None, timeout: float = TIMEOUT) -> tuple[Tensor, Restore]:
    """Mix the samples of all ranks by one random permutation, and say how to undo it.

    The samples of all ranks in turn, permuted, are dealt out in equal shares; the first ranks have
    one more where they do not divide evenly. Each sample travels once, to its new rank only
    (all-to-all with uneven splits), and its gradient once, the reverse way. One small all-gather
    comes before: of what the ranks hold, and of the random seed. Ranks may have different numbers
    of samples, and none.

    The seed comes from torch's global CPU generator (on rank 0 of the group). So
    ``torch.manual_seed`` repeats a permutation, and the recomputation of activation checkpointing,
    which preserves that generator's state by default, takes the same route.

    All ranks have to take part in all that follows: each calls ``restore`` as often as the others,
    and the backward pass has to reach the result on each, one without samples included (a loss of
    ``0 * y.sum()`` will do). For that the result requires grad on all ranks if x does on any.

    With one process nothing is mixed: x itself is returned, and a restore that does nothing.

    Args:
        x: shape (N, *) of any dtype; all but N the same on each rank.
        group: the processes that mix their samples: None or "world" for all, or a ProcessGroup,
            say of one machine.
        timeout: seconds that a rank waits for the others before it ends with the ranks that did
            not come; 0 not to find out whether all are here.

    Returns:
        The mixed samples, shape (N', *), and ``restore(y)``: from one tensor (N', ...) on each
        rank, of any dtype, to (N, ...), each y where its sample came from. It can be called any
        number of times.

    Raises:
        InputError: on every rank, if ranks disagree in dtype or in the shape of a sample.
        ValueError: x has no dimension of samples, or more than eight dimensions; for ``restore``
            on every rank also if y on any has another number of samples than N'.
        RuntimeError: ranks of the group are in different layers, or one does not come.
    """
    check_timeout("timeout", timeout)
    return _shuffle(x, group, _SHUFFLES.next("shuffle", timeout))


def _shuffle(x: Tensor, group: Group, place: Place) -> tuple[Tensor, Restore]:
    resolved = process_group("world" if group is None else group)
    if resolved is None:
        return x, lambda y: y
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    held = _agree("shuffle", x, seed, place, resolved)
    there = place._replace(stage="exchange")
    route, shares = _plan(held.counts, held.seed, x.device, resolved, there)

    def restore(y: Tensor) -> Tensor:
        arrived = _agree("restore", y, 0, place, resolved)
        for rank, (count, share) in enumerate(zip(arrived.counts, shares, strict=True)):
            if count != share:
                raise ValueError(
                    f"restore: {count} samples on rank {rank} of the group, where the shuffled "
                    f"tensor had {share}"
                )
        return _exchange(y, route.reversed("exchange back"), arrived.requires_grad)

    return _exchange(x, route, held.requires_grad), restore


def shuffled(
    module: M,
    method: str = "forward",
    group: Group = None,
    timeout: float = TIMEOUT,
) -> M:
    """Let a method of a module work on shuffled samples while the module is in training mode.

    In place; the state dict is unchanged. See :func:`shuffle` for what each rank has to do.

    Args:
        module: any.
        method: the name of a method whose first positional argument is a tensor (N, *), and that
            returns a tensor (N, ...) or a structure of such; other arguments are passed through.
        group, timeout: as in :func:`shuffle`.

    Returns:
        The module itself.

    Raises:
        InputError: it is no module.
        ValueError: the module's class has no such method, or the module has replaced it already.
    """
    check_module("module", module)
    if not callable(getattr(type(module), method, None)) or method in vars(module):
        raise ValueError(
            f"method: {method!r} is not accepted; use a method of {type(module).__name__} that "
            "this module has not replaced already"
        )
    check_timeout("timeout", timeout)
    setattr(module, method, Shuffled(module, method, group, timeout))
    return module


def is_shuffled(module: nn.Module) -> bool:
    """Whether a method of this module itself works on shuffled samples."""
    return bool(shuffled_methods(module))


def shuffled_methods(module: nn.Module) -> list[Shuffled]:
    """The methods of this module itself that work on shuffled samples."""
    return [value for value in vars(module).values() if isinstance(value, Shuffled)]


class Shuffled:
    """A method in a module's instance dictionary that a copy of the module finds its own way from.

    A closure over the module would have a deep copy call the original.
    """

    def __init__(self, module: nn.Module, method: str, group: Group, timeout: float) -> None:
        self.module, self.method, self.group, self.timeout = module, method, group, timeout
        self.calls = Calls()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.module), self.method)
        if not self.module.training:
            return method(self.module, x, *args, **kwargs)
        x, restore = _shuffle(x, self.group, self.calls.next("shuffled", self.timeout))
        return tree_map_only(Tensor, restore, method(self.module, x, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Shuffled:
        # A process group cannot be copied, and the copy means the same processes.
        module = copy.deepcopy(self.module, memo)
        copied = Shuffled(module, self.method, self.group, self.timeout)
        copied.calls = copy.deepcopy(self.calls)
        return copied


_SHUFFLES = Calls("shuffle", is_counted=False)
_MAX_DIMS = 8
_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


class _Held(NamedTuple):
    """What the ranks hold, as far as it is not the same on all."""

    counts: list[int]
    seed: int
    requires_grad: bool


def _agree(what: str, x: Tensor, seed: int, place: Place, group: dist.ProcessGroup) -> _Held:
    """Gather what each rank holds; raise on every rank if it cannot be exchanged."""
    sizes = [*x.shape[:_MAX_DIMS], *[0] * (_MAX_DIMS - x.dim())]
    requires_grad = x.requires_grad and torch.is_grad_enabled()
    header = torch.tensor(
        [seed, requires_grad, _DTYPES.index(x.dtype), x.dim(), *sizes], device=x.device
    )
    every = header.new_empty(dist.get_world_size(group), len(header))
    gather = partial(gather_into, every.view(-1), header)
    meet(place._replace(stage=what), group).exchange(gather)
    headers = every.tolist()
    report_disagreement(
        what,
        [
            {
                "dtype": _DTYPES[dtype],
                "number of dimensions": dim,
                "shape of a sample": tuple(sizes[1:dim]),
            }
            for _, _, dtype, dim, *sizes in headers
        ],
    )
    if not 1 <= x.dim() <= _MAX_DIMS:
        raise ValueError(
            f"{what}: needs a tensor (N, *) of at most {_MAX_DIMS} dimensions, got the shape "
            f"{tuple(x.shape)}"
        )
    return _Held([h[4] for h in headers], headers[0][0], any(h[1] for h in headers))


class _Route(NamedTuple):
    """Which samples one rank sends where, and in which order it keeps what it receives.

    Attributes:
        departure: indices of its samples, those that stay first, then by destination; (N,).
        send_counts: how many go to each rank, none to itself.
        arrival: for each place of the result the index among those that stay, then those that are
            received, by source; (N',).
        receive_counts: how many come from each rank, none from itself.
        place: where the ranks are that go this way.
    """

    departure: Tensor
    send_counts: list[int]
    arrival: Tensor
    receive_counts: list[int]
    group: dist.ProcessGroup
    place: Place

    def reversed(self, stage: str) -> _Route:
        return _Route(
            self.arrival.argsort(),
            self.receive_counts,
            self.departure.argsort(),
            self.send_counts,
            self.group,
            self.place._replace(stage=stage),
        )


def _plan(
    counts: list[int], seed: int, device: torch.device, group: dist.ProcessGroup, place: Place
) -> tuple[_Route, list[int]]:
    """This rank's route, and how many samples each rank has at the end.

    Place p of all ranks' results in turn takes sample permutation[p] of all ranks' in turn.
    """
    rank, world_size, total = dist.get_rank(group), len(counts), sum(counts)
    shares = [total // world_size + (r < total % world_size) for r in range(world_size)]
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.randperm(total, generator=generator, device="cpu")
    places = permutation.argsort().split(counts)[rank]
    samples = permutation.split(shares)[rank]
    # By place, so that what comes from a rank is in the order of places here, too.
    by_place = places.argsort()
    departure, send_counts = _by_rank(places[by_place], shares, rank)
    order, receive_counts = _by_rank(samples, counts, rank)
    route = _Route(
        by_place[departure].to(device),
        send_counts,
        order.argsort().to(device),
        receive_counts,
        group,
        place,
    )
    return route, shares


def _by_rank(indices: Tensor, sizes: list[int], rank: int) -> tuple[Tensor, list[int]]:
    """The order that sorts indices by the rank that holds them, this one first; the others' counts.

    Args:
        indices: into the samples of all ranks in turn.
        sizes: how many each rank holds.
    """
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    ranks = torch.bucketize(indices, ends, right=True)
    counts = ranks.bincount(minlength=len(sizes))
    counts[rank] = 0
    return torch.where(ranks == rank, -1, ranks).argsort(stable=True), counts.tolist()


def _exchange(x: Tensor, route: _Route, requires_grad: bool) -> Tensor:
    if requires_grad and not x.requires_grad:
        x = x.detach().requires_grad_()
    return _Exchange.apply(x, route)


class _Exchange(torch.autograd.Function):
    """One all-to-all along a route; its backward pass is the reverse route."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        leaving = sum(route.send_counts)
        staying = len(x) - leaving
        there = x.new_empty(len(route.arrival), *x.shape[1:])
        torch.index_select(x, 0, route.departure[:staying], out=there[:staying])
        sent = x.index_select(0, route.departure[staying:]).contiguous()
        send = partial(dist.all_to_all_single, _bytes(there[staying:]), _bytes(sent))
        counts = route.receive_counts, route.send_counts
        meeting = meet(route.place, route.group)
        meeting.exchange(partial(send, *counts))
        return there.index_select(0, route.arrival)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        route = ctx.route.reversed(f"backward pass of {ctx.route.place.stage}")
        return _Exchange.apply(grad, route), None


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor (N, *), as (N, bytes): backends differ in dtypes."""
    return x.view(len(x), math.prod(x.shape[1:])).view(torch.uint8)
