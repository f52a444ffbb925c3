#!/usr/bin/env python
"""Write the table of docs/claims.md from docs/claims.json; or, with --check, see that it is so.

With --add, put what reports of bn-det reproduce have found into docs/claims.json first: a claim's
entry of the same data and host is replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import bn_det.cli.ctrl_c  # noqa: F401
from bn_det.commands.cli import run
from bn_det.errors import InputError, reason_of
from bn_det.files import read_json, read_text, write_json, write_text
from bn_det.reproduce.ledger import entries_of, ledger_table, merged, with_table

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=DOCS, help="of both files; by default this repository's"
    )
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], metavar="REPORT/results.json", help="of reports"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    args = parser.parse_args()
    data, page = args.folder / "claims.json", args.folder / "claims.md"
    for path in (data, page):
        if not path.is_file():
            raise InputError(f"--folder: there is no file {path}")
    new = [entry for path in args.add for entry in entries_of(path)]
    try:
        entries = merged(read_json(data), new)
        text = with_table(read_text(page), ledger_table(entries))
    except InputError:
        raise
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as e:
        raise InputError(
            f"--folder: {args.folder}: not as this command leaves its files: {reason_of(e)}"
        ) from e
    if args.check:
        if text != page.read_text():
            raise InputError(
                f"{page}: is out of date; run python tools/list_claims.py and commit the file"
            )
        print(f"{page}: is up to date")
        return
    write_json(data, entries)
    write_text(page, text)
    print(f"{page}: {len(entries)} verdicts")


if __name__ == "__main__":
    run(main)
