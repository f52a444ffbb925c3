"""The main job on the torchvision host."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from fvcore.common.config import CfgNode

from ..checkpoint import Checkpointer, check_start
from ..config import load_config, resolve_device
from ..errors import InputError
from ..results import results_table
from .config import get_cfg
from .model import build_model
from .trainer import Trainer, load_datasets, test

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, as the flags of ``tools/train_net.py`` say."""
    if args.num_gpus > 1 or args.num_machines > 1:
        raise InputError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: the torchvision host "
            "runs in one process; use 1 and 1"
        )
    cfg = setup(args)
    if args.eval_only:
        model = build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.must_match = True
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = test(cfg, model, load_datasets(cfg, "TEST"))
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if results:
        print(results_table(results))


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config, check what it names, and start the log in OUTPUT_DIR."""
    cfg = get_cfg()
    load_config(cfg, args.config_file, args.opts, "torchvision")
    if cfg.MODEL.WEIGHTS.startswith(("detectron2://", "catalog://")):
        raise InputError(
            f"MODEL.WEIGHTS: {cfg.MODEL.WEIGHTS!r} cannot be resolved by the torchvision host; use "
            "a file or a https:// address of a checkpoint of this host"
        )
    check_start(cfg, args)
    _setup_logging(Path(cfg.OUTPUT_DIR))
    resolve_device(cfg)
    cfg.freeze()
    logger.info("Command line arguments: %s", args)
    logger.info("Running with full config:\n%s", cfg.dump())
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    return cfg


def _setup_logging(output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="[%(asctime)s %(name)s]: %(message)s",
        datefmt="%m/%d %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout), logging.FileHandler(output_dir / "log.txt")],
        force=True,
    )
