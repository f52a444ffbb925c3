#!/usr/bin/env python
"""Write configs/README.md, the tables of configs and keys; or, with --check, see that it is so.

Detectron2 is not needed, also for the configs that only it can run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bn_det.cli.ctrl_c  # noqa: F401
from bn_det.commands.cli import run
from bn_det.config.key_table import key_table
from bn_det.config.table import config_table
from bn_det.errors import InputError
from bn_det.files import write_text
from bn_det.tv.config import check_cfg, get_cfg

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def check(path: Path, table: str) -> None:
    """Raise InputError, with the first line that is missing, unless a file is the table."""
    lines = path.read_text().splitlines() if path.exists() else []
    missing = [line for line in table.splitlines() if line not in lines]
    if lines != table.splitlines():
        first = f"it lacks {missing[0]!r}" if missing else "it has lines that are not in the table"
        raise InputError(
            f"{path}: is out of date: {first}; run python tools/list_configs.py and commit the file"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=CONFIGS, help="of the configs; by default this repository's"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise InputError(f"--folder: there is no folder {args.folder}")
    path = args.folder / "README.md"
    table = f"{config_table(args.folder, get_cfg, check_cfg)}\n{key_table()}"
    if args.check:
        check(path, table)
        print(f"{path}: is up to date")
        return
    write_text(path, table)
    print(f"{path}: {table.count('.yaml)')} configs")


if __name__ == "__main__":
    run(main)
