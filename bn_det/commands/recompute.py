"""Recomputing the population statistics of a checkpoint, without training.

Either as PreciseBN does: on training batches, the model in training mode; or as AdaBN does (Li et
al., *Revisiting Batch Normalization For Practical Domain Adaptation*, 2016): on the images of the
domain that the model is to be used on, without labels, in test mode.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

from ..config.check import check_ims_per_batch
from ..config.parts import LEVEL_PARTS, has_our_batch_norm
from ..data.coco import CocoSource
from ..errors import InputError, check_positive, reason_of
from ..files import finite, write_json
from ..layers import DomainBatchNorm2d
from ..layers.comm import world
from ..layers.kinds import STATISTICS
from ..population.progress import with_progress
from ..population.report import PopulationReport
from ..population.update import update_bn_stats
from .checkpoint import save_with_table
from .launch import world_size
from .outputs import check_output, read_of_config
from .results import results_table

logger = logging.getLogger(__name__)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError for numbers of flags that are not accepted, with a config or without."""
    if args.num_iters is not None:
        check_positive("--num-iters", args.num_iters)
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise InputError(
            f"--tolerance: {args.tolerance!r} is not accepted; use 0.0 (for none) or more"
        )


@contextmanager
def flags_as_opts(args: argparse.Namespace) -> Iterator[None]:
    """Have the flags of bn-det recompute be KEY VALUE pairs, too.

    An error that is about such a key names the flag, as the key is not what the user gave.
    """
    flags = _keys_of_flags(args)
    if len(args.opts) % 2 == 0:  # otherwise for load_config to refuse
        args.opts = [*args.opts, *(o for key, (_, v) in flags.items() for o in (key, repr(v)))]
    try:
        yield
    except InputError as e:
        key, _, reason = str(e).partition(": ")
        if key not in flags:
            raise
        raise InputError(f"{flags[key][0]}: {reason}") from e


def _keys_of_flags(args: argparse.Namespace) -> dict[str, tuple[str, object]]:
    """The flags that are given, with their values, by the keys that they stand for."""
    names = None if args.dataset is None else (args.dataset,)
    flags = {
        "MODEL.WEIGHTS": ("--weights", args.weights),
        f"DATASETS.{_split(args)}": ("--dataset", names),
        "TEST.PRECISE_BN.NUM_ITER": ("--num-iters", args.num_iters),
        "TEST.PRECISE_BN.TOLERANCE": ("--tolerance", args.tolerance),
    }
    return {key: of for key, of in flags.items() if of[1] is not None}


def _split(args: argparse.Namespace) -> str:
    return "TEST" if args.adabn else "TRAIN"


def check(args: argparse.Namespace, cfg: CfgNode, sources: Mapping[str, CocoSource]) -> None:
    """Raise InputError, before any work, for what the set-up of an evaluation does not look at.

    Args:
        sources: where data sets lie, by name.
    """
    if not cfg.DATASETS[_split(args)]:
        raise InputError(f"DATASETS.{_split(args)}: () is not accepted; name a data set")
    check_ims_per_batch(cfg, world_size(args.num_gpus, args.num_machines))
    with_population(cfg, args.population)
    read = {"--weights": [args.weights], **read_of_config(cfg, args.config_file, sources)}
    check_output(args.output, read)


def with_population(cfg: CfgNode, population: str | None) -> CfgNode:
    """The config of the new checkpoint, whose levels may share or not share statistics."""
    if population is None:
        return cfg
    parts = parts_with_levels(cfg)
    if not parts:
        raise InputError(
            f"--population: {population!r} is not accepted: the model has no head of ours with "
            f"BatchNorm on several levels; it is a choice of {LEVEL_PARTS}"
        )
    cfg = cfg.clone()
    cfg.defrost()
    for part in parts:
        cfg.MODEL[part].BN.POPULATION = population
    cfg.freeze()
    return cfg


def parts_with_levels(cfg: CfgNode) -> list[str]:
    """The parts of the model that have BatchNorm of ours on several levels."""
    return [part for part in LEVEL_PARTS if has_our_batch_norm(cfg, part)]


def transfer(source: nn.Module, target: nn.Module) -> None:
    """Load a model's state into one whose levels share statistics where its own do not, or not.

    A domain without statistics of its own begins with the shared ones; shared ones with those of
    the first domain. To be recomputed: what follows from them alone would be wrong.
    """
    shared = target.state_dict()
    shared.update((k, v) for k, v in source.state_dict().items() if k in shared)
    target.load_state_dict(shared)
    layers = dict(source.named_modules())
    for name, module in target.named_modules():
        if isinstance(module, DomainBatchNorm2d):
            for k in reversed(range(module.num_domains)):
                old, new = layers[name].population_of(k), module.population_of(k)
                for buffer in STATISTICS:
                    getattr(new, buffer).copy_(getattr(old, buffer))


def recompute(
    model: nn.Module,
    batches: Iterable[Any],
    cfg: CfgNode,
    adabn: bool,
    initial: bool = False,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> PopulationReport:
    """Recompute all statistics of a model, which is then in evaluation mode.

    Args:
        batches: as ``call`` takes them; with ``adabn`` all of the data set, once.
        adabn: run the model in test mode, its BatchNorm layers alone normalizing by batch. A RoI
            head then sees the proposals of test time, a mask head the boxes that are detected.
        initial: as in ``update_bn_stats``.
    """
    model.train()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
    node = cfg.TEST.PRECISE_BN
    message = "Population statistics: %d/%d batches"
    report = update_bn_stats(
        model,
        with_progress(batches, node.NUM_ITER, logger, message),
        node.NUM_ITER,
        tolerance=node.TOLERANCE,
        estimator=node.ESTIMATOR,
        allow_short=adabn,
        call=call,
        initial=initial,
        adabn=adabn,
    )
    if not report.layers:
        raise InputError(
            "--config-file: the model has no BatchNorm with population statistics; nothing has "
            "been written"
        )
    model.eval()
    return report


def _before(evaluate: Callable[[nn.Module], dict], model: nn.Module) -> dict:
    """The results of a model that may be too broken for them, which is what is to be mended."""
    try:
        return evaluate(model)
    except FloatingPointError as e:
        if world()[1] > 1:
            raise  # the others wait for its detections
        logger.warning("No results before: %s", reason_of(e))
        return {"bbox": {"AP": math.nan}}


def run(
    args: argparse.Namespace,
    cfg: CfgNode,
    models: tuple[nn.Module, nn.Module],
    batches: Iterable[Any],
    evaluate: Callable[[nn.Module], dict],
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """The command, with what a host gives it.

    Args:
        models: the checkpoint's, and the one to recompute (the same where nothing is to be
            transferred).
        evaluate: from a model to its results on rank 0, empty on the others.
    """
    old, new = models
    results = {}
    if args.evaluate:
        results["before"] = _before(evaluate, old.eval())
    if new is not old:
        transfer(old, new)
    report = recompute(new, batches, cfg, args.adabn, args.initial, call)
    if world()[0] == 0:
        print(report)
    if world()[0] == 0 and args.output is not None:
        save_with_table({"model": new.state_dict()}, report.as_dict(), args.output)
        for part in parts_with_levels(cfg) if args.population else []:
            print(f"Its config needs MODEL.{part}.BN.POPULATION {args.population} from now on")
    if args.evaluate:
        results["after"] = evaluate(new)
    if world()[0] == 0 and results:
        if args.output is not None:
            content = {**report.as_dict(), "results": finite(results)}
            write_json(Path(args.output).with_suffix(".json"), content)
        for when, of_all in results.items():
            print(f"With the statistics {when}:\n{results_table(of_all)}")
