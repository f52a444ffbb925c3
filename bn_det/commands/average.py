"""One checkpoint of several: their weights averaged, and the statistics that fit best."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from yacs.config import CfgNode

from ..data.coco import CocoSource
from ..errors import InputError, number
from ..files import finite
from ..layers.state_dicts import read_weights
from ..population.averaged_weights import STATISTICS, averaged_state
from ..population.progress import with_progress
from ..population.unchanged import evaluated_losses
from ..population.update import update_bn_stats
from .checkpoint import save_with_table
from .fitting import load_weights, named_as_in, refuse_failed, refuse_types, without_constants
from .outputs import check_output, read_of_config

logger = logging.getLogger(__name__)

CHOICES = (*STATISTICS, "recomputed")


class Host(NamedTuple):
    """What a host gives the command.

    Attributes:
        model: of the config, with any weights.
        training: batches to recompute statistics from.
        testing: from nothing to the annotated batches of DATASETS.TEST, and their number.
        losses_of: from a model that has losses and a batch to them.
    """

    model: nn.Module
    training: Iterable[Any]
    testing: Callable[[], tuple[Iterable[Any], int]]
    losses_of: Callable[[nn.Module, Any], dict[str, Tensor]]


def check(args: argparse.Namespace, cfg: CfgNode, sources: Mapping[str, CocoSource]) -> None:
    """Raise InputError, before any work.

    Args:
        sources: where data sets lie, by name.
    """
    if len(args.inputs) < 2:
        raise InputError("--inputs: one checkpoint is not accepted; name two or more")
    for path in args.inputs:
        if not Path(path).is_file():
            raise InputError(f"--inputs: there is no file {path}")
    read = {"--inputs": args.inputs, **read_of_config(cfg, args.config_file, sources)}
    check_output(args.output, read)


def run(args: argparse.Namespace, num_iter: int, host: Host) -> None:
    """The command, with what a host gives it."""
    states = [_weights(path, host.model) for path in args.inputs]
    made: dict[str, dict[str, Tensor]] = {}
    losses: dict[str, float] = {}
    for path, state in zip(args.inputs, states, strict=True):
        losses[path] = _loss(host, state, path)
    for choice in args.statistics:
        made[choice] = _with_statistics(host, states, choice, num_iter)
        losses[choice] = _loss(host, made[choice], choice)
    best = min(
        made, key=lambda choice: losses[choice] if math.isfinite(losses[choice]) else math.inf
    )
    if not math.isfinite(losses[best]):
        raise InputError(f"--inputs: no average of {', '.join(args.inputs)} has a finite loss")
    rows = [
        [name, number(loss, ".6g"), "written" if name == best else ""]
        for name, loss in losses.items()
    ]
    heads = ["checkpoint, or statistics of the average", "loss", ""]
    print(tabulate(rows, heads, tablefmt="pipe", disable_numparse=True))
    print(f"The average with statistics {best} is the best")
    table = {"losses": finite(losses), "statistics": best}
    save_with_table({"model": made[best]}, table, args.output)


def _weights(path: str, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's, all of which have to fit."""
    weights = {name: v for name, v in read_weights(path).items() if isinstance(v, Tensor)}
    try:
        weights = without_constants(model, named_as_in(model, weights))
        refuse_types(model, weights)
        load_weights(model, weights)
        refuse_failed(model)
    except InputError as e:
        raise InputError(f"--inputs: {path}: {e}") from e
    return weights


def _with_statistics(
    host: Host, states: list[dict[str, Tensor]], choice: str, num_iter: int
) -> dict[str, Tensor]:
    kind = "averaged" if choice == "recomputed" else choice
    state = averaged_state(states, kind)
    if choice != "recomputed":
        return state
    host.model.load_state_dict(state)
    batches = with_progress(host.training, num_iter, logger, "Statistics: %d/%d batches")
    model = host.model.train()
    update_bn_stats(model, batches, num_iter, call=host.losses_of, initial=True)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def _loss(host: Host, state: dict[str, Tensor], name: str) -> float:
    """The mean over the batches of the test set; what a detector samples is the same each time."""
    host.model.load_state_dict(state)
    batches, number = host.testing()
    total = 0.0
    for batch in with_progress(batches, number, logger, f"Losses of {name}: %d/%d batches"):
        with evaluated_losses(host.model):
            torch.manual_seed(0)
            try:
                total += float(sum(host.losses_of(host.model, batch).values()))
            except FloatingPointError:  # what Detectron2 raises for proposals that are NaN
                return math.nan
    return total / number
