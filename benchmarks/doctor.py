#!/usr/bin/env python
"""How good the doctor is: faults that are planted into healthy models, and what it says of them.

Eight small models are trained once (--runs): RetinaNet, FCOS and Mask R-CNN of torchvision and of
Detectron2, and two classifiers of timm. Each is examined as it is, on several draws of images, and
with each fault of doctor_faults.py in three strengths: its file alone, and the model that the file
is loaded into, on 32 training batches. What is lost is AP of boxes on test images (accuracy of
classifiers) before less after planting; where that is 1 or more, and statistics alone are wrong,
the model is treated, too (as by doctor.py --treat), and its AP taken once more.

A fault is found where an error or a warning has a rule that names it rightly. An error or a warning
of another rule, one about what does not follow from the fault, is blame in the wrong place; of a
healthy model it is a false alarm. A third of the cases, by a hash of their names, is held apart:
whoever works on the rules looks at the others alone (--tuned).

Cases are examined in an order by the same hash, so that the first of them are a sample of all
(--minutes). What has been examined is not examined again, as long as the doctor is the same. At the
end two times are taken: of a file of 100 MB, and of an examination with 64 images over that of
their forward passes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from doctor_cases import (
    DRAWS,
    HEALTHY,
    Case,
    Examined,
    examined,
    fingerprint,
    score_of_healthy,
)
from doctor_faults import FAULTS
from doctor_models import BATCH, KINDS, Healthy, healthy
from tabulate import tabulate
from torch import nn

from bn_det import examine
from bn_det.commands.cli import run
from bn_det.doctor import examine_file
from bn_det.errors import check_positive
from bn_det.files import finite
from bn_det.population.passes import surroundings

logger = logging.getLogger("doctor")


def cases(args: argparse.Namespace) -> list[Case]:
    """In the order in which they are examined."""
    found = [
        Case(model, fault, strength)
        for model in args.models
        for fault in args.faults
        for strength in range(DRAWS if fault == HEALTHY else 3)
    ]
    wanted = [case for case in found if not (args.tuned and case.is_held)]
    return sorted(wanted, key=lambda case: case.hash)


def results_of(args: argparse.Namespace) -> list[Examined]:
    """Of all cases; those that have not been examined are, as far as time allows."""
    folder = Path(args.runs)
    subjects = {name: healthy(name, folder, args.iterations) for name in args.models}
    path = folder / f"examined-{args.iterations or 'all'}-{fingerprint()}.jsonl"
    known = {}
    if path.exists():
        # The last line of a run that was killed may not be whole.
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        known = {of.case: of for of in map(Examined.read, lines)}
    wanted = cases(args)
    todo = [case for case in wanted if case not in known]
    logger.info("%d cases, of which %d have been examined", len(wanted), len(wanted) - len(todo))
    before: dict[str, float] = {}
    start = time.monotonic()
    with open(path, "a") as file:
        for number, case in enumerate(todo):
            passed = (time.monotonic() - start) / 60
            if args.minutes is not None and passed >= args.minutes:
                logger.info("%d cases are left: the time is over", len(todo) - number)
                break
            subject = subjects[case.model]
            if case.model not in before:
                before[case.model] = score_of_healthy(subject)
            of = examined(case, subject, before[case.model])
            known[case] = of
            print(json.dumps(finite(of._asdict())), file=file, flush=True)
            minutes = (time.monotonic() - start) / 60 / (number + 1) * (len(todo) - number - 1)
            logger.info("%s; about %.0f min left", line_of(of), minutes)
    return [known[case] for case in wanted if case in known]


def line_of(of: Examined) -> str:
    """Of progress. Of a case that is held apart it says nothing else."""
    if of.case.is_held:
        return f"{of.case.name}: held apart"
    if not of.applies:
        return f"{of.case.name}: does not apply"
    treated = "" if of.after is None else f", treated {of.after:.1f}"
    found = of.error or ", ".join(of.alarms) or "nothing"
    return f"{of.case.name}: {of.before:.1f} before, {of.planted:.1f} with it{treated}; {found}"


# --- what comes of them


def summary(results: Sequence[Examined]) -> dict[str, Any]:
    """The three figures, and of how many cases each is; None where it is of none."""
    of_healthy = [of for of in results if of.case.fault == HEALTHY]
    costly = [of for of in results if of.applies and of.case.fault != HEALTHY and of.costs]
    treated = [of for of in costly if of.after is not None]
    lost = sum(of.lost for of in treated)
    won = sum((of.after or 0.0) - of.planted for of in treated)
    return {
        "found": _ratio(sum(of.is_found for of in costly), len(costly)),
        "of_costly_faults": len(costly),
        "false_alarms_per_examination": _ratio(
            sum(bool(of.wrong) for of in of_healthy), len(of_healthy)
        ),
        "examinations_of_healthy_models": len(of_healthy),
        "recovered": _ratio(won, lost),
        "of_lost_ap": lost,
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def table(results: Sequence[Examined]) -> str:
    """By fault, without the cases that are held apart."""
    rows = []
    tuned = [of for of in results if of.applies and not of.case.is_held]
    for fault in dict.fromkeys((*FAULTS, HEALTHY)):
        of_fault = [of for of in tuned if of.case.fault == fault]
        if of_fault:
            rows.append(_row(fault, of_fault))
    headers = (
        *("fault", "rules", "cases", "cost AP", "found", "noted", "missed"),
        *("found, harmless", "blamed wrongly", "AP lost", "won back"),
    )
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".1f", missingval="")


def _row(fault: str, results: Sequence[Examined]) -> list[Any]:
    wrong = [rule for of in results for rule in of.wrong]
    blamed = ", ".join(f"{wrong.count(rule)} {rule}" for rule in sorted(set(wrong)))
    if fault == HEALTHY:
        return [fault, "", len(results), *[None] * 5, blamed, None, None]
    costly = [of for of in results if of.costs]
    treated = [of for of in costly if of.after is not None]
    found, noted = sum(of.is_found for of in costly), sum(of.is_noted for of in costly)
    harmless = [of for of in results if not of.costs]
    return [
        *(fault, ", ".join(FAULTS[fault].rules), len(results), len(costly)),
        *(found, noted, len(costly) - found - noted),
        f"{sum(of.is_found or of.is_noted for of in harmless)} of {len(harmless)}",
        blamed,
        sum(of.lost for of in treated) if treated else None,
        sum((of.after or 0.0) - of.planted for of in treated) if treated else None,
    ]


def by_model(results: Sequence[Examined]) -> str:
    rows = []
    for model in dict.fromkeys(of.case.model for of in results):
        of_model = [of for of in results if of.case.model == model and not of.case.is_held]
        known = [of.before for of in of_model if of.applies]
        if known:
            found = summary(of_model)
            rows.append([model, known[0], *map(_shown, _figures(found))])
    return tabulate(rows, ("model", "AP", *_HEADERS), tablefmt="pipe", floatfmt=".1f")


_HEADERS = "found", "false alarms an examination", "AP won back"


def _figures(found: dict[str, Any]) -> list[tuple[float | None, float, str]]:
    return [
        (found["found"], found["of_costly_faults"], "faults"),
        (
            found["false_alarms_per_examination"],
            found["examinations_of_healthy_models"],
            "examinations",
        ),
        (found["recovered"], found["of_lost_ap"], "AP"),
    ]


def _shown(figure: tuple[float | None, float, str]) -> str:
    ratio, of, what = figure
    return "" if ratio is None else f"{100 * ratio:.1f} % of {of:.0f} {what}"


# --- time


def seconds_of_file(size_mb: float, rounds: int = 3) -> float:
    """The fewest that it takes to examine a file of convolutions and norms of that size."""
    channels = 256
    number = round(size_mb * 1e6 / (4 * channels * (9 * channels + 4)))
    state: dict[str, torch.Tensor] = {}
    for k in range(number):
        state[f"{k}.conv.weight"] = torch.randn(channels, channels, 3, 3)
        norm = nn.BatchNorm2d(channels)
        for name, value in norm.state_dict().items():
            state[f"{k}.bn.{name}"] = value + (torch.rand_like(value) if value.dim() else 1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save({"model": state}, path)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            examine_file(path)
            times.append(time.perf_counter() - start)
    return min(times)


def over_forward_passes(subject: Healthy, images: int = 64, rounds: int = 3) -> float:
    """The time of an examination over that of forward passes of the same images, in training mode.

    It is the time of the process that counts, as others may use the cores; medians of the rounds.
    """
    model = subject.make()
    model.load_state_dict(subject.state)
    model.train()
    batches = [b for b, _ in zip(subject.kind.batches(0), range(images // BATCH), strict=False)]

    def forward() -> None:
        with torch.no_grad(), surroundings():
            for batch in batches:
                subject.kind.call(model, batch)

    def examination() -> None:
        examine(model, batches, len(batches), call=subject.kind.call)

    times: dict[Callable[[], None], list[float]] = {forward: [], examination: []}
    for _ in range(rounds + 1):
        for call, of in times.items():
            start = time.process_time()
            call()
            of.append(time.process_time() - start)
    first, second = (statistics.median(of[1:]) for of in times.values())
    return second / first


# --- the command


def measure(args: argparse.Namespace) -> tuple[list[Examined], dict[str, Any]]:
    """The cases, and what --json prints."""
    results = results_of(args)
    found: dict[str, Any] = {
        part: summary([of for of in results if of.case.is_held == is_held])
        for part, is_held in (("tuned", False), ("held", True))
    }
    subjects = {name: healthy(name, Path(args.runs), args.iterations) for name in args.models}
    ratios = {name: over_forward_passes(subject) for name, subject in subjects.items()}
    found["seconds_of_100_mb"] = seconds_of_file(100)
    found["over_forward_passes"] = ratios
    return results, found


def tables(results: Sequence[Examined], found: dict[str, Any]) -> str:
    parts = [
        [part, *map(_shown, _figures(found[part]))]
        for part in ("tuned", "held")
        if any(value is not None for value, *_ in _figures(found[part]))
    ]
    ratios = ", ".join(f"{name} {of:.2f}" for name, of in found["over_forward_passes"].items())
    return "\n\n".join(
        [
            table(results),
            by_model(results),
            tabulate(parts, ("", *_HEADERS), tablefmt="pipe"),
            f"A file of 100 MB takes {found['seconds_of_100_mb']:.2f} s; examining with 64 images, "
            f"over their forward passes: {ratios}",
        ]
    )


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_detectron2 = importlib.util.find_spec("detectron2") is not None
    models = [name for name in KINDS if has_detectron2 or not name.startswith("d2")]
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL")
    faults = [HEALTHY, *FAULTS]
    parser.add_argument("--faults", nargs="+", choices=faults, default=faults, metavar="FAULT")
    parser.add_argument("--tuned", action="store_true", help="leave out what is held apart")
    parser.add_argument("--minutes", type=float, help="begin no case after that time")
    parser.add_argument("--iterations", type=int, help="of each training, in place of its own")
    parser.add_argument("--runs", default="output/doctor", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    if args.iterations is not None:
        check_positive("--iterations", args.iterations)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    with redirect_stdout(sys.stderr):  # whatever is said on the way
        results, found = measure(args)
    print(json.dumps(finite(found)) if args.json else tables(results, found))


if __name__ == "__main__":
    run(main)
