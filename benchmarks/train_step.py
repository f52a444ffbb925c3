#!/usr/bin/env python
"""A training step of the shapes RetinaNets, whatever their norm, against a stock one with BN.

Stock is Detectron2's RetinaNet, head, backbone and DefaultTrainer, or, where Detectron2 is not
installed, torchvision's with torch's layers (in the head one for each level, called in turn); with
the values of --stock's config. A step is what the trainer and its hooks do for one step of the
optimizer, gradients of several batches and extra images included. Not included are the loading of
data (the same few batches again and again) and what happens only now and then: evaluation, saving,
PreciseBN and, at iteration FREEZE_BN_ITER, freezing.

Steps of stock and of a way alternate, so that drifts cancel; a ratio is the median of the rounds'.
Ways with another batch size, say, are compared as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import nn
from yacs.config import CfgNode

from bn_det import convert_batchnorm
from bn_det.commands.cli import import_host, run
from bn_det.errors import InputError
from bn_det.training.hooks import VirtualBatch
from stock import with_stock_heads
from timing import seconds

CONFIGS = Path(__file__).parents[1] / "configs"
STOCK_OPTS = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
]
"""What makes stock Detectron2's detector of one of ours."""


def ways_in(configs: list[str]) -> dict[str, str]:
    """The config files by name, without those that others begin with."""
    paths = [str(p) for p in (CONFIGS / "ways" / "shapes").glob("*.yaml")]
    paths = configs or [str(CONFIGS / "quick_start.yaml"), *sorted(paths)]
    ways: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        if ways.setdefault(name, path) != path:
            raise InputError(f"--configs: {ways[name]} and {path} have the same name")
    return {name: path for name, path in ways.items() if not name.startswith("Base-")}


class Steps:
    """Steps of a trainer on a few batches that are in memory."""

    def __init__(self, trainer: Any, num_batches: int) -> None:
        self.trainer = trainer
        for hook in trainer._hooks:
            if isinstance(hook, VirtualBatch):
                hook.data_loader = in_memory(hook.data_loader, num_batches)

    def __call__(self) -> None:
        raise NotImplementedError


class Detectron2Steps(Steps):
    def __init__(self, trainer: Any, num_batches: int) -> None:
        from detectron2.utils.events import EventStorage

        super().__init__(trainer, num_batches)
        loop = trainer._trainer
        loop._data_loader_iter_obj = in_memory(loop.data_loader, num_batches)
        trainer.storage = EventStorage()
        with trainer.storage:
            trainer.before_train()

    def __call__(self) -> None:
        trainer = self.trainer
        with trainer.storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1


class TorchvisionSteps(Steps):
    def __init__(self, trainer: Any, num_batches: int) -> None:
        trainer.iter = 0  # where the extra images begin
        super().__init__(trainer, num_batches)
        self.batches = in_memory(trainer._batches(0), num_batches)
        trainer.model.train()
        trainer._call_hooks("before_train")

    def __call__(self) -> None:
        trainer = self.trainer
        of_step = list(itertools.islice(self.batches, trainer.cfg.SOLVER.ACCUMULATE))
        trainer._call_hooks("before_step")
        trainer.run_step(of_step)
        trainer._call_hooks("after_step")
        trainer.iter += 1


def in_memory(batches: Iterable, number: int) -> Iterator:
    """The first of the batches, again and again."""
    return itertools.cycle(list(itertools.islice(batches, number)))


class Host:
    """Detectron2 or torchvision: configs, trainers and steps.

    Attributes:
        name: "detectron2" or "torchvision".
    """

    def __init__(self, module: ModuleType, opts: list[str], num_steps: int, folder: str) -> None:
        self.module, self.opts = module, opts
        self.name = "detectron2" if ".d2." in module.__name__ else "torchvision"
        # Nothing that happens now and then.
        last = str(2**31)
        self.periods = [
            *("SOLVER.MAX_ITER", str(10 * num_steps), "SOLVER.CHECKPOINT_PERIOD", last),
            *("TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", folder),
        ]

    def cfg(self, path: str, opts: list[str] = ()) -> CfgNode:
        """A config, checked; of a RetinaNet of ours, but for the opts."""
        args = argparse.Namespace(config_file=path, eval_only=False, resume=False)
        args.num_gpus = args.num_machines = 1
        args.opts = [*self.periods, *self.opts]
        cfg = self.module.setup(args)
        if cfg.MODEL.META_ARCHITECTURE != "BNRetinaNet":
            raise InputError(
                f"--configs: {path} is not accepted: its MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE!r}; use configs of 'BNRetinaNet'"
            )
        if opts:
            cfg.defrost()
            cfg.merge_from_list(list(opts))
            cfg.freeze()
        return cfg

    def way(self, path: str, num_batches: int) -> Steps:
        return self._steps(self.module.Trainer, self.cfg(path), num_batches)

    def stock(self, path: str, num_batches: int) -> Steps:
        if self.name == "detectron2":
            from detectron2.engine import DefaultTrainer

            return self._steps(DefaultTrainer, self.cfg(path, STOCK_OPTS), num_batches)
        steps = self._steps(self.module.Trainer, self.cfg(path), num_batches)
        # Parameters stay the same objects, which the optimizer has.
        with_stock_heads(convert_batchnorm(steps.trainer.model, nn.BatchNorm2d))
        return steps

    def _steps(self, trainer: Callable, cfg: CfgNode, num_batches: int) -> Steps:
        random.seed(0)  # the same batches for all
        np.random.seed(0)
        torch.manual_seed(0)
        kind = Detectron2Steps if self.name == "detectron2" else TorchvisionSteps
        return kind(trainer(cfg), num_batches)


def compare(stock: Steps, way: Steps, num_steps: int) -> list[tuple[float, float]]:
    """Milliseconds of each step of both."""
    times = []
    for k in range(num_steps):
        ms = {steps: 1e3 * seconds(steps) for steps in ((stock, way) if k % 2 else (way, stock))}
        times.append((ms[stock], ms[way]))
    return times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        num_steps = args.warm_up + args.rounds
        host = Host(import_host(args.host, "train"), args.opts, num_steps, folder)
        ways = ways_in(args.configs)
        for path in (args.stock, *ways.values()):
            host.cfg(path)  # before an hour has passed
        stock_ms, results = [], {}
        for name, path in ways.items():
            times = compare(
                host.stock(args.stock, args.num_batches),
                host.way(path, args.num_batches),
                num_steps,
            )[args.warm_up :]
            stock_ms += [theirs for theirs, _ in times]
            results[name] = {
                "ms": statistics.median(ours for _, ours in times),
                "ratio": statistics.median(ours / theirs for theirs, ours in times),
            }
            print("{}: {ms:.1f} ms, ratio {ratio:.3f}".format(name, **results[name]), flush=True)
    return {"host": host.name, "stock_ms": statistics.median(stock_ms), "ways": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--host", choices=["auto", "detectron2", "torchvision"], default="auto")
    parser.add_argument(
        "--configs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="by default configs/quick_start.yaml and configs/ways/shapes/*.yaml",
    )
    parser.add_argument("--stock", default=str(CONFIGS / "quick_start.yaml"), metavar="FILE")
    parser.add_argument("--rounds", type=int, default=30, help="steps that count, of each")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before, of each")
    parser.add_argument("--num-batches", type=int, default=4, help="in memory")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of all configs"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    for name in ("detectron2", "fvcore"):
        # Otherwise DefaultTrainer sets up its own log, on stdout.
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['host']}: stock {result['stock_ms']:.1f} ms")
    rows = [[name, *of_way.values()] for name, of_way in result["ways"].items()]
    print(tabulate(rows, ["way", "ms", "ratio"], floatfmt=".3f"))


if __name__ == "__main__":
    run(main)
