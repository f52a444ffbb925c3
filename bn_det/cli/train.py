"""Train and evaluate a detector from a config file.

The flags are those of Detectron2's tools/train_net.py, and --host.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands.cli import add_config_arguments, add_process_arguments, import_host


def argument_parser(prog: str) -> argparse.ArgumentParser:
    """Detectron2's flags, which are known without it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="Example: bn-det train --config-file configs/quick_start.yaml SOLVER.BASE_LR 0.01\n"
        "With Detectron2 also LazyConfig files, and KEY=VALUE at the end: bn-det train "
        "--config-file configs/ways/GN.py optimizer.lr=0.005\n"
        "To load such a file (.py) is to run its code: take care whose it is.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    add_process_arguments(parser)
    add_config_arguments(parser)
    return parser


def main(prog: str, arguments: Sequence[str]) -> None:
    args = argument_parser(prog).parse_intermixed_args(arguments)
    import_host(args.host, "train").main(args)
