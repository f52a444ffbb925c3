#!/usr/bin/env python
"""Train and evaluate PointDet on a data set in COCO's format."""

import argparse
import os
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import (
    TrainerBase,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pointdet import add_pointdet_config


class Trainer(TrainerBase):
    """Our training loop, which evaluates and saves every so many iterations and at the end."""

    def __init__(self, cfg: CfgNode, model: nn.Module, period: int, resume: bool = False) -> None:
        super().__init__()
        self.cfg, self.period = cfg, period
        self.optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, optimizer=self.optimizer, scheduler=scheduler
        )
        loaded = self.checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        self.first_iter = loaded.get("iteration", -1) + 1
        self.model = parallel(cfg, model)
        self.batches = iter(train_loader(cfg))
        between_steps = [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, scheduler),
            hooks.CallbackHook(after_step=Trainer.evaluate_and_save),
        ]
        if comm.is_main_process():
            writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER)
            between_steps.append(hooks.PeriodicWriter(writers))
        self.register_hooks(between_steps)

    def run_step(self) -> None:
        losses = self.model(next(self.batches))
        total = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        values = {name: float(x) for name, x in comm.reduce_dict(losses).items()}
        if not torch.isfinite(total):
            raise FloatingPointError(f"iteration {self.iter}: {values}")
        if comm.is_main_process():
            self.storage.put_scalars(total_loss=sum(values.values()), **values)

    def evaluate_and_save(self) -> None:
        done = self.iter + 1
        if done < self.max_iter and (self.period == 0 or done % self.period):
            return
        results = evaluate(self.cfg, self.model)
        if comm.is_main_process():
            self.storage.put_scalars(**results.get("bbox", {}), smoothing_hint=False)
            self.checkpointer.save(f"model_{done:06d}", iteration=self.iter)
        comm.synchronize()


def train_loader(cfg: CfgNode) -> Iterable[list[dict]]:
    """Batches without end, in other contrasts and mirrored."""
    augmentations = [
        T.ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        ),
        T.RandomContrast(0.8, 1.2),
        T.RandomFlip(),
    ]
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    return build_detection_train_loader(cfg, mapper=mapper)


def parallel(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model for as many processes as there are, on GPUs or not."""
    if comm.get_world_size() == 1:
        return model
    devices = None if cfg.MODEL.DEVICE == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """COCO's results; empty but in the main process."""
    (name,) = cfg.DATASETS.TEST
    evaluator = COCOEvaluator(name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
    results = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results or {}


def setup(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_pointdet_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    default_setup(cfg, args)
    root = cfg.DATASETS.ROOT
    for split in ("train", "val"):
        annotations = os.path.join(root, "annotations", f"instances_{split}.json")
        register_coco_instances(f"pointdet_{split}", {}, annotations, os.path.join(root, split))
    return cfg


def main(args: argparse.Namespace) -> None:
    cfg = setup(args)
    model = build_model(cfg)
    if args.eval_only:
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        evaluate(cfg, model)
        return
    trainer = Trainer(cfg, model, cfg.TEST.EVAL_PERIOD, args.resume)
    trainer.train(trainer.first_iter, cfg.SOLVER.MAX_ITER)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
