"""The main job on the torchvision host."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from ..commands.checkpoint import Checkpointer, check_start
from ..commands.cli import names_weights, start
from ..commands.launch import world_size
from ..commands.output_folder import end_logs_that_fail, show_no_settings
from ..commands.results import results_table, save_results
from ..config.check import check_ims_per_batch, resolve_device
from ..config.load import load_config
from ..errors import InputError
from ..files import write_text
from ..layers.comm import world
from .config import check_cfg, get_cfg
from .model import build_model
from .trainer import Trainer, check_datasets, load_datasets, test

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, as the flags of ``bn-det train`` say."""
    start(_run, args, setup(args))


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    start_log(args, cfg)
    if args.eval_only:
        model = load_model(cfg, args.resume)
        with names_weights(args):
            results = test(cfg, model, load_datasets(cfg, "TEST"))
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if results:
        print(results_table(results))
        save_results(results, cfg.OUTPUT_DIR)


def load_model(cfg: CfgNode, resume: bool, is_mended: bool = False) -> nn.Module:
    """The config's model with the weights of a checkpoint, all of which have to fit.

    Args:
        resume: whether they are the last ones of OUTPUT_DIR rather than MODEL.WEIGHTS.
        is_mended: whether broken statistics are accepted (CheckpointerMixin).
    """
    model = build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    checkpointer.must_match, checkpointer.is_mended = True, is_mended
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config and check what it names, before any process is started."""
    cfg = read_config(args.config_file, args.opts)
    num_processes = world_size(args.num_gpus, args.num_machines)
    if not args.eval_only:
        check_ims_per_batch(cfg, num_processes)
    check_start(cfg, args)
    for split in ("TEST",) if args.eval_only else ("TRAIN", "TEST"):
        check_datasets(cfg, split)
    resolve_device(cfg)
    cfg.freeze()
    return cfg


def read_config(config_file: str, opts: Sequence[str]) -> CfgNode:
    """This host's config with a file's values and KEY VALUE pairs."""
    cfg = get_cfg()
    load_config(cfg, config_file, opts, "torchvision")
    if cfg.MODEL.WEIGHTS.startswith(("detectron2://", "catalog://")):
        raise InputError(
            f"MODEL.WEIGHTS: {cfg.MODEL.WEIGHTS!r} cannot be resolved by the torchvision host; use "
            "a file or a https:// address of a checkpoint of this host"
        )
    check_cfg(cfg)
    return cfg


def start_log(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Log to OUTPUT_DIR; of several processes the first to log.txt, which is shown, too.

    The config is written there, but in the place of a training's by a training alone.
    """
    rank, num_ranks = world()
    output_dir = Path(cfg.OUTPUT_DIR)
    output_dir.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(output_dir / (f"log.txt.rank{rank}" if rank else "log.txt"))
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s %(name)s]: %(message)s",
        datefmt="%m/%d %H:%M:%S",
        handlers=[file] if rank else [logging.StreamHandler(sys.stdout), file],
        force=True,
    )
    end_logs_that_fail([""])
    if args.eval_only:
        show_no_settings([""])
    logger.info("Rank of this process: %d of %d", rank, num_ranks)
    logger.info("Command line arguments: %s", args)
    logger.info("Running with full config:\n%s", cfg.dump())
    # A training's, which resuming it goes by, stays.
    if rank == 0 and not (args.eval_only and (output_dir / "config.yaml").exists()):
        write_text(output_dir / "config.yaml", cfg.dump())
