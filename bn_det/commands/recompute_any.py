"""Recomputing the population statistics of any model of torch, file to file."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..layers.state_dicts import read_checkpoint
from ..population.progress import with_progress
from ..population.update import update_bn_stats
from .any_model import functions_of, made
from .checkpoint import check_output, save_with_table

logger = logging.getLogger(__name__)

_NODES = ("model", "state_dict")
"""Where a checkpoint has its weights, if not by themselves."""

_NUM_ITERS = 200
"""Batches, where the command does not say; as many as there are, at most."""


def main(args: argparse.Namespace) -> None:
    """As tools/recompute_statistics.py says of --model."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s]: %(message)s", datefmt="%H:%M:%S")
    functions = functions_of(args)
    check_output(args.output, [args.weights], "--weights")
    checkpoint, weights = _read(args.weights)
    model, batches, call = made(functions, args, weights, f"--weights: {args.weights}")
    number = _NUM_ITERS if args.num_iters is None else args.num_iters
    report = update_bn_stats(
        model.train(),
        with_progress(batches, number, logger, "Population statistics: %d/%d batches"),
        number,
        tolerance=args.tolerance or 0.0,
        allow_short=True,
        call=call,
        initial=args.initial,
    )
    if not report.layers:
        raise InputError("--model: it has no BatchNorm with population statistics to recompute")
    print(report)
    if args.output is not None:
        _save(checkpoint, model, report.as_dict(), args.output)


def _read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint, and the weights in it."""
    try:
        checkpoint = read_checkpoint(path)
    except InputError as e:
        raise InputError(f"--weights: {e}") from e
    if not isinstance(checkpoint, dict):
        raise InputError(f"--weights: {path} has a {type(checkpoint).__name__}, and no weights")
    for node in _NODES:
        if isinstance(checkpoint.get(node), dict):
            return checkpoint, checkpoint[node]
    return checkpoint, checkpoint


def _save(checkpoint: dict[str, Any], model: nn.Module, report: dict, output: str) -> None:
    """The checkpoint as it was but for its statistics, and the report beside it."""
    state = model.state_dict()
    node = next((node for node in _NODES if isinstance(checkpoint.get(node), dict)), None)
    content = dict(state) if node is None else {**checkpoint, node: state}
    save_with_table(content, report, output)
