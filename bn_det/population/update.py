"""Population statistics of a model: what normalizes at test time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError, check_positive, choose, first_of, of_other_type, reason_of
from ..layers.comm import Group, all_gather, process_group, report_disagreement
from ..layers.folded import is_folded
from ..layers.kept import as_frozen
from ..layers.kinds import lists_with_affine, refuse_meta, unwrapped
from .adabn import as_in_a_test
from .calling import ITERABLE, called, is_iterable
from .estimate import ESTIMATORS, Accumulator, Estimate, estimates
from .observation import Observed, Observer, PopulationLayer, left_out, population_layers
from .passes import surroundings
from .report import PopulationReport, make_report
from .snapshot import Snapshot, same_random_state
from .writing import Value, write_all

logger = logging.getLogger(__name__)


class ShortLoaderError(InputError, AssertionError):
    """A data loader ended before the number of batches that was asked for."""


def update_bn_stats(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int = 200,
    progress: str | None = None,
    *,
    estimator: str = "population_variance",
    tolerance: float = 0.0,
    allow_short: bool = False,
    call: Callable[[nn.Module, Any], Any] | None = None,
    group: Group = "world",
    frozen: bool = False,
    initial: bool = False,
    adabn: bool = False,
) -> PopulationReport:
    """Recompute the population statistics of a fixed model (PreciseBN), on all ranks the same.

    An EMA mixes the statistics of models that training has left behind, and of few samples. Here
    all of them come from the model as it is: Wu & Johnson, *Rethinking "Batch" in BatchNorm*,
    Sec. 3. Every ``nn.BatchNorm1d``, ``2d``, ``3d``, ``nn.SyncBatchNorm``, layer of ours and layer
    that is derived from these, in training mode and with population statistics, gets those of
    all values that it has seen, in however many calls, on all ranks; set the mode before. The
    model computes what it computes in training, with one exception: a
    :class:`~bn_det.DomainBatchNorm2d` with population statistics per domain normalizes per domain,
    as it will at test time.

    Refused are layers with mean 0 and variance 1, no batch tracked, and weight and bias that have
    been trained. Either statistics have been folded into weight and bias, and real ones beside
    these would make another function of the model: :func:`bn_det.unfold` keeps it. Or training has
    never updated them (a teacher whose parameters alone are averaged): say so by ``initial=True``.

    Nothing else changes: not parameters, other buffers, attributes of modules, hooks or random
    states; nor do the statistics, if anything fails. (It takes the memory of a second model.) A
    pass ends after the last call of the layers where the rest of the model has none.

    With several ranks each runs ``num_iters`` batches of its own, of any size, and at the end one
    collective merges what they have seen. With a tolerance there is one at each check instead:
    after 8 batches and whenever they are an eighth more. If the model exchanges something in each
    pass (SyncBN, :func:`bn_det.shuffle`), ranks agree before each that all of them have a batch.

    Args:
        model: a DistributedDataParallel or compiled one is run as the module in it.
        data_loader: batches, as the model takes them.
        num_iters: the number of batches, of each rank; with a tolerance the largest.
        progress: "tqdm" for a bar, or None.
        estimator: "population_variance", the variance of all values together; or
            "mean_of_batch_variances", what an EMA estimates.
        tolerance: stop once the standard error of every layer that is called is below: that of the
            mean in standard deviations and that of the variance relative to it, root mean square
            over channels. Batches, not values, are taken for independent. 0 to run all batches.
        allow_short: take a loader that ends early for complete.
        call: how the model is run on a batch, ``model(batch)`` by default; a tuple may be several
            arguments (:func:`bn_det.population.calling.called`).
        group: the processes that have to call this, each with the same model.
        frozen: whether frozen layers get new statistics, too: by :func:`bn_det.freeze`, a
            FrozenBatchNorm2d of either host, or kept in evaluation mode by a train() of the model's
            own (``norm_eval``). In the passes they normalize as if they were not frozen, by the
            samples of their process.
        initial: whether statistics that look folded are replaced.
        adabn: run the model as in a test, its BatchNorm alone in training mode, whatever mode it is
            in; afterwards it is in that again. For images of the domain that it is to be used on,
            without labels (Li et al., *Revisiting Batch Normalization For Practical Domain
            Adaptation*, 2016).

    Returns:
        what has been done, by layer and domain.

    Raises:
        InputError: an argument is not accepted; ranks disagree; a layer has seen NaN or infinity
            (the message names it and the batch); no layer has been called; statistics look folded;
            or new ones do not fit the type of the buffers.
        ShortLoaderError: the loader has ended early; an InputError and an AssertionError.
        RuntimeError: another rank failed.
    """
    check_arguments(data_loader, num_iters, progress, estimator, tolerance)
    model = unwrapped(model)
    refuse_meta("update_bn_stats", model)
    how = How(num_iters, estimator, tolerance, allow_short, process_group(group))
    with ExitStack() as stack:
        if frozen:
            stack.enter_context(as_frozen(model))
        if adabn:
            stack.enter_context(as_in_a_test(model))
        layers = population_layers(model, frozen)
        if not layers:
            logger.warning("update_bn_stats has nothing to update: %s", _why_none(model))
        observer = Observer(called(model, call), model, layers)
        error = _why_shared(layers) or (None if initial else _why_folded(model, layers))
        found, report = measure_statistics(observer, data_loader, how, progress, error)
        _write(layers, found)
    return report


class How(NamedTuple):
    """Arguments of :func:`update_bn_stats`, and what a caller calls the first of them."""

    num_iters: int
    estimator: str
    tolerance: float
    allow_short: bool
    group: dist.ProcessGroup | None
    batches: str = "data_loader"


def measure_statistics(
    observer: Observer,
    data_loader: Iterable[Any],
    how: How,
    progress: str | None,
    error: Exception | None = None,
) -> tuple[list[Estimate | None], PopulationReport]:
    """The statistics of what the layers of a model see, which is left as it is; with the report.

    Args:
        error: why nothing can be measured on this rank; it is raised, and the others told.
    """
    model = observer.model
    run = _Run(observer, how, error)
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(surroundings())
        tensors = chain(model.parameters(), model.buffers())
        stack.enter_context(same_random_state({t.device for t in tensors}))
        found = run.estimate(data_loader, stack.enter_context(_shown(progress, how.num_iters)))
        left = left_out(model, observer.layers)
        done = run.samples, left, run.reason, run.last_layer
        report = make_report(observer.layers, found, *done)
    return found, report


_END = object()

_Advance = Callable[[], object]
"""What is called after each batch."""


class _Share(NamedTuple):
    """What a rank tells the others at a check.

    Attributes:
        sums: of its batches.
        samples, called: by layer.
    """

    settings: dict[str, object]
    sums: Tensor
    samples: list[int]
    num_batches: int
    called: list[bool]
    has_ended: bool
    error: str


class _Run:
    """The passes of one call of update_bn_stats.

    Attributes:
        samples: for each layer the number of samples, on all ranks.
        reason: why it has stopped: "num_iters", "tolerance" or "end of data".
        last_layer: the name of the layer that was the last to be precise, or is the least so.
    """

    def __init__(self, observer: Observer, how: How, error: Exception | None) -> None:
        self.observer, self.group = observer, how.group
        self.layers = layers = observer.layers
        self.num_iters, self.tolerance = how.num_iters, how.tolerance
        self.allow_short, self.named = how.allow_short, how.batches
        self.channels = [len(layer.module.running_mean) for layer in layers]
        device = layers[0].module.running_mean.device if layers else None
        self.estimator = how.estimator
        self.accumulator = Accumulator(self.channels, how.estimator, device)
        self.snapshot = Snapshot(observer.model)
        self.own_samples = [0] * len(layers)
        self.num_batches = 0
        self.has_ended = False
        self.error = error
        self.samples, self.reason, self.last_layer = self.own_samples, "", ""

    def estimate(self, data_loader: Iterable[Any], advance: _Advance) -> list[Estimate | None]:
        """Run batches until there are enough, or as many as were asked for."""
        try:
            if not self.layers:
                self._raise_errors(self._gather())  # other ranks may have some
                self.reason = "no layers"
                return []
            self._check_length(data_loader)
            batches = self._begin(data_loader)
            for stop_at in _checks(self.num_iters, self.tolerance):
                self._run_until(stop_at, batches, advance)
                every = self._gather()
                self._raise_errors(every)
                found = estimates([e.sums for e in every], self.channels, self.estimator)
                self.samples = [sum(n) for n in zip(*(e.samples for e in every), strict=True)]
                if self._is_enough(found, every, stop_at):
                    return found
        finally:
            self.snapshot.restore()
        raise AssertionError("the last check ends the run")

    def _check_length(self, data_loader: Iterable[Any]) -> None:
        """Before any work, where the loader knows its length."""
        try:
            length = len(data_loader) if isinstance(data_loader, Sized) else math.inf
        except TypeError:  # a DataLoader of an IterableDataset
            return
        except Exception as e:
            self.error = e
            return
        needed = 1 if self.allow_short or self.tolerance else self.num_iters
        if length < needed:
            self.error = self._short(f"has {length}")

    def _begin(self, data_loader: Iterable[Any]) -> Iterator[Any]:
        """Workers are started by this, and may not start."""
        try:
            return iter(data_loader)
        except Exception as e:
            self.error = e
            return iter(())

    def _short(self, found: str, where: str = "") -> ShortLoaderError:
        wanted = f"{self.num_iters} batches (num_iters)"
        return ShortLoaderError(f"{self.named}: {found} of {wanted}{where}; nothing is changed")

    def _run_until(self, num_batches: int, batches: Iterator[Any], advance: _Advance) -> None:
        while self.num_batches < num_batches:
            batch = self._fetch(batches)
            if not self._all_have_one(batch is not _END):
                return
            self._run_pass(batch)
            advance()

    def _fetch(self, batches: Iterator[Any]) -> Any:
        if self.error is not None:
            return _END
        try:
            return next(batches)
        except StopIteration:
            self.has_ended = True
        except Exception as e:
            self.error = e
        return _END

    def _all_have_one(self, has_one: bool) -> bool:
        """Whether this rank has a batch; where ranks run in step, whether all of them have."""
        if self.group is None or not self.observer.in_step:
            return has_one
        device = self.accumulator.sums.device
        return bool(all_gather(torch.tensor(has_one, device=device).int(), self.group).all())

    def _run_pass(self, batch: Any) -> None:
        observed = Observed([[] for _ in self.layers], [0] * len(self.layers))
        try:
            self.observer.run(batch, observed)
        except Exception as e:
            if isinstance(e, FloatingPointError):  # Detectron2's, of proposals
                e = InputError(f"batch {self.num_batches}: {reason_of(e)}")
            if self.group is not None and self.observer.in_step:
                raise e  # the others are in the midst of a pass, where nothing of ours reaches them
            self.error = e
        finally:
            self.snapshot.restore_attributes()
        finite = self.accumulator.add(observed.batches)
        if not all(finite):  # perhaps why the pass failed, too
            name = self.layers[finite.index(False)].name
            self.error = InputError(
                f"{name}: its input has NaN or infinity in batch {self.num_batches}"
                f"{_broken_parameter(self.observer.model)}"
            )
        self.num_batches += 1
        for k, num in enumerate(observed.samples):
            self.own_samples[k] += num

    def _gather(self) -> list[_Share]:
        """What all ranks have, in their order."""
        settings = {
            "num_iters": self.num_iters,
            "estimator": self.estimator,
            "tolerance": self.tolerance,
            "layers in training mode": [layer.name for layer in self.layers],
        }
        error = "" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        sums = self.accumulator.sums.cpu()
        called = [self.observer.was_called(layer) for layer in self.layers]
        done = self.num_batches, called, self.has_ended
        own = _Share(settings, sums, self.own_samples, *done, error)
        if self.group is None:
            return [own]
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, own, group=self.group)
        return every

    def _raise_errors(self, every: Sequence[_Share]) -> None:
        if self.error is not None:
            raise self.error
        for rank, of_rank in enumerate(every):
            if of_rank.error:
                raise RuntimeError(f"update_bn_stats: rank {rank} failed: {of_rank.error}")
        report_disagreement("update_bn_stats", [of_rank.settings for of_rank in every])

    def _is_enough(
        self, found: list[Estimate | None], every: Sequence[_Share], num_batches: int
    ) -> bool:
        """Whether the run is done, and why, at a check after a number of batches of each rank."""
        called = [any(of_layer) for of_layer in zip(*(e.called for e in every), strict=True)]
        # What was called with nothing so far is not precise; what is not called has no part in it.
        errors = [
            (math.inf if was_called else 0.0) if e is None else e.error
            for e, was_called in zip(found, called, strict=True)
        ]
        most = max(of_rank.num_batches for of_rank in every)
        short = [rank for rank, of_rank in enumerate(every) if of_rank.has_ended]
        if self.tolerance and most and max(errors) < self.tolerance:
            self.reason = "tolerance"
        elif short and not (self.allow_short and most):
            where = f" on rank {short[0]}" if self.group is not None else ""
            ended = f"has ended after {every[short[0]].num_batches}"
            raise self._short(ended, where)
        elif most < num_batches:
            self.reason = "end of data"
        elif num_batches == self.num_iters:
            self.reason = "num_iters"
        if self.reason and not any(called):
            raise InputError(
                "update_bn_stats: the model, as it is called, reaches none of its BatchNorm layers"
            )
        if self.reason != "tolerance" or not self.last_layer:
            self.last_layer = self.layers[errors.index(max(errors))].name
        return bool(self.reason)


def check_arguments(
    data_loader: Any, num_iters: int, progress: str | None, estimator: str, tolerance: float
) -> None:
    """Raise InputError for one of :func:`update_bn_stats` that it does not accept."""
    if not is_iterable(data_loader):
        raise of_other_type("data_loader", data_loader, ITERABLE)
    check_positive("num_iters", num_iters)
    is_number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not is_number or not tolerance >= 0:
        raise InputError(f"tolerance: {tolerance!r} is not accepted; use 0 (for none) or more")
    choose("progress", progress, [None, "tqdm"])
    choose("estimator", estimator, ESTIMATORS)


@contextmanager
def _shown(progress: str | None, total: int) -> Iterator[_Advance]:
    """A bar that is shown, or nothing."""
    if progress is None:
        yield lambda: None
        return
    from tqdm import tqdm  # only for this: the layers need torch alone

    with tqdm(total=total) as bar:
        yield bar.update


def _checks(num_iters: int, tolerance: float) -> Iterator[int]:
    """The numbers of batches after which ranks put together what they have."""
    num = 8
    while tolerance and num < num_iters:
        yield num
        num += max(num // 8, 1)
    yield num_iters


def _why_none(model: nn.Module) -> str:
    """For a message: what is the matter with each BatchNorm that is not updated."""
    left = left_out(model, [])
    if not left:
        others = [name for name in model.state_dict() if name.endswith("running_mean")]
        also = f" of a class that is known; what has {others[0]} is none" if others else ""
        return f"the model has no BatchNorm{also}"
    reasons = Counter(left.values())
    return "; ".join(f"{number} of {len(left)} layers {why}" for why, number in reasons.items())


def _why_folded(model: nn.Module, layers: Sequence[PopulationLayer]) -> InputError | None:
    first_name = {layer.owner: layer.name for layer in reversed(layers)}
    lists = lists_with_affine(model)
    names = [first_name[o] for o in reversed(first_name) if is_folded(o, lists.get(o))]
    if not names:
        return None
    return InputError(
        f"update_bn_stats: {first_of(names)} has mean 0 and variance 1, no batch tracked, and "
        "weight and bias that are trained: its statistics are folded into these, and others would "
        "change the model (bn_det.unfold keeps its function); or they have never been updated, "
        "then say initial=True"
    )


def _why_shared(layers: Sequence[PopulationLayer]) -> InputError | None:
    """The error for statistics that two layers have, and see other values for."""
    first: dict[int, PopulationLayer] = {}
    for layer in layers:
        for buffer in (layer.module.running_mean, layer.module.running_var):
            # Not its storage, in which all of a file's tensors may lie.
            other = first.setdefault(buffer.data_ptr() or id(buffer), layer)
            if other.module is not layer.module:
                return InputError(
                    f"update_bn_stats: {other.name!r} and {layer.name!r} hold their statistics in "
                    "the same tensor, and see other values each; give each its own"
                )
    return None


def _broken_parameter(model: nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"; {name} of the model is not finite itself"
    return ""


def _write(layers: Sequence[PopulationLayer], found: Sequence[Estimate | None]) -> None:
    values = [
        Value(layer.name, buffer, value)
        for layer, estimate in zip(layers, found, strict=True)
        if estimate is not None
        for buffer, value in (
            (layer.module.running_mean, estimate.mean),
            (layer.module.running_var, estimate.var),
        )
    ]
    write_all("update_bn_stats", values)
