"""Repair the population statistics of a checkpoint that you have, without training.

An EMA lags behind the model, mixes the statistics of few samples, may be of one process alone, or
of another domain than the model is used on. This recomputes all of them on the model as it is
(PreciseBN) and writes a new checkpoint; the old one is left as it is, and so are the detections of
its run where --evaluate has AP before and after. The table says how far the old statistics were
from the new ones. With --adabn they are recomputed on the test images, which need no labels, with
the preprocessing and the proposals of test time.

Without --config-file, any model of torch: --model names a function that makes it, --data one that
gives batches, and --call, if it is not called on a batch alone, one that calls it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands import recompute_any
from ..commands.any_model import add_model_arguments, refuse_unread
from ..commands.cli import add_config_arguments, add_process_arguments, import_host
from ..commands.recompute import check_numbers
from ..errors import InputError


def argument_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="Example: bn-det recompute --config-file configs/quick_start.yaml "
        "--weights output/quick_start/model_final.pth --output precise.pth --evaluate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, metavar="W", help="the checkpoint to read")
    parser.add_argument(
        "--output",
        metavar="O",
        help="the checkpoint to write, and beside it the table as JSON; without it they are only "
        "looked at",
    )
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="the data set to use; by default DATASETS.TRAIN, with --adabn DATASETS.TEST",
    )
    parser.add_argument(
        "--adabn", action="store_true", help="adapt to the test images, in test mode"
    )
    parser.add_argument(
        "--population",
        choices=["shared", "per_domain"],
        help="whether the levels of the new checkpoint share statistics (heads of RetinaNet, FCOS "
        "and RPN); by default as in the config",
    )
    parser.add_argument(
        "--num-iters",
        type=int,
        metavar="N",
        help="batches of TEST.PRECISE_BN.IMS_PER_BATCH images (0: of SOLVER.IMS_PER_BATCH); by "
        "default TEST.PRECISE_BN.NUM_ITER; with --adabn at most the data set, once",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="stop when the standard error of all statistics is below; 0.05 is precise enough as a "
        "rule",
    )
    parser.add_argument(
        "--initial",
        action="store_true",
        help="also where mean 0 and variance 1 look folded, as training never updated them "
        "(initial=True in messages)",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--part",
        metavar="KEY",
        help="with --model: where in the file the weights are, such as ema",
    )
    parser.add_argument("--evaluate", action="store_true", help="show AP before and after")
    add_process_arguments(parser)
    add_config_arguments(parser, required=False)
    # What the set-up that evaluation shares asks for.
    parser.set_defaults(eval_only=True, resume=False)
    return parser


_OF_CONFIG = (
    *("dataset", "adabn", "population", "evaluate", "host", "num_gpus", "num_machines"),
    *("machine_rank", "dist_url", "opts"),
)
_OF_MODEL = ("data", "call", "part")


def main(prog: str, arguments: Sequence[str]) -> None:
    parser = argument_parser(prog)
    args = parser.parse_intermixed_args(arguments)
    if (args.config_file is None) == (args.model is None):
        raise InputError("--config-file or --model: one of them is needed")
    unread, chosen = (_OF_MODEL, "--config-file") if args.model is None else (_OF_CONFIG, "--model")
    refuse_unread(parser, args, unread, chosen)
    check_numbers(args)
    if args.model is not None:
        recompute_any.main(args)
    else:
        import_host(args.host, "recompute").main(args)
