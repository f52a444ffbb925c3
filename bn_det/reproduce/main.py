"""What tools/reproduce.py does."""

from __future__ import annotations

import argparse
from pathlib import Path

from .registry import EXPERIMENTS
from .runner import Runner
from .steps import Setting, Step


def reproduce(args: argparse.Namespace, root: Path) -> None:
    names = list(EXPERIMENTS) if args.experiment == "all" else [args.experiment]
    setting = Setting(args.data, "detectron2", Path(args.runs), root, 8, tuple(args.opts))
    steps = plan(names, setting, range(1, args.seeds + 1))
    print(len(steps), sum(s.seconds for s in steps) / 60)
    if args.dry_run:
        for s in steps:
            print(s.name, " ".join(s.command))
        return
    Runner(steps, setting.runs, args.jobs or 2).run()


def plan(names, setting, seeds) -> list[Step]:
    steps = {}
    for seed in seeds:
        for name in names:
            for step in EXPERIMENTS[name].plan(setting, seed):
                steps.setdefault(step.name, step)
    return list(steps.values())
