"""Training and evaluation of torchvision detectors."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.checkpoint import PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..commands.checkpoint import Checkpointer
from ..config.training import (
    build_hooks,
    evaluated_by_batch,
    mixed_precision_of,
    precise_bn_of,
    smallest_image,
    source_of,
    uses_precise_bn,
    with_precise_bn_batches,
    with_virtual_batches,
)
from ..data.coco import (
    CocoDataset,
    CocoSource,
    builtin_sources,
    check_categories,
    check_names,
    check_num_classes,
    check_tested_categories,
    load_coco,
    prepare,
    registered_sources,
    without_objects,
)
from ..layers import record_sources
from ..layers.comm import all_gather, process_group, world
from ..training.accumulate import accumulate
from ..training.hooks import Hook, PreciseBN, VirtualBatch
from ..training.mixed_precision import autocast, grad_scaler
from .data import build_test_loader, build_train_loader, has_objects
from .evaluation import evaluate, predict
from .model import build_model
from .solver import build_lr_scheduler, build_optimizer
from .writer import MetricsWriter

logger = logging.getLogger(__name__)


class Trainer:
    """A loop over batches: losses, SGD, a checkpoint now and then, an evaluation at the end.

    In a process group each process takes its share of every batch (DistributedDataParallel), and
    rank 0 alone writes.

    On a CPU a run that was interrupted and resumed ends with the same weights, to the bit, as one
    that was not: the checkpoint holds the model, the optimizer, the schedule, the iteration, the
    random states and the seed of the data order. With more than two processes that is as good as
    the order in which gloo adds, and with another number of processes the random states are new.

    Attributes:
        model: without DistributedDataParallel around it.
        iter: the iteration that is done or was done last, from 0; after the training ``max_iter``.
        max_iter: the number of iterations.
        total_loss: of the last step, the mean of all ranks; None before it, and on other ranks
            than 0.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.train_sets = load_datasets(cfg, "TRAIN")
        self.test_sets = load_datasets(cfg, "TEST")
        check_tested_categories(
            *(
                {dataset.name: dataset.category_names for dataset in datasets}
                for datasets in (self.train_sets, self.test_sets)
            )
        )
        self.rank, self.num_ranks = world()
        self.seed = shared_seed(cfg)
        torch.manual_seed(self.seed)
        self.model = build_model(cfg)
        logger.info("Model:\n%s", self.model)
        self._parallel = _parallel(self.model) if self.num_ranks > 1 else self.model
        if self.rank > 0:  # the weights are the same, what is sampled in training is not
            torch.manual_seed(self.seed + self.rank)
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        precision = cfg.MODEL.DEVICE, mixed_precision_of(cfg)
        self._losses_of = autocast(*precision)(losses_of)
        self.grad_scaler = grad_scaler(*precision)
        self.iter, self.max_iter = -1, cfg.SOLVER.MAX_ITER
        self.total_loss: float | None = None
        self.checkpointer = Checkpointer(
            self.model, cfg.OUTPUT_DIR, save_to_disk=self.rank == 0, trainer=self
        )
        self._writer: MetricsWriter | None = None
        self._hooks: list[Hook] = []
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[Hook]:
        """The hooks that the config asks for."""
        precise = virtual = None
        if uses_precise_bn(self.cfg):
            precise = PreciseBN(
                model=self.model,
                data_loader=_PreciseBatches(weakref.proxy(self)),
                call=self._losses_of,
                **precise_bn_of(self.cfg),
            )
        if self.cfg.SOLVER.VIRTUAL_IMAGES:
            virtual = VirtualBatch(self.model, _ExtraBatches(weakref.proxy(self)), self._losses_of)
        return build_hooks(self.cfg, precise, virtual)

    def register_hooks(self, hooks: Iterable[Hook]) -> None:
        """Have hooks called in order; after a step, before checkpoint and evaluation."""
        for hook in hooks:
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def resume_or_load(self, resume: bool) -> None:
        """Continue from the last checkpoint of OUTPUT_DIR, or begin from MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.checkpointer.save_final(self.iter, self.max_iter)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model. All processes have to call it."""
        return {
            "iteration": self.iter,
            "seed": self.seed,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "random_state": self._random_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iter = state["iteration"]
        self.seed = state["seed"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if of_scaler := state.get("grad_scaler"):  # there is none of a run in float32
            self.grad_scaler.load_state_dict(of_scaler)
        states = torch.atleast_2d(state["random_state"])
        if len(states) == self.num_ranks:
            torch.set_rng_state(states[self.rank].clone())  # it takes no view
        else:
            logger.warning(
                "The checkpoint has the random states of %d processes, and these are %d: "
                "theirs are made from the seed anew",
                len(states),
                self.num_ranks,
            )
            torch.manual_seed(hash((self.seed, self.iter, self.rank)) % 2**63)

    def _random_states(self) -> Tensor:
        """Those of all processes, shape (number of processes, number of bytes)."""
        state, group = torch.get_rng_state(), process_group("world")
        if group is None:
            return state[None]
        return all_gather(state.to(self.cfg.MODEL.DEVICE), group).cpu()

    def train(self) -> dict:
        """Train up to MAX_ITER and evaluate.

        Returns:
            the results of the last evaluation, empty without a test set and on other ranks than 0.
        """
        if self.rank == 0:
            self._writer = MetricsWriter(self.cfg.OUTPUT_DIR, self.max_iter)
        try:
            # A run that was stopped in its last evaluation has no iterations left.
            if self.iter + 1 < self.max_iter:
                self._train()
            return self._test(self.max_iter - 1)
        finally:
            if self._writer:
                self._writer.close()

    def _check_evaluation(self) -> None:
        """Raise InputError for a test image that has no batch statistics, before the training."""
        if self.cfg.TEST.BN_STATISTICS != "batch":
            return
        for dataset in self.test_sets:
            image = smallest_image(self.cfg, dataset.records)
            alone = dataset._replace(records=[image])
            with evaluated_by_batch(image["file_name"]):
                predict(self.model, build_test_loader(self.cfg, alone), alone)

    def _train(self) -> None:
        self._check_evaluation()
        self.iter, max_iter = self.iter + 1, self.max_iter
        start = self.iter
        logger.info("Starting training from iteration %d", start)
        saver = PeriodicCheckpointer(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD, max_iter)
        eval_period = self.cfg.TEST.EVAL_PERIOD
        batches, num_batches = self._batches(start), self.cfg.SOLVER.ACCUMULATE
        self.model.train()
        self._call_hooks("before_train")
        try:
            for self.iter in range(start, max_iter):
                self._call_hooks("before_step")
                data_start = time.perf_counter()
                of_step = list(islice(batches, num_batches))
                data_time = time.perf_counter() - data_start
                lr = self.optimizer.param_groups[0]["lr"]
                losses = self.run_step(of_step)
                if self._writer:
                    self.total_loss = losses["total_loss"]
                    self._writer.step(self.iter, lr, data_time, losses)
                self._call_hooks("after_step")
                saver.step(self.iter)
                done = self.iter + 1
                if eval_period > 0 and done % eval_period == 0 and done < max_iter:
                    self._test(self.iter)
            self.iter += 1
        finally:  # as in Detectron2, where iter tells a hook whether the training was finished
            self._call_hooks("after_train")

    def _batches(self, start: int) -> Iterator[list]:
        """Those of the steps from an iteration on."""
        cfg, num_batches = self.cfg.clone(), self.cfg.SOLVER.ACCUMULATE
        cfg.defrost()
        cfg.SOLVER.MAX_ITER *= num_batches
        return iter(build_train_loader(cfg, self.train_sets, self.seed, start * num_batches))

    def _call_hooks(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()

    def _test(self, iteration: int) -> dict:
        results = test(self.cfg, self.model, self.test_sets)
        if results and self._writer:
            self._writer.results(iteration, results)
        return results

    def put_scalars(self, scalars: dict[str, float]) -> None:
        """Write metrics of this iteration."""
        if self._writer:
            self._writer.results(self.iter, scalars)

    def run_step(self, batches: list[list]) -> dict[str, float]:
        """One step of SGD, on the batches of a step.

        Returns:
            the losses by name, and their sum as ``total_loss``; on rank 0 the mean of all ranks.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        self.optimizer.zero_grad()
        losses = accumulate(self._parallel, batches, self._losses_of, self._backward)
        total = reduce(torch.add, losses.values())
        names = ["total_loss", *losses]
        values = torch.stack([total, *losses.values()])
        if not torch.isfinite(total):
            named = dict(zip(names, values.tolist(), strict=True))
            raise FloatingPointError(f"loss not finite at iteration {self.iter}: {named}")
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.scheduler.step()
        if self.num_ranks > 1:
            dist.reduce(values, 0)
            values /= self.num_ranks
        return dict(zip(names, values.tolist(), strict=True))

    def _backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()


def losses_of(model: nn.Module, batch: list) -> dict[str, Tensor]:
    """Of a model in training mode on a batch of the loader."""
    device = next(model.parameters()).device
    images, targets, records = zip(*batch, strict=True)
    with record_sources(records):
        return model(
            [image.to(device) for image in images],
            [{k: v.to(device) for k, v in target.items()} for target in targets],
        )


class _PreciseBatches:
    """Batches for PreciseBN, each time from the first on, in another order than the training's.

    So they depend on the seed alone, which a resumed trainer takes from its checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[list]:
        cfg = with_precise_bn_batches(self.trainer.cfg)
        seed = self.trainer.seed + 1
        return iter(build_train_loader(cfg, self.trainer.train_sets, seed, start_iter=0))


class _ExtraBatches:
    """Batches of extra images from the trainer's iteration on, in an order of their own."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[list]:
        cfg, trainer = with_virtual_batches(self.trainer.cfg), self.trainer
        return iter(build_train_loader(cfg, trainer.train_sets, trainer.seed + 2, trainer.iter))


def shared_seed(cfg: CfgNode) -> int:
    """SEED, or a random one, which rank 0 chooses."""
    if cfg.SEED >= 0:
        return cfg.SEED
    seed = torch.tensor(torch.seed() % 2**31, device=cfg.MODEL.DEVICE)
    if world()[1] > 1:
        dist.broadcast(seed, 0)
    return int(seed)


def _parallel(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients that are averaged over all processes, and nothing else shared."""
    with warnings.catch_warnings():
        # torch 2.15 wants another name for the option, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def known_sources(cfg: CfgNode) -> dict[str, CocoSource]:
    """Where the data sets lie that a config can name."""
    return {**builtin_sources(), **registered_sources(cfg)}


def check_datasets(cfg: CfgNode, split: str) -> None:
    """Check that the data sets of DATASETS.TRAIN or DATASETS.TEST are there; generate ours."""
    known = known_sources(cfg)
    check_names("DATASETS.SOURCES", source_of(cfg), known)
    check_names(f"DATASETS.{split}", cfg.DATASETS[split], known)
    for name in cfg.DATASETS[split]:
        prepare(name, known[name])


def load_datasets(cfg: CfgNode, split: str) -> list[CocoDataset]:
    """The data sets of DATASETS.TRAIN or DATASETS.TEST, checked against the model's classes."""
    known = known_sources(cfg)
    key = f"DATASETS.{split}"
    names = cfg.DATASETS[split]
    check_names(key, names, known)
    needs = {"for_evaluation": split == "TEST", "with_masks": cfg.MODEL.MASK_ON}
    datasets = [load_coco(name, known[name], **needs) for name in names]
    check_categories(key, {dataset.name: dataset.category_names for dataset in datasets})
    for dataset in datasets:
        check_num_classes(cfg, key, dataset.name, len(dataset.category_ids))
        for record in dataset.records:
            record["source"] = source_of(cfg).get(dataset.name)
    return datasets


def load_annotated(cfg: CfgNode) -> list[CocoDataset]:
    """The data sets of DATASETS.TEST without the images that training leaves out, too."""
    datasets = [
        dataset._replace(records=[r for r in dataset.records if has_objects(r)])
        for dataset in load_datasets(cfg, "TEST")
    ]
    datasets = [dataset for dataset in datasets if dataset.records]
    if not datasets:
        raise without_objects("DATASETS.TEST", cfg.DATASETS.TEST)
    return datasets


def test(cfg: CfgNode, model: nn.Module, datasets: list[CocoDataset]) -> dict:
    """Evaluate on each data set.

    Returns:
        metrics by task; by data set and task where there are several sets. Empty on other ranks
        than 0.
    """
    results = {}
    for dataset in datasets:
        folder = Path(cfg.OUTPUT_DIR) / "inference"
        if len(datasets) > 1:
            folder /= dataset.name
        loader = build_test_loader(cfg, dataset)
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        results[dataset.name] = evaluate(model, loader, dataset, str(folder), tasks)
    if world()[0] > 0:
        return {}
    return next(iter(results.values())) if len(results) == 1 else results
