"""Training and evaluation of torchvision detectors."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import nn

from ..checkpoint import Checkpointer
from ..data.coco import (
    CocoDataset,
    builtin_sources,
    check_names,
    check_num_classes,
    load_coco,
    registered_sources,
)
from ..errors import InputError
from .data import build_test_loader, build_train_loader
from .evaluation import evaluate
from .model import build_model
from .solver import build_lr_scheduler, build_optimizer
from .writer import MetricsWriter

logger = logging.getLogger(__name__)


class Trainer:
    """A loop over batches: losses, SGD, a checkpoint now and then, an evaluation at the end.

    On a CPU a run that was interrupted and resumed ends with the same weights, to the bit, as one
    that was not: the checkpoint holds the model, the optimizer, the schedule, the iteration, the
    random state and the seed of the data order.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.train_sets = load_datasets(cfg, "TRAIN")
        self.test_sets = load_datasets(cfg, "TEST")
        self.seed = cfg.SEED if cfg.SEED >= 0 else torch.seed() % 2**31
        torch.manual_seed(self.seed)
        self.model = build_model(cfg)
        logger.info("Model:\n%s", self.model)
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.iteration = -1
        self.checkpointer = Checkpointer(self.model, cfg.OUTPUT_DIR, trainer=self)

    def resume_or_load(self, resume: bool) -> None:
        """Continue from the last checkpoint of OUTPUT_DIR, or begin from MODEL.WEIGHTS."""
        self.checkpointer.must_match = resume
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model."""
        return {
            "iteration": self.iteration,
            "seed": self.seed,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random_state": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.seed = state["seed"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random_state"])

    def train(self) -> dict:
        """Train up to MAX_ITER and evaluate.

        Returns:
            the results of the last evaluation, empty without a test set.
        """
        writer = MetricsWriter(self.cfg.OUTPUT_DIR, self.cfg.SOLVER.MAX_ITER)
        try:
            # A run that was stopped in its last evaluation has no iterations left.
            if self.iteration + 1 < self.cfg.SOLVER.MAX_ITER:
                self._train(writer)
            return self._test(writer)
        finally:
            writer.close()

    def _train(self, writer: MetricsWriter) -> None:
        start, max_iter = self.iteration + 1, self.cfg.SOLVER.MAX_ITER
        logger.info("Starting training from iteration %d", start)
        saver = PeriodicCheckpointer(self.checkpointer, self.cfg.SOLVER.CHECKPOINT_PERIOD, max_iter)
        eval_period = self.cfg.TEST.EVAL_PERIOD
        batches = iter(build_train_loader(self.cfg, self.train_sets, self.seed, start))
        self.model.train()
        for self.iteration in range(start, max_iter):
            data_start = time.perf_counter()
            batch = next(batches)
            data_time = time.perf_counter() - data_start
            lr = self.optimizer.param_groups[0]["lr"]
            losses = self.run_step(batch)
            writer.step(self.iteration, lr, data_time, losses)
            saver.step(self.iteration)
            done = self.iteration + 1
            if eval_period > 0 and done % eval_period == 0 and done < max_iter:
                self._test(writer)

    def _test(self, writer: MetricsWriter) -> dict:
        results = test(self.cfg, self.model, self.test_sets)
        if results:
            writer.results(self.iteration, results)
        return results

    def run_step(self, batch: list) -> dict[str, float]:
        """One step of SGD.

        Returns:
            the losses by name, and their sum as ``total_loss``.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        images, targets, _ = zip(*batch, strict=True)
        device = self.cfg.MODEL.DEVICE
        losses = self.model(
            [image.to(device) for image in images],
            [{k: v.to(device) for k, v in target.items()} for target in targets],
        )
        total = sum(losses.values())
        values = {"total_loss": total.item(), **{k: v.item() for k, v in losses.items()}}
        if not torch.isfinite(total):
            raise FloatingPointError(f"loss not finite at iteration {self.iteration}: {values}")
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.scheduler.step()
        return values


def load_datasets(cfg: CfgNode, split: str) -> list[CocoDataset]:
    """The data sets of DATASETS.TRAIN or DATASETS.TEST, checked against the model's classes."""
    known = {**builtin_sources(), **registered_sources(cfg)}
    key = f"DATASETS.{split}"
    names = cfg.DATASETS[split]
    check_names(key, names, known)
    test, masks = split == "TEST", cfg.MODEL.MASK_ON
    datasets = [load_coco(name, known[name], test, masks) for name in names]
    for dataset in datasets:
        if dataset.category_names != datasets[0].category_names:
            raise InputError(
                f"{key}: {names!r} have different categories: {dataset.name} has "
                f"{dataset.category_names}, {datasets[0].name} has {datasets[0].category_names}"
            )
        check_num_classes(cfg, key, dataset.name, len(dataset.category_ids))
    return datasets


def test(cfg: CfgNode, model: nn.Module, datasets: list[CocoDataset]) -> dict:
    """Evaluate on each data set.

    Returns:
        metrics by task; by data set and task where there are several sets.
    """
    results = {}
    for dataset in datasets:
        folder = Path(cfg.OUTPUT_DIR) / "inference"
        if len(datasets) > 1:
            folder /= dataset.name
        loader = build_test_loader(cfg, dataset)
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        results[dataset.name] = evaluate(model, loader, dataset, str(folder), tasks)
    return next(iter(results.values())) if len(results) == 1 else results
