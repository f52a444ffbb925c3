"""Recomputing population statistics on the Detectron2 host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from torch import nn

from ..commands.cli import start
from ..commands.recompute import check, flags_as_opts, run, with_population
from ..commands.results import outputs_aside
from ..config.training import with_precise_bn_batches
from .datasets import build_bn_loader, known_sources, load_test_images, load_training
from .mapper import Mapper
from .train import Trainer, load_model, set_up_process, setup


def main(args: argparse.Namespace) -> None:
    """As bn-det recompute says."""
    with flags_as_opts(args):
        cfg = setup(args)
        check(args, cfg, known_sources(cfg))
        start(_run, args, cfg)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    set_up_process(args, cfg)
    old = load_model(cfg, resume=False, is_mended=True)
    new = Trainer.build_model(with_population(cfg, args.population)) if args.population else old
    load = _test_batches if args.adabn else train_batches
    batches = load(with_precise_bn_batches(cfg))
    run(args, cfg, (old, new), batches, partial(_evaluate, cfg))


def _evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    with outputs_aside(cfg) as aside:
        return Trainer.test(aside, model)


def train_batches(cfg: CfgNode) -> Iterable[Any]:
    """As training makes them, of any images."""
    return load_training(cfg, build_bn_loader)


def _test_batches(cfg: CfgNode) -> Iterable[Any]:
    """This process's share of the test set as test time sees it; annotations are not read."""
    return build_detection_test_loader(
        load_test_images(cfg, filter_empty=False),
        mapper=Mapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
    )
