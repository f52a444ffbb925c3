#!/usr/bin/env python
"""What is wrong with the BatchNorm of a checkpoint, and what mends it.

Examines a file alone: no model is made of it, and nothing in it is run. It may be of Detectron2
(.pth, .pkl), torchvision, timm, mmdetection, or any state dict of torch or safetensors.

The exit status is 0, or 3 if there is a finding that --fail-on is about, or 1 if the file cannot be
examined.
"""

from __future__ import annotations

import argparse
import json
import sys

from bn_det.commands.cli import run
from bn_det.doctor import RULES, SEVERITIES, examine_file
from bn_det.doctor.findings import selected
from bn_det.errors import InputError, nearest

FOUND = 3


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: doctor.py output/quick_start/model_final.pth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", help="the checkpoint")
    parser.add_argument(
        "--part", metavar="KEY", help="where in the file the weights are, such as ema"
    )
    parser.add_argument("--format", choices=["table", "json"], default="table")
    for flag, what in (("select", "look for these alone"), ("ignore", "leave these out")):
        parser.add_argument(
            f"--{flag}", nargs="+", default=[], metavar="RULE",
            help=f"rules, or beginnings of their ids: {what}",
        )  # fmt: skip
    parser.add_argument(
        "--fail-on",
        choices=[*SEVERITIES, "never"],
        default="error",
        help="findings as severe as this have the exit status 3; by default an error, which costs "
        "AP (a warning may, a note does not)",
    )
    parser.add_argument("--list", action="store_true", help="all rules")
    parser.add_argument("--explain", metavar="RULE", help="what a rule finds, and why it matters")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    if args.list:
        print("\n\n".join(rule.explain(name) for name, rule in RULES.items()))
    elif args.explain is not None:
        if args.explain not in RULES:
            raise InputError(
                f"--explain: there is no rule {args.explain!r}; {nearest(args.explain, RULES)}"
            )
        print(RULES[args.explain].explain(args.explain))
    elif args.file is None:
        raise InputError("file: name a checkpoint, or use --list or --explain")
    else:
        examine(args)


def examine(args: argparse.Namespace) -> None:
    rules = selected(RULES, args.select, args.ignore)
    report = examine_file(args.file, rules, args.part)
    print(json.dumps(report.as_dict(), indent=1) if args.format == "json" else report)
    severe = SEVERITIES[: SEVERITIES.index(args.fail_on) + 1] if args.fail_on != "never" else ()
    if any(finding.severity in severe for finding in report.findings):
        sys.exit(FOUND)


if __name__ == "__main__":
    run(main)
