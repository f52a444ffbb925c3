"""Recomputing population statistics on the torchvision host."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ..commands.cli import start
from ..commands.recompute import check, flags_as_opts, run, with_population
from ..commands.results import outputs_aside
from ..config.training import with_precise_bn_batches
from ..layers import record_sources
from ..layers.comm import world
from .data import build_test_loader, build_train_loader
from .model import build_model
from .train import load_model, setup, start_log
from .trainer import (
    check_datasets,
    known_sources,
    load_datasets,
    losses_of,
    shared_seed,
    test,
)


def main(args: argparse.Namespace) -> None:
    """As bn-det recompute says."""
    with flags_as_opts(args):
        cfg = setup(args)
        check(args, cfg, known_sources(cfg))
        if not args.adabn:
            check_datasets(cfg, "TRAIN")
        start(_run, args, cfg)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    start_log(args, cfg)
    torch.manual_seed(shared_seed(cfg))
    old = load_model(cfg, resume=False, is_mended=True)
    new = build_model(with_population(cfg, args.population)) if args.population else old
    load, call = (_test_batches, _detect) if args.adabn else (train_batches, losses_of)
    batches = load(with_precise_bn_batches(cfg))
    run(args, cfg, (old, new), batches, lambda model: _evaluate(cfg, model), call)


def _evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    with outputs_aside(cfg) as aside:
        return test(aside, model, load_datasets(cfg, "TEST"))


def train_batches(cfg: CfgNode) -> Iterable[list]:
    """As training makes them, MAX_ITER of them."""
    return build_train_loader(cfg, load_datasets(cfg, "TRAIN"), shared_seed(cfg), 0)


def _test_batches(cfg: CfgNode) -> Iterable[list]:
    """This process's share of the test set as test time sees it; annotations are not read."""
    size = cfg.SOLVER.IMS_PER_BATCH // world()[1]
    return chain(*(build_test_loader(cfg, d, size) for d in load_datasets(cfg, "TEST")))


def _detect(model: nn.Module, batch: list) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    with record_sources([record for _, _, record in batch]):
        return model([image.to(device) for image, _, _ in batch])
