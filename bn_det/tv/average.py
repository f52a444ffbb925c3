"""Averaging checkpoints on the torchvision host."""

from __future__ import annotations

import argparse
from itertools import chain

import torch
from fvcore.common.config import CfgNode

from ..commands.average import Host, check, run
from ..commands.cli import start
from ..config.training import with_precise_bn_batches
from .data import build_test_loader, build_train_loader
from .model import build_model
from .train import setup, start_log
from .trainer import (
    check_datasets,
    known_sources,
    load_annotated,
    load_datasets,
    losses_of,
    shared_seed,
)


def main(args: argparse.Namespace) -> None:
    """As bn-det average says."""
    cfg = setup(args)
    check(args, cfg, known_sources(cfg))
    check_datasets(cfg, "TRAIN")
    args.eval_only = True  # no training, from here on
    start(_run, args, cfg)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    start_log(args, cfg)
    torch.manual_seed(shared_seed(cfg))
    batches = with_precise_bn_batches(cfg)
    training = build_train_loader(batches, load_datasets(batches, "TRAIN"), shared_seed(cfg), 0)
    run(args, cfg.TEST.PRECISE_BN.NUM_ITER, Host(build_model(cfg), training,
                                                 lambda: _testing(cfg), losses_of))  # fmt: skip


def _testing(cfg: CfgNode) -> tuple:
    size, masks = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.MASK_ON
    loaders = [build_test_loader(cfg, dataset, size, masks) for dataset in load_annotated(cfg)]
    return chain(*loaders), sum(map(len, loaders))
