"""Run the experiments of Wu & Johnson, Rethinking "Batch" in BatchNorm, and report them.

On COCO as published, in 8 GPUs, or, smaller, on two CPU cores: on the shapes data, which is
generated, or on photographs of blood cells. First it shows what it will run. Trainings that
experiments share are run once; a command that was interrupted goes on when it is given again. The
report has tables, figures, the command of each row, and a ledger of the paper's claims with what
came out: report.html, results.json, claims.md and pictures, in --output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..commands.cli import add_host_argument
from ..errors import nearest
from ..reproduce.looks import DEFAULT_SEEDS
from ..reproduce.main import reproduce, times
from ..reproduce.registry import EXPERIMENTS, experiments_on
from ..reproduce.steps import DATA


def experiment(name: str) -> str:
    """The name of an experiment, or all."""
    known = [*EXPERIMENTS, "all"]
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is not accepted; {nearest(name, known)}")
    return name


def argument_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=times(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiment",
        type=experiment,
        metavar="EXPERIMENT",
        help=f"{', '.join(EXPERIMENTS)} (Table 5: multi-domain; Tables 3 and 6: leakage), or all",
    )
    parser.add_argument(
        "--data",
        choices=DATA,
        default="shapes",
        help="COCO as published; the small twins on generated data (default); or photographs of "
        f"blood cells of four laboratories ({', '.join(experiments_on('cells'))})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help=f"run with SEED 1 to N; {DEFAULT_SEEDS} by default; 1 is for a look, and no verdict; "
        "with --decide the most",
    )
    parser.add_argument(
        "--decide",
        action="store_true",
        help="add seeds until each claim is decided: seen, opposite or absent, by intervals that "
        "all hold together with 95 %%, however often one has looked",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="GPUs of a training on COCO; 8 by default, as published",
    )
    parser.add_argument(
        "--yes", action="store_true", help="agree to what another number of GPUs changes"
    )
    add_host_argument(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the report; by default output/reproduce/EXPERIMENT-DATA-HOST",
    )
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="folder of trainings and measurements, for all experiments; by default "
        "output/reproduce/runs-DATA-HOST",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes at a time; by default 2 on a CPU, and with GPUs one command",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be run, and every command"
    )
    parser.add_argument(
        "opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="config options for every command; the report says so",
    )
    return parser


def main(prog: str, arguments: Sequence[str]) -> None:
    # Options may stand before and after EXPERIMENT.
    reproduce(argument_parser(prog).parse_intermixed_args(arguments))
