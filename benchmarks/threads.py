#!/usr/bin/env python
"""Public threads on BatchNorm, replayed: a broken checkpoint, the doctor's first line, and AP.

Each has its fault planted into a healthy detector (--model; trained once, --runs). The checkpoint
that comes of it is examined as a file, and loaded into the model, on 32 training batches, with AP
of test images; then the model is left with the treatment that helps most, if one does (as by
doctor.py --treat), and its AP is taken once more. Where statistics alone do not mend it, what the
doctor prescribes is another training, or another file, and AP stays.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from doctor_cases import (
    NUM_ITERS,
    first_known,
    loaded,
    report_of_file,
    score_of_healthy,
    scored,
)
from doctor_faults import DoesNotApplyError, planted
from doctor_models import KINDS, Healthy, healthy
from tabulate import tabulate

from bn_det import examine
from bn_det.commands.cli import run
from bn_det.files import finite

logger = logging.getLogger("doctor")

SEED = 0


class Thread(NamedTuple):
    """Attributes:
    name: repository and number.
    symptom: what its users see.
    fault: what it was, of doctor_faults.
    strength: of the fault, from 0 to 2.
    """

    name: str
    symptom: str
    fault: str
    strength: int


THREADS = (
    Thread("PyTorch-Classification/U2PL 64", "a teacher that is good in training mode only",
           "averaged_without_buffers", 2),
    Thread("tensorflow/models 4367", "evaluation is bad for the first hundreds of batches",
           "few_batches", 1),
    Thread("ultralytics/ultralytics 24410", "several GPUs are worse than one", "one_shard", 2),
    Thread("ultralytics/ultralytics 24615", "a good run, and every output NaN",
           "not_a_number", 1),
    Thread("open-mmlab/mmdetection 6991", "BN in a head that levels share loses AP",
           "levels_mixed", 2),
    Thread("jakc4103/DFQ 19", "a loss of mAP that is blamed on fusing", "probes", 2),
    Thread("open-mmlab/mmcv 964", "a frozen part whose features drift", "frozen_by_half", 2),
    Thread("pytorch/pytorch 48929", "worse on images of another camera", "other_domain", 2),
    Thread("huggingface/transformers 19454", "a port that drifts once it is trained",
           "decay_for_a_momentum", 2),
    Thread("open-mmlab/mmaction2 1781", "BN stands still after an evaluation in mid-epoch",
           "mode_of_an_evaluation", 2),
    Thread("Cadene/pretrained-models 5", "statistics 0 and 1 everywhere", "never_moved", 2),
    Thread("pytorch/vision 5443", "poor from scratch, without an error", "frozen_from_scratch", 2),
    Thread("open-mmlab/mmdetection 2924", "a fused file gives wrong boxes", "fused_file", 2),
)  # fmt: skip


class Replayed(NamedTuple):
    """Attributes:
    file_line, line: the doctor's first, of the file alone, and of the model on images.
    before, broken, after: AP of the healthy model, with the fault, and as the doctor leaves it.
    """

    thread: Thread
    file_line: str
    line: str
    before: float
    broken: float
    after: float


def replay(thread: Thread, subject: Healthy, before: float) -> Replayed:
    plant = planted(thread.fault, thread.strength, subject, SEED)
    of_file = report_of_file(plant).verdict
    model = loaded(subject, plant)
    broken = scored(subject, model)
    batches, score = subject.kind.batches(SEED), first_known(broken, subject.score)
    report = examine(model, batches, NUM_ITERS, call=subject.kind.call, treat=True, score=score)
    return Replayed(thread, of_file, report.verdict, before, broken, scored(subject, model))


def as_dict(of: Replayed) -> dict[str, Any]:
    """For JSON."""
    values = of._asdict()
    return finite({**values.pop("thread")._asdict(), **values})


def table(found: list[Replayed]) -> str:
    rows = [
        [of.thread.name, of.thread.symptom, of.line, of.before, of.broken, of.after] for of in found
    ]
    header = ("thread", "what is seen", "the doctor's first line", "AP", "broken", "after")
    return tabulate(rows, header, tablefmt="pipe", floatfmt=".1f")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*KINDS], default="d2_retinanet")
    parser.add_argument("--runs", default="output/doctor", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    found: list[Replayed] = []
    with redirect_stdout(sys.stderr):  # whatever is said on the way
        subject = healthy(args.model, Path(args.runs), None)
        before = score_of_healthy(subject)
        for number, thread in enumerate(THREADS):
            try:
                found.append(replay(thread, subject, before))
                told = found[-1].line
            except DoesNotApplyError:
                told = f"{thread.name}: {args.model} has nothing that could have it"
            logger.info("%d of %d: %s", number + 1, len(THREADS), told)
    print(json.dumps([as_dict(of) for of in found]) if args.json else table(found))


if __name__ == "__main__":
    run(main)
