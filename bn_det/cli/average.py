"""Average the weights of several checkpoints of one training, with statistics that fit.

No population statistics belong to an average of weights. Those of the last checkpoint (copied),
the mean of all (averaged), the mean with the spread of the means (pooled), and statistics of the
averaged model itself (recomputed, from training images) are compared by the loss on DATASETS.TEST,
as in evaluation; the best is written. The checkpoints themselves are in the table, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands.average import CHOICES
from ..commands.cli import add_config_arguments, import_host


def argument_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="Example: bn-det average --config-file configs/quick_start.yaml "
        "--inputs output/quick_start/model_0000449.pth output/quick_start/model_final.pth "
        "--output output/average.pth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--inputs", nargs="+", required=True, metavar="W", help="the checkpoints to average"
    )
    parser.add_argument("--output", required=True, metavar="O", help="the checkpoint to write")
    parser.add_argument(
        "--statistics",
        nargs="+",
        choices=CHOICES,
        default=list(CHOICES),
        metavar="S",
        help=f"which to compare, of {', '.join(CHOICES)}; all by default",
    )
    add_config_arguments(parser)
    # What the set-up that evaluation shares asks for.
    parser.set_defaults(eval_only=False, resume=False, num_gpus=1, num_machines=1)
    parser.set_defaults(machine_rank=0, dist_url="auto")
    return parser


def main(prog: str, arguments: Sequence[str]) -> None:
    args = argument_parser(prog).parse_intermixed_args(arguments)
    import_host(args.host, "average").main(args)
