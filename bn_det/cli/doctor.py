"""What is wrong with the BatchNorm of a checkpoint, and what mends it.

A file alone is examined in seconds: no model is made of it, and nothing in it is run. It may be of
Detectron2 (.pth, .pkl), torchvision, timm, mmdetection, or any state dict of torch or safetensors.
With a config, or with functions that make a model and its batches, the model is also run on
training images, and left as it was: 32 batches take as long as 32 forward passes, and with --target
32 of its images' batches as many again. --evaluate recomputes its statistics and compares losses on
16 batches apart, 7 to 31 forward passes of each, and AP where there is a test set: are they the
fault, or the weights? It tries the treatments that its findings prescribe. --treat FILE does so,
too, and writes the checkpoint with the one that helps most. What all this takes is said before it
begins.

The exit status is 0, or 3 if there is a finding that --fail-on is about, or 1 if nothing can be
examined.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..commands.any_model import (
    AnyModel,
    add_model_arguments,
    batches_of,
    functions_of,
    made,
    own_folder,
    refuse_unread,
)
from ..commands.checkpoint import save_with_table
from ..commands.cli import add_config_arguments, import_host, weights_option
from ..commands.outputs import (
    Read,
    check_output,
    check_output_file,
    read_of_config,
    read_of_modules,
)
from ..commands.recompute import parts_with_levels
from ..doctor import (
    RULES,
    SEVERITIES,
    Report,
    examine,
    examine_file,
    html_page,
    sarif_log,
)
from ..doctor.checkpoint import read_state
from ..doctor.examination import LEAST_TO_EVALUATE
from ..doctor.findings import HAS_THEM, Recompute, selected
from ..doctor.from_file import OF_FILES
from ..errors import InputError, check_positive, nearest
from ..files import write_text
from ..version import __version__

FOUND = 3

SUFFIXES = {
    "table": (".txt", ".md"),
    "json": (".json",),
    "html": (".html", ".htm"),
    "sarif": (".sarif", ".json"),
}
"""Of reports, by their format: no file of another name is taken for an old one, and replaced."""


def argument_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog="Examples: bn-det doctor model.pth\n"
        "bn-det doctor --config-file configs/quick_start.yaml MODEL.WEIGHTS model.pth\n"
        "bn-det doctor model.pth --model my_project:make_model --data my_project:train_batches",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--part", metavar="KEY", help="where in the file the weights are, such as ema"
    )
    parser.add_argument(
        "--num-iters", type=int, default=32, metavar="N", help="batches, at most; by default 32"
    )
    parser.add_argument(
        "--target",
        metavar="DATASET | MODULE:FUNCTION",
        help="images that the model is to be used on, of another domain: a data set of the config, "
        "or with --model a function that gives batches",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes of the training that the config is of, as of bn-det train; here they "
        "are not started",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="what wrong statistics cost, in loss and in AP (DATASETS.TEST); with --model, --call "
        "has to give a loss or a dict of losses",
    )
    parser.add_argument(
        "--treat",
        metavar="OUT",
        help="evaluate, and write the checkpoint with the treatment that helps most, if one does",
    )
    parser.add_argument("--format", choices=["table", "json", "html", "sarif"], default="table")
    parser.add_argument(
        "--output", metavar="FILE", help="write that there, and the table to the terminal"
    )
    for flag, what in (("select", "look for these alone"), ("ignore", "leave these out")):
        parser.add_argument(
            f"--{flag}", action="append", default=[], metavar="RULE",
            help=f"a rule, or the beginning of several's ids, may be repeated: {what}",
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
    add_model_arguments(parser)
    opts = "the checkpoint; with --config-file options that replace the file's"
    add_config_arguments(parser, required=False, opts=("FILE | KEY VALUE", opts))
    # What the set-up that evaluation shares asks for.
    parser.set_defaults(eval_only=True, resume=False, num_machines=1)
    return parser


def main(prog: str, arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("bn_det.doctor").setLevel(logging.INFO)
    parser = argument_parser(prog)
    args = parser.parse_intermixed_args(arguments)
    if args.list or args.explain is not None:
        chosen = "list" if args.list else "explain"
        rest = sorted(vars(args).keys() - {chosen})
        refuse_unread(parser, args, rest, f"--{chosen}", "FILE | KEY VALUE")
    if args.list:
        print("\n\n".join(rule.explain(name) for name, rule in RULES.items()))
    elif args.explain is not None:
        if args.explain not in RULES:
            raise InputError(
                f"--explain: there is no rule {args.explain!r}; {nearest(args.explain, RULES)}"
            )
        print(RULES[args.explain].explain(args.explain))
    else:
        _refuse_unread(parser, args)
        check_report(args, {"what is examined": [examined(args), args.config_file or ""]})
        show(report_of(args), args)


def report_of(args: argparse.Namespace) -> Report:
    check_positive("--num-iters", args.num_iters)
    is_file = args.config_file is None and args.model is None
    evaluates = args.evaluate or args.treat is not None
    if evaluates and args.num_iters < LEAST_TO_EVALUATE:
        raise InputError(
            f"--num-iters: {args.num_iters} is not accepted; to evaluate, use "
            f"{LEAST_TO_EVALUATE} or more"
        )
    _refuse_unseen(args, is_file)
    rules = selected(OF_FILES if is_file else RULES, args.select, args.ignore)
    if is_file:
        path = file_of(args)
        check_name(args)
        return examine_file(path, rules, args.part)
    # Whatever is said on the way; a program reads the other.
    with redirect_stdout(sys.stderr), own_folder():
        loaded = by_config(args) if args.config_file else by_functions(args)
        of = loaded.of
        report = examine(
            of.model, of.batches, args.num_iters, call=of.call, target=of.target,
            target_score=of.target_score, optimizer=of.optimizer, step=of.step,
            evaluate=args.evaluate, score=of.score if evaluates else None,
            treat=args.treat is not None, rules=rules,
            recompute=loaded.recompute,
            progress="tqdm" if sys.stderr is not None and sys.stderr.isatty() else "log",
        )  # fmt: skip
    if args.treat is not None:
        with shown_if_it_fails(report), redirect_stdout(sys.stderr):
            report = write_mended(loaded, report, args.treat)
    return report


_EVALUATED = ("BN206", "BN207", *(rule for rule in RULES if rule.startswith("BN3")))
_OF_TRAININGS = ("BN204", "BN503", "BN505")


def _refuse_unseen(args: argparse.Namespace, is_file: bool) -> None:
    """Raise InputError for a --select of nothing but rules that are not looked for so."""
    unseen: dict[str, str] = {}
    if is_file:
        where = "on images: use --config-file, or --model and --data"
        unseen = {rule: where for rule in RULES if rule not in OF_FILES}
    else:
        if not args.evaluate and args.treat is None:
            unseen |= dict.fromkeys(_EVALUATED, "by losses: use --evaluate")
        if args.target is None:
            unseen["BN205"] = "on images of another domain: use --target"
        if args.model is not None:
            unseen |= dict.fromkeys(("BN501", "BN504"), "with an optimizer: use --config-file")
        unseen["BN114"] = "of a file alone: use no --config-file and no --model"
    unseen |= dict.fromkeys(_OF_TRAININGS, "in a training alone (TEST.BN_MONITOR)")
    for name in args.select:
        of_name = [rule for rule in RULES if name and rule.startswith(name)]
        if of_name and unseen.keys() >= {*of_name}:
            raise InputError(
                f"--select: {name!r} is not accepted: {of_name[0]} is seen {unseen[of_name[0]]}"
            )


def check_report(args: argparse.Namespace, read: Read) -> None:
    """Raise InputError for an --output that is what is read, or what --treat writes."""
    if args.output is None:
        return
    check_output_file("--output", args.output, read)
    if args.treat is not None:
        treated = Path(args.treat)
        if Path(args.output).resolve() in (
            treated.resolve(),
            treated.with_suffix(".json").resolve(),
        ):
            raise InputError(f"--output: {args.output!r} is not accepted; --treat writes that file")


def check_name(args: argparse.Namespace) -> None:
    """Raise InputError for an --output that is there, and no report by its name."""
    suffixes = SUFFIXES[args.format]
    is_there = args.output is not None and os.path.exists(args.output)
    if is_there and Path(args.output).suffix.lower() not in suffixes:
        raise InputError(
            f"--output: {args.output!r} is not accepted: it is there, and its name is of no report "
            f"of --format {args.format}; use another, or one in {' or '.join(suffixes)}"
        )


def check_outputs(args: argparse.Namespace, read: Read) -> None:
    """The same for all that is written, before any work."""
    check_output(args.treat, read, "--treat")
    check_report(args, read)
    check_name(args)


class Loaded(NamedTuple):
    """Attributes:
    of: a model, and its images.
    recompute: how its statistics are, in the words of treatments.
    content: of a checkpoint, from a state dict.
    """

    of: AnyModel
    recompute: Recompute
    content: Callable[[dict[str, Tensor]], dict[str, Any]]


def write_mended(loaded: Loaded, report: Report, output: str) -> Report:
    """Write the checkpoint of a model that has been treated; the report that says so."""
    if any(of.kept for of in report.tried):
        verdict = report.verdict.replace(HAS_THEM, f"{output} has them")
        report = report._replace(verdict=verdict)
        content = loaded.content(loaded.of.model.state_dict())
        save_with_table(content, report.as_dict(), output)
    else:
        tried = "; ".join(map(str, report.tried)) or "nothing"
        print(
            f"--treat: {output} is not written: nothing is sure to help of what was tried: {tried}"
        )
    return report


def _refuse_unread(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.config_file is not None:
        refuse_unread(parser, args, ("model", "data", "call", "part"), "--config-file")
    elif args.model is not None:
        refuse_unread(parser, args, ("host", "num_gpus"), "--model")
    else:
        of_images = ("data", "call", "host", "num_gpus", "num_iters", "target", "evaluate", "treat")
        refuse_unread(parser, args, of_images, "a file alone")


def by_config(args: argparse.Namespace) -> Loaded:
    host = import_host(args.host, "doctor")
    cfg = host.setup(args)
    path = cfg.MODEL.WEIGHTS
    read = read_of_config(cfg, args.config_file, host.known_sources(cfg), args.target)
    check_outputs(args, {"MODEL.WEIGHTS": [path], **read})
    of = host.load(args, cfg)
    keys = [f"MODEL.{part}.BN.POPULATION per_domain" for part in parts_with_levels(cfg)]
    config = f"--config-file {shlex.quote(args.config_file)}"
    config += f" --host {args.host}" * (args.host != "auto")
    adapt = f"{config} --adabn --dataset {shlex.quote(args.target or '')} --evaluate"
    opts = _other_opts(args.opts)
    as_tested = f"{config} --adabn --dataset {shlex.quote(cfg.DATASETS.TRAIN[0])}{opts}"
    recompute = Recompute.by_command(path, config + opts, adapt + opts, keys, as_tested)
    return Loaded(of, recompute, beside_weights(path, of.model.state_dict()))


def _other_opts(opts: Sequence[str]) -> str:
    """The KEY VALUE pairs of a command, for another one that names weights and output itself."""
    pairs = zip(opts[::2], opts[1::2], strict=True)
    named = ("MODEL.WEIGHTS", "OUTPUT_DIR")
    return "".join(f" {key} {shlex.quote(value)}" for key, value in pairs if key not in named)


def beside_weights(
    path: str, own: Mapping[str, Tensor]
) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    """What keeps the rest of a checkpoint, where its weights have the names of the model's."""
    stored = read_state(path) if os.path.isfile(path) else None
    if stored is not None and stored.part == "model" and stored.state.keys() == own.keys():
        return stored.with_state
    return lambda state: {"model": state}


def by_functions(args: argparse.Namespace) -> Loaded:
    path = file_of(args)
    with own_folder():
        functions = functions_of(args)
        target = None if args.target is None else batches_of("--target", args.target)
    check_outputs(args, {"FILE": [path], **read_of_modules()})
    stored = read_state(path, args.part)
    of = made(functions, args, stored.state, path)._replace(target=target)
    named = {flag: getattr(args, flag) for flag in (*functions._fields, "part")}
    flags = [
        " ".join(f"--{flag} {shlex.quote(name)}" for flag, name in of_flags.items() if name)
        for of_flags in (named, {**named, "data": args.target})
    ]
    return Loaded(of, Recompute.by_command(path, *flags), stored.with_state)


def file_of(args: argparse.Namespace) -> str:
    if len(args.opts) != 1:
        raise InputError(
            f"FILE: {len(args.opts)} names are not accepted; name one checkpoint, or use "
            "--config-file, --list or --explain"
        )
    return args.opts[0]


def examined(args: argparse.Namespace) -> str:
    """The checkpoint; or the config that names it, where no option does."""
    if args.config_file is None:
        return file_of(args)
    return weights_option(args, args.config_file)


def formatted(report: Report, args: argparse.Namespace) -> str:
    if args.format == "html":
        return html_page(report, examined(args))
    if args.format == "sarif":
        return json.dumps(sarif_log(report, examined(args), __version__), indent=1)
    return json.dumps(report.as_dict(), indent=1) if args.format == "json" else str(report)


@contextmanager
def shown_if_it_fails(report: Report) -> Iterator[None]:
    """An examination may have taken an hour: a full disk does not lose what it has found."""
    try:
        yield
    except BaseException:
        print(report)
        raise


def show(report: Report, args: argparse.Namespace) -> None:
    if args.output is None:
        print(formatted(report, args))
    else:
        with shown_if_it_fails(report):
            write_text(args.output, formatted(report, args))
        print(f"{report}\nSaved to {args.output}")
    severe = SEVERITIES[: SEVERITIES.index(args.fail_on) + 1] if args.fail_on != "never" else ()
    if any(finding.severity in severe for finding in report.findings):
        sys.exit(FOUND)
