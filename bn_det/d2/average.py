"""Averaging checkpoints on the Detectron2 host."""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts

from ..commands.average import Host, check, run
from ..config.training import with_precise_bn_batches
from .leakage import annotated_loader
from .train import Trainer, set_up_process, setup


def main(args: argparse.Namespace) -> None:
    """As tools/average_checkpoints.py says."""
    check(args)
    cfg = setup(args)
    set_up_process(args, cfg)
    model = Trainer.build_model(cfg)
    training = build_detection_train_loader(with_precise_bn_batches(cfg))
    host = Host(model, training, lambda: _testing(cfg), lambda m, batch: m(batch))
    run(args, cfg.TEST.PRECISE_BN.NUM_ITER, host)


def _testing(cfg: CfgNode) -> tuple:
    dataset = get_detection_dataset_dicts(cfg.DATASETS.TEST, filter_empty=True)
    loader = annotated_loader(cfg, dataset, cfg.SOLVER.IMS_PER_BATCH)
    return loader, len(loader)
