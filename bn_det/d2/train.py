"""The main job on the Detectron2 host."""

from __future__ import annotations

import argparse
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.evaluation import COCOEvaluator, inference_context
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from ..commands.checkpoint import check_start
from ..commands.cli import names_weights, start
from ..commands.launch import world_size
from ..commands.results import results_table, save_results
from ..config.check import check_ims_per_batch, resolve_device
from ..config.keys import add_bn_det_config
from ..config.load import load_config
from ..config.training import (
    clipping_of,
    evaluated_by_batch,
    mixed_precision_of,
    smallest_image,
)
from ..config.unread import HOOK_KEYS, TRAINER_KEYS
from ..data.coco import check_names, check_tested_categories
from ..layers import name_layers
from .accumulate import AccumulatingAMPTrainer, AccumulatingTrainer
from .datasets import (
    build_test_loader,
    build_train_loader,
    check_files,
    load_training,
    register_datasets,
)
from .default_trainer import BNHooks
from .engine import Checkpointer, EvaluatesOnSuccess, finite_boxes, set_up_group_and_log
from .hooks import set_up_log
from .mapper import Mapper


class Trainer(EvaluatesOnSuccess, BNHooks, DefaultTrainer):
    """DefaultTrainer with COCO evaluation, and with checkpoints that survive any interruption.

    It trains in processes on the CPU, too.
    """

    reads_keys = (*HOOK_KEYS, *TRAINER_KEYS)

    build_test_loader = staticmethod(build_test_loader)

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own gives DistributedDataParallel the number of a GPU in any case.
        super(DefaultTrainer, self).__init__()
        for name in ("detectron2", "fvcore", "bn_det"):
            set_up_log(name)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        ddp_model = create_ddp_model(model, broadcast_buffers=False, **on_cpu)
        of_step = ddp_model, self.build_train_loader(cfg), optimizer
        if precision := mixed_precision_of(cfg):
            self._trainer = AccumulatingAMPTrainer(*of_step, precision)
        else:
            self._trainer = AccumulatingTrainer(*of_step)
        self._trainer.num_batches = cfg.SOLVER.ACCUMULATE
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self.checkpointer.save_final(self.iter, self.max_iter)

    def train(self) -> dict[str, Any]:
        """Train and evaluate.

        Returns:
            the results of the last evaluation, empty without a test set.
        """
        if self.cfg.TEST.BN_STATISTICS == "batch":
            check_evaluation(self.cfg, self.model)
        super().train()
        return getattr(self, "_last_eval_results", {})

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """As Detectron2's; FloatingPointError for boxes that are NaN or infinite."""
        with finite_boxes():
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        return name_layers(super().build_model(cfg), cfg.SOLVER.SYNC_BN_TIMEOUT)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        optimizer = super().build_optimizer(cfg, model)
        if cfg.SOLVER.AGC.ENABLED:
            clipping_of(cfg, model).attach(optimizer)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return load_training(cfg, build_train_loader)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return COCOEvaluator(dataset_name, output_dir=folder)


def check_evaluation(cfg: CfgNode, model: nn.Module) -> None:
    """Raise InputError for a test image that has no batch statistics, before the training."""
    mapper = Mapper(cfg, is_train=False)
    for name in cfg.DATASETS.TEST:
        image = smallest_image(cfg, get_detection_dataset_dicts(name, filter_empty=False))
        with evaluated_by_batch(image["file_name"]), inference_context(model), torch.no_grad():
            model([mapper(image)])


def main(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, as the flags of ``bn-det train`` say."""
    if args.config_file.endswith(".py"):
        from .lazy_train import main as lazy_main  # which builds on this module

        lazy_main(args)
    else:
        start(_run, args, setup(args))


def read_config(config_file: str, opts: Sequence[str]) -> CfgNode:
    """Detectron2's config with our keys, a file's values and KEY VALUE pairs."""
    cfg = get_cfg()
    add_bn_det_config(cfg)
    load_config(cfg, config_file, opts, "Detectron2")
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """Load the config and check what it names, before any process is started."""
    cfg = read_config(args.config_file, args.opts)
    num_processes = world_size(args.num_gpus, args.num_machines)
    if not args.eval_only:
        check_ims_per_batch(cfg, num_processes)
    check_start(cfg, args)
    register_datasets(cfg)
    check_data(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    resolve_device(cfg)
    cfg.freeze()
    return cfg


def check_data(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Look at what DATASETS names, and of some of its splits at the annotation files."""
    for split in ("TRAIN", "TEST"):
        check_names(f"DATASETS.{split}", cfg.DATASETS[split], DatasetCatalog.list())
    categories = [check_files(cfg, split) for split in splits]
    if len(categories) > 1:
        check_tested_categories(*categories)


def load_model(cfg: CfgNode, resume: bool, is_mended: bool = False) -> nn.Module:
    """The config's model with the weights of a checkpoint, all of which have to fit.

    Args:
        resume: whether they are the last ones of OUTPUT_DIR rather than MODEL.WEIGHTS.
        is_mended: whether broken statistics are accepted (CheckpointerMixin).
    """
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
    checkpointer.must_match, checkpointer.is_mended = True, is_mended
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def set_up_process(args: argparse.Namespace, cfg: CfgNode) -> None:
    """What each of the processes of a command does first: its group, data sets, log and seed."""
    register_datasets(cfg)
    set_up_group_and_log(args, cfg, cfg.OUTPUT_DIR)


def _run(args: argparse.Namespace, cfg: CfgNode) -> None:
    set_up_process(args, cfg)
    if args.eval_only:
        model = load_model(cfg, args.resume)
        with names_weights(args):
            results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if results and comm.is_main_process():
        print(results_table(results))
        save_results(results, cfg.OUTPUT_DIR)
