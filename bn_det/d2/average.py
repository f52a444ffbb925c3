"""Averaging checkpoints on the Detectron2 host."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode

from ..commands.average import Host, check, run
from ..commands.cli import start
from ..config.training import with_precise_bn_batches
from .datasets import build_bn_loader, known_sources, load_test_images, load_training
from .leakage import annotated_loader
from .train import Trainer, set_up_process, setup


def main(args: argparse.Namespace) -> None:
    """As bn-det average says."""
    cfg = setup(args)
    check(args, cfg, known_sources(cfg))
    args.eval_only = True  # no training, from here on
    start(_run, args, cfg)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    set_up_process(args, cfg)
    model = Trainer.build_model(cfg)
    training = load_training(with_precise_bn_batches(cfg), build_bn_loader)
    host = Host(model, training, lambda: _testing(cfg), lambda m, batch: m(batch))
    run(args, cfg.TEST.PRECISE_BN.NUM_ITER, host)


def _testing(cfg: CfgNode) -> tuple:
    loader = annotated_loader(cfg, load_test_images(cfg), cfg.SOLVER.IMS_PER_BATCH)
    return loader, len(loader)
