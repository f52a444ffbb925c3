"""The main job on the Detectron2 host."""

from __future__ import annotations

import argparse
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, default_setup, launch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import CheckpointerMixin, check_start
from ..config import add_bn_det_config, load_config, resolve_device
from ..data.coco import CocoSource, check_names, check_num_classes, load_coco
from ..errors import InputError
from ..results import results_table
from .datasets import register_datasets


class Checkpointer(CheckpointerMixin, DetectionCheckpointer):
    """Detectron2's checkpointer with :class:`CheckpointerMixin`."""


class Trainer(DefaultTrainer):
    """DefaultTrainer with COCO evaluation, and with checkpoints that survive any interruption."""

    def build_hooks(self) -> list[HookBase]:
        # Before the hooks that save with it are built.
        self.checkpointer = Checkpointer(
            self.checkpointer.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    def resume_or_load(self, resume: bool = True) -> None:
        self.checkpointer.must_match = resume
        super().resume_or_load(resume)

    def train(self) -> dict[str, Any]:
        """Train and evaluate.

        Returns:
            the results of the last evaluation, empty without a test set.
        """
        super().train()
        return getattr(self, "_last_eval_results", {})

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        with _readable(cfg.DATASETS.TRAIN):
            loader = super().build_train_loader(cfg)
        for name in cfg.DATASETS.TRAIN:
            check_num_classes(
                cfg, "DATASETS.TRAIN", name, len(MetadataCatalog.get(name).thing_classes)
            )
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return COCOEvaluator(dataset_name, output_dir=folder)


def main(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, as the flags of ``tools/train_net.py`` say."""
    if args.num_gpus > 1 and args.num_gpus > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus: {args.num_gpus} is not accepted; this machine has "
            f"{torch.cuda.device_count()}"
        )
    launch(
        _run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args, setup(args)),
    )


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config and check what it names, before any process is started."""
    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, args.config_file, args.opts, "Detectron2")
    ours = cfg.MODEL.META_ARCHITECTURE == "BNRetinaNet" and cfg.MODEL.RETINANET.NORM == "BN"
    if cfg.TEST.PRECISE_BN.ENABLED and ours:
        raise InputError(
            "TEST.PRECISE_BN.ENABLED: True is not accepted with MODEL.RETINANET.NORM 'BN', whose "
            "layers take a list of levels; use False"
        )
    check_start(cfg, args)
    register_datasets(cfg)
    for split in ("TRAIN", "TEST"):
        check_names(f"DATASETS.{split}", cfg.DATASETS[split], DatasetCatalog.list())
    for name in cfg.DATASETS.TEST:
        # Now, and not when the training is done. COCOEvaluator reads the file, too.
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") == "coco":
            source = CocoSource(metadata.json_file, metadata.image_root)
            dataset = load_coco(name, source, True, cfg.MODEL.MASK_ON)
            check_num_classes(cfg, "DATASETS.TEST", name, len(dataset.category_ids))
    resolve_device(cfg)
    cfg.freeze()
    return cfg


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    register_datasets(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="bn_det")
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.must_match = True
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if results and comm.is_main_process():
        print(results_table(results))


@contextmanager
def _readable(names: Sequence[str]) -> Iterator[None]:
    """Turn what Detectron2's loaders raise for a missing or broken file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"DATASETS.TRAIN: {names!r} cannot be loaded: {reason}") from e
