"""Recomputing the population statistics of any model of torch, file to file."""

from __future__ import annotations

import argparse
import logging

from torch import nn

from ..doctor.checkpoint import Stored, read_state
from ..errors import InputError
from ..population.progress import with_progress
from ..population.report import PopulationReport
from ..population.update import update_bn_stats
from .any_model import Functions, functions_of, made, own_folder
from .checkpoint import save_with_table
from .fitting import refuse_failed
from .outputs import check_output, read_of_modules

logger = logging.getLogger(__name__)

_NUM_ITERS = 200
"""Batches, where the command does not say; as many as there are, at most."""


def main(args: argparse.Namespace) -> None:
    """As bn-det recompute says of --model."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s]: %(message)s", datefmt="%H:%M:%S")
    with own_folder():
        functions = functions_of(args)
    check_output(args.output, {"--weights": [args.weights], **read_of_modules()})
    try:
        stored = read_state(args.weights, args.part)
    except InputError as e:
        raise InputError(e if str(e).startswith("--") else f"--weights: {e}") from e
    with own_folder():
        model, report = _recomputed(args, functions, stored)
    if not report.layers:
        raise InputError("--model: it has no BatchNorm with population statistics to recompute")
    print(report)
    if args.output is not None:
        content = stored.with_state(model.state_dict())
        save_with_table(content, report.as_dict(), args.output)


def _recomputed(
    args: argparse.Namespace, functions: Functions, stored: Stored
) -> tuple[nn.Module, PopulationReport]:
    model, batches, call = made(functions, args, stored.state, f"--weights: {args.weights}")[:3]
    try:
        refuse_failed(model)
    except InputError as e:
        raise InputError(f"--weights: {args.weights}: {e}") from e
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
    return model, report
