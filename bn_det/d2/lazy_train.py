"""The main job on the Detectron2 host, from a LazyConfig file.

It does what Detectron2's ``tools/lazyconfig_train_net.py`` does, also on the CPU and in several
processes there, with checkpoints that survive any interruption, and with errors of one line.
"""

from __future__ import annotations

import argparse
import builtins
import os
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.engine import SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..commands.checkpoint import check_files
from ..commands.cli import start_in
from ..commands.launch import world_size
from ..commands.results import results_table
from ..config.check import usable_device
from ..config.packaged import no_config
from ..config.ranges import RANGES, check_value
from ..data.coco import check_names
from ..errors import InputError, nearest
from ..layers import name_layers
from .accumulate import AccumulatingAMPTrainer
from .engine import (
    Checkpointer,
    EvaluatesOnSuccess,
    finite_boxes,
    readable_datasets,
    set_up_group_and_log,
)

NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
"""What a file has to have."""


class _SimpleTrainer(EvaluatesOnSuccess, SimpleTrainer):
    pass


class _AMPTrainer(EvaluatesOnSuccess, AccumulatingAMPTrainer):
    pass


def main(args: argparse.Namespace) -> None:
    """Train and evaluate, or only evaluate, as the flags of ``bn-det train`` say."""
    loaded = _Loaded(args)
    train = loaded.cfg.train
    start_in(("train.output_dir", train.output_dir), _run, (args, loaded), args, train.device)


class _Loaded:
    """The config of a command, which each started process loads by itself.

    What it has, a function of the file for example, need not be such that it can be sent; and
    loading may register data sets.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.cfg = args, setup(args)

    def __reduce__(self) -> tuple[type[_Loaded], tuple[argparse.Namespace]]:
        return type(self), (self.args,)


def setup(args: argparse.Namespace) -> DictConfig:
    """Load the file and check what it names, before anything is built or started.

    Raises:
        InputError: the file or an override is not accepted, or there is no such data set,
            checkpoint or device.
    """
    cfg = load_lazy_config(args.config_file, args.opts)
    train = cfg.train
    check_value("train.output_dir", train.output_dir, RANGES["OUTPUT_DIR"])
    files = ("train.output_dir", train.output_dir), ("train.init_checkpoint", train.init_checkpoint)
    check_files(args, *files)
    if "dtype" in train.amp:
        check_value("train.amp.dtype", train.amp.dtype, RANGES["SOLVER.AMP.DTYPE"])
    train.device = usable_device("train.device", train.device)
    for split in ("train", "test"):
        names = _dataset_names(cfg, split)
        check_names(f"dataloader.{split}.dataset.names", names, DatasetCatalog.list())
    batch_size = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    num_processes = world_size(args.num_gpus, args.num_machines)
    if not args.eval_only and batch_size is not None and batch_size % num_processes:
        raise InputError(
            f"dataloader.train.total_batch_size: {batch_size!r} is not accepted with "
            f"{num_processes} processes; use a multiple of {num_processes}"
        )
    return cfg


def load_lazy_config(path: str, overrides: list[str]) -> DictConfig:
    """A LazyConfig file, which is run as Python code, with KEY=VALUE overrides.

    A key is one that the file has; ``+KEY=VALUE`` adds one, such as an argument of a node.

    Raises:
        InputError: the file is missing, fails or lacks one of NODES, or an override is not
            accepted.
    """
    if not os.path.isfile(path):
        raise InputError(f"--config-file: {no_config(path)}")
    builtin_import = builtins.__import__
    try:
        cfg = LazyConfig.load(path)
    except Exception as e:  # whatever its code raises
        raise InputError(f"--config-file: {path} cannot be loaded: {_reason(e)}") from e
    finally:
        # Detectron2 leaves its own in place after an error.
        builtins.__import__ = builtin_import
    missing = [name for name in NODES if name not in cfg]
    if missing:
        raise InputError(f"--config-file: {path} has no {missing[0]!r}; it needs {list(NODES)}")
    for override in overrides:
        _override(cfg, override)
    return cfg


def _override(cfg: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise InputError(
            f"{override}: is not KEY=VALUE, which LazyConfig files take (KEY VALUE is for YAML)"
        )
    if not key.startswith("+"):
        _check_key(cfg, key)
    try:
        LazyConfig.apply_overrides(cfg, [override])
    except Exception as e:  # of the parser, hydra's if it is installed, and of OmegaConf
        raise InputError(f"{override}: is not accepted: {_reason(e)}") from e


def _check_key(cfg: DictConfig, key: str) -> None:
    node: Any = cfg
    for name in key.split("."):
        if isinstance(node, DictConfig):
            known = [str(k) for k in node]
        else:
            known = [str(k) for k in range(len(node))] if isinstance(node, ListConfig) else []
        if name not in known:
            raise InputError(
                f"{key}: there is no {name!r}; {nearest(name, known)}; +{key}=VALUE adds it"
            )
        node = node[name] if isinstance(node, DictConfig) else node[int(name)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _dataset_names(cfg: DictConfig, split: str) -> list[str]:
    """Of dataloader.train or dataloader.test, where it has them as usual."""
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names", default=[])
    return [names] if isinstance(names, str) else list(names)


def _run(args: argparse.Namespace, loaded: _Loaded) -> None:
    cfg = loaded.cfg
    set_up_group_and_log(args, cfg, cfg.train.output_dir)
    model = name_layers(instantiate(cfg.model).to(cfg.train.device))
    results = _evaluate(args, cfg, model) if args.eval_only else _train(args, cfg, model)
    if results and comm.is_main_process():
        print(results_table(results))


def _evaluate(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> Mapping[str, Any]:
    checkpointer = Checkpointer(model, cfg.train.output_dir)
    checkpointer.must_match = True
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return _test(cfg, model)


def _train(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> Mapping[str, Any]:
    """Train, and evaluate now and then; the results of the last evaluation."""
    train = cfg.train
    cfg.optimizer.params.model = model
    with readable_datasets("dataloader.train", _dataset_names(cfg, "train")):
        loader = instantiate(cfg.dataloader.train)
    optimizer = instantiate(cfg.optimizer)
    on_cpu = {"device_ids": None} if torch.device(train.device).type == "cpu" else {}
    ddp_model = create_ddp_model(model, **train.ddp, **on_cpu)
    of_step = ddp_model, loader, optimizer
    if train.amp.enabled:
        trainer = _AMPTrainer(*of_step, getattr(torch, train.amp.get("dtype", "float16")))
    else:
        trainer = _SimpleTrainer(*of_step)
    checkpointer = Checkpointer(model, train.output_dir, trainer=trainer)
    results: dict[str, Any] = {}

    def test() -> Mapping[str, Any]:
        results.clear()
        results.update(_test(cfg, model))
        return results

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer)
            if comm.is_main_process()
            else None,
            hooks.EvalHook(train.eval_period, test),
            hooks.PeriodicWriter(
                default_writers(train.output_dir, train.max_iter), period=train.log_period
            )
            if comm.is_main_process()
            else None,
        ]
    )
    checkpointer.resume_or_load(train.init_checkpoint, resume=args.resume)
    checkpointer.save_final(trainer.iter, train.max_iter)
    # The checkpoint has the last iteration that is done.
    trainer.train(trainer.iter + 1 if args.resume else 0, train.max_iter)
    return results


def _test(cfg: DictConfig, model: nn.Module) -> Mapping[str, Any]:
    if "evaluator" not in cfg.dataloader:
        return {}
    with readable_datasets("dataloader.test", _dataset_names(cfg, "test")):
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    with finite_boxes():
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results
