"""What happens between training steps, for either host.

A hook has Detectron2's four methods and gets a ``trainer`` with ``iter`` (the iteration in
progress, counted from 0), ``max_iter`` and ``model``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import nn

from ..errors import InputError, check_positive
from ..layers import BatchNorm2d
from ..layers.freeze import Modules, check_freezing, freeze
from ..layers.renorm import RenormLimits
from ..layers.tune import TuneReport, tune_what_is_frozen
from ..population.average import average_population_statistics
from ..population.observation import population_layers
from ..population.progress import with_progress
from ..population.report import PopulationReport
from ..population.update import check_arguments, update_bn_stats
from .virtual_batch import extended_layers, virtual_batch

logger = logging.getLogger(__name__)


class Hook:
    """Does nothing; hooks override what they need."""

    trainer: Any = None

    def before_train(self) -> None:
        """Called before the first iteration."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def after_train(self) -> None:
        """Called after the last iteration."""


class _Periodic(Hook):
    """Acts before each evaluation and each saving: to be registered before what does these.

    Args:
        periods: the iterations between evaluations, and between savings; 0 for only at the end.
    """

    def __init__(self, periods: Sequence[int]) -> None:
        self.periods = [p for p in periods if p > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % p == 0 for p in self.periods):
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class _RunsModel(Hook):
    """Runs the model beside the steps."""

    def context(self) -> AbstractContextManager:
        """What a forward pass of training runs in: autocast, for example."""
        return nullcontext()


class AverageStatistics(_Periodic):
    """Average the ranks' EMAs, so that every rank evaluates the model that is saved.

    Args:
        periods: the iterations between evaluations, and between savings; 0 for only at the end.
    """

    def act(self) -> None:
        average_population_statistics(self.trainer.model)


class PreciseBN(_RunsModel, _Periodic):
    """Recompute the population statistics of the model (:func:`bn_det.update_bn_stats`).

    So that every evaluation and every checkpoint is of a model with precise statistics. A summary
    goes to the trainer's metrics as ``precise_bn/...``, the whole report to the log. Layers that
    are not in training mode, frozen ones, are left alone.

    Args:
        periods: the iterations between evaluations, and between savings; 0 for only at the end.
        model: the model that is trained.
        data_loader: batches as in training, of its own. It is begun anew each time.
        num_iter: the number of batches; with a tolerance the largest.
        tolerance, estimator, call: as in ``update_bn_stats``.

    Raises:
        InputError: an argument is not accepted.
    """

    def __init__(
        self,
        periods: Sequence[int],
        model: nn.Module,
        data_loader: Iterable[Any],
        num_iter: int = 200,
        *,
        tolerance: float = 0.0,
        estimator: str = "population_variance",
        call: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__(periods)
        check_positive("num_iter", num_iter)
        check_arguments(data_loader, num_iter, None, estimator, tolerance)
        self.model, self.data_loader, self.num_iter = model, data_loader, num_iter
        self.how: dict[str, Any] = {"tolerance": tolerance, "estimator": estimator, "call": call}

    def before_train(self) -> None:
        if not population_layers(self.model):
            logger.warning("PreciseBN does nothing: the model has no BatchNorm in training mode")

    def act(self) -> None:
        if population_layers(self.model):
            self.update()

    def update(self) -> PopulationReport:
        """Recompute now."""
        message = "PreciseBN: %d/%d batches"
        batches = with_progress(self.data_loader, self.num_iter, logger, message)
        start = time.monotonic()
        with self.context():
            # Statistics that training does not update look folded.
            report = update_bn_stats(self.model, batches, self.num_iter, initial=True, **self.how)
        seconds = time.monotonic() - start
        logger.info("PreciseBN took %.1f s; the new population statistics:\n%s", seconds, report)
        scalars = {
            "num_batches": report.num_batches,
            "num_samples": report.num_samples,
            "error": report.error,
            "mean_shift": max((of.mean_shift for of in report.layers), default=0.0),
            "var_shift": max((of.var_shift for of in report.layers), default=0.0),
        }
        self.write({f"precise_bn/{name}": float(value) for name, value in scalars.items()})
        return report

    def write(self, scalars: dict[str, float]) -> None:
        """Hand metrics to the trainer."""
        self.trainer.put_scalars(scalars)


class VirtualBatch(_RunsModel):
    """Has extra images in the normalization batches of each step (:func:`bn_det.virtual_batch`).

    To be registered before the hooks that run the model after a step. A step in which every
    BatchNorm is frozen has none.

    Args:
        model: the model that is trained.
        data_loader: batches of extra images, as many as there are steps.
        call: as in ``virtual_batch``.

    Raises:
        InputError: in a step, if the batches have ended; and whatever ``virtual_batch`` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        call: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.model, self.data_loader, self.call = model, data_loader, call
        self._batches: Iterator[Any] | None = None
        self._block = ExitStack()

    def before_step(self) -> None:
        if self._batches is None:
            self._batches = iter(self.data_loader)
        if extended_layers(self.model):
            extra = next(self._batches, None)
            if extra is None:
                raise InputError(
                    f"data_loader of VirtualBatch: has ended before iteration {self.trainer.iter}; "
                    "it needs a batch for each"
                )
            with self.context():
                self._block.enter_context(virtual_batch(self.model, extra, self.call))

    def after_step(self) -> None:
        self._block.close()

    def after_train(self) -> None:
        self._block.close()


class FreezeBN(Hook):
    """From an iteration on, train with population statistics that stay as they are.

    FrozenBN in the last part of a training, as Wu & Johnson, *Rethinking "Batch" in BatchNorm*, use
    it in the last 20 of 100 epochs. Layers are frozen by :func:`bn_det.freeze`, which warns of
    statistics that were folded into weight and bias where these go on learning: those that nothing
    has updated since a checkpoint was loaded.

    Args:
        iteration: the first one with frozen layers, counted from 0.
        affine: whether weight and bias stay as they are, too, to the bit: momentum and weight decay
            do not move them.
        precise: run right before freezing, as stale statistics would be frozen for good. Without
            it the ranks' EMAs are averaged.
        modules: names of modules or patterns of names, as in :func:`bn_det.freeze`; None for all.

    Raises:
        InputError: before the training begins, if a layer cannot be frozen, or ``modules`` names
            nothing.
    """

    def __init__(
        self,
        iteration: int,
        *,
        affine: bool = False,
        precise: PreciseBN | None = None,
        modules: Modules = None,
    ) -> None:
        self.iteration, self.affine, self.precise = iteration, affine, precise
        self.modules = modules
        self._is_done = False

    def before_train(self) -> None:
        check_freezing(self.trainer.model, self.modules)

    def before_step(self) -> None:
        if self._is_done or self.trainer.iter < self.iteration:
            return
        # A resumed run has frozen statistics already, unless it begins right here.
        if self.trainer.iter == self.iteration:
            self._make_final(self.trainer.model)
        freeze(self.trainer.model, self.modules, affine=self.affine)
        self._is_done = True

    def _make_final(self, model: nn.Module) -> None:
        logger.info(
            "BatchNorm is frozen from iteration %d on, in %s",
            self.iteration,
            self.modules or "all of the model",
        )
        if self.precise is not None:
            self.precise.trainer = self.trainer
            self.precise.update()
        else:
            average_population_statistics(model)


class TuneBN(Hook):
    """Has frozen BatchNorm computed by the convolution before it (:func:`bn_det.tune`).

    In the first step, and in the one in which others are frozen; to be registered after
    :class:`FreezeBN`. The training is the same but for rounding, and so are its checkpoints. The
    log has the layers that are left, and why.

    Args:
        iteration: in which FreezeBN freezes, counted from 0.
    """

    def __init__(self, iteration: int = 0) -> None:
        self.iteration = iteration
        self._has_begun = False

    def before_step(self) -> None:
        if not self._has_begun or self.trainer.iter == self.iteration:
            self._has_begun = True
            report = tune_what_is_frozen(self.trainer.model)
            if report.tuned or self.trainer.iter >= self.iteration:
                self._tell(report)

    def _tell(self, report: TuneReport) -> None:
        logger.info("Frozen BatchNorm is tuned in %d layers", len(report.tuned))
        names: dict[str, list[str]] = {}
        for name, reason in report.left.items():
            names.setdefault(reason, []).append(name)
        for reason, of_reason in names.items():
            logger.info("Not tuned, as %s: %s", reason, ", ".join(of_reason))
        if not report.tuned:
            logger.warning(
                "SOLVER.TUNE_BN: True does nothing here; BatchNorm is frozen by NORM 'FrozenBN', "
                "SOLVER.FREEZE_BN_ITER and FREEZE_BN_MODULES"
            )


class RenormSchedule(Hook):
    """Relaxes the limits of batch renormalization, from those of batch normalization on.

    Linearly, as Ioffe, *Batch Renormalization*, 2017, Sec. 4.1: while the model changes fast, its
    population statistics are of no use. For every layer of ours that has limits.

    Args:
        limits: to reach in the end.
        warmup_iters: the iterations of batch normalization.
        r_max_iter, d_max_iter: the iterations from which on r_max and d_max are reached.
    """

    def __init__(
        self, limits: RenormLimits, warmup_iters: int, r_max_iter: int, d_max_iter: int
    ) -> None:
        self.limits, self.warmup_iters = limits, warmup_iters
        self.r_max_iter, self.d_max_iter = r_max_iter, d_max_iter

    def before_step(self) -> None:
        limits = RenormLimits(
            1 + (self.limits.r_max - 1) * self._progress(self.r_max_iter),
            self.limits.d_max * self._progress(self.d_max_iter),
        )
        for layer in self.trainer.model.modules():
            if isinstance(layer, BatchNorm2d) and layer.renorm is not None:
                layer.renorm = limits

    def _progress(self, end: int) -> float:
        done = self.trainer.iter - self.warmup_iters
        return min(max(done / max(end - self.warmup_iters, 1), 0.0), 1.0)
