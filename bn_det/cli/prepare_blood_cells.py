"""Make the data sets of blood cells from four laboratories, of a clone of a public data set.

    git clone https://github.com/lugan113/TXL-PBC_Dataset
    bn-det prepare-blood-cells TXL-PBC_Dataset

Configs then name them blood_cells_LABORATORY_train and _val; the laboratories are bccd, bcd, pbc
and raabin.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..data.blood_cells import FOLDER, Made, prepare_blood_cells
from ..data.coco import datasets_root


def argument_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", metavar="CLONE", help="folder of the clone, with TXL_PBC in it")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"folder to make; by default $DETECTRON2_DATASETS/{FOLDER}, where configs look for it",
    )
    return parser


def main(prog: str, arguments: Sequence[str]) -> None:
    args = argument_parser(prog).parse_args(arguments)
    folder = Path(args.output) if args.output else datasets_root() / FOLDER
    made = prepare_blood_cells(Path(args.clone), folder)
    print(tabulate(made, headers=Made._fields, tablefmt="pipe"))
    print(f"Saved to {folder}")
