"""What the commands that take a config have in common."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from yacs.config import CfgNode

from ..config.packaged import find_config
from ..errors import InputError, check_positive, is_text, one_line, reason_of
from .launch import RankError, is_mendable, launch
from .output_folder import used_by_one, written_in


def add_host_argument(parser: argparse.ArgumentParser) -> None:
    """--host."""
    parser.add_argument(
        "--host",
        choices=["auto", "detectron2", "torchvision"],
        default="auto",
        help="whose detectors and trainer to use; auto takes Detectron2 where it is installed",
    )


_OPTS = "config options that replace the file's"


def add_config_arguments(
    parser: argparse.ArgumentParser,
    required: bool = True,
    opts: tuple[str, str] = ("KEY VALUE", _OPTS),
) -> None:
    """--config-file, --host, and KEY VALUE pairs; for ``parser.parse_intermixed_args``.

    Args:
        opts: what the help calls these pairs, and says of them.
    """
    parser.add_argument(
        "--config-file",
        required=required,
        type=find_config,
        metavar="FILE",
        help="such as configs/quick_start.yaml: a file here, or else the one of the package",
    )
    add_host_argument(parser)
    parser.add_argument(
        "opts",
        nargs="*",
        default=[],
        metavar=opts[0],
        help=opts[1],
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Detectron2's flags for several processes, which are known without it."""
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="number of processes per machine: GPUs where there are some, else CPU processes",
    )
    parser.add_argument(
        "--num-machines", type=int, default=1, metavar="N", help="number of machines"
    )
    parser.add_argument(
        "--machine-rank", type=int, default=0, metavar="K", help="rank of this machine, from 0"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet: tcp://ADDRESS:PORT of machine 0; auto for one machine",
    )


def measure_command(
    prog: str,
    arguments: Sequence[str],
    name: str,
    table: Callable[[Any], str],
    save: Callable[[Any, Path], None],
    *,
    description: str | None,
    epilog: str,
    images: str,
) -> None:
    """The main function of a command that measures a checkpoint by either statistics.

    Args:
        prog: what usage lines call it.
        arguments: of the command line.
        name: of what is measured: the host's module, and the JSON file in OUTPUT_DIR.
        table, save: for the results, on the terminal and in the file.
        description, epilog: of the command's help.
        images: the help of --images-per-batch.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images-per-batch", type=int, default=1, metavar="N", help=images)
    add_config_arguments(parser)
    # What the set-up that evaluation shares asks for.
    parser.set_defaults(eval_only=True, resume=False, num_gpus=1, num_machines=1)
    args = parser.parse_intermixed_args(arguments)
    check_positive("--images-per-batch", args.images_per_batch)
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s %(name)s]: %(message)s", datefmt="%m/%d %H:%M:%S"
    )
    torch.manual_seed(0)  # what is sampled
    with names_weights(args):
        cfg, results = import_host(args.host, name).measure(args)
    print(table(results))
    path = Path(cfg.OUTPUT_DIR) / f"{name}.json"
    save(results, path)
    print(f"Saved to {path}")


def weights_option(args: argparse.Namespace, default: str) -> str:
    """MODEL.WEIGHTS of the KEY VALUE pairs of a command, which may be odd in number."""
    return dict(zip(args.opts[::2], args.opts[1::2], strict=False)).get("MODEL.WEIGHTS", default)


@contextmanager
def names_weights(args: argparse.Namespace) -> Iterator[None]:
    """Name the checkpoint where a host finds that the model's outputs are NaN or infinite."""
    try:
        yield
    except FloatingPointError as e:
        path = weights_option(args, f"of {args.config_file}")
        where = "--resume" if args.resume else f"MODEL.WEIGHTS: {path}"
        raise InputError(f"{where}: its outputs are NaN or infinite: {reason_of(e)}") from e


def choose_host(requested: str) -> str:
    """The host that --host asks for; says in one line which that is, and why."""
    installed = importlib.util.find_spec("detectron2") is not None
    if requested == "detectron2" and not installed:
        raise InputError(
            "--host: 'detectron2' is not installed; use 'torchvision', or see docs/hosts.md"
        )
    host = requested if requested != "auto" else "detectron2" if installed else "torchvision"
    reason = f"--host {requested}"
    if requested == "auto":
        reason += f", and Detectron2 is {'' if installed else 'not '}installed"
    print(f"Host: {host} ({reason})", flush=True)
    return host


def import_host(requested: str, module: str) -> ModuleType:
    """A module of the host that --host asks for."""
    return host_module(choose_host(requested), module)


def host_module(host: str, module: str) -> ModuleType:
    """A module of a host, "detectron2" or "torchvision"."""
    package = {"detectron2": "d2", "torchvision": "tv"}[host]
    return importlib.import_module(f"bn_det.{package}.{module}")


def start(fn: Callable[..., None], args: argparse.Namespace, cfg: CfgNode) -> None:
    """Call ``fn(args, cfg)`` in as many processes as the flags of ``bn-det train`` say.

    No other run is in the config's OUTPUT_DIR meanwhile.
    """
    start_in(("OUTPUT_DIR", cfg.OUTPUT_DIR), fn, (args, cfg), args, cfg.MODEL.DEVICE)


def start_in(
    output: tuple[str, str],
    fn: Callable[..., None],
    fn_args: tuple,
    args: argparse.Namespace,
    device: str,
) -> None:
    """As :func:`start`, from the key and the value of the folder."""
    processes = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
    with used_by_one(*output, args.machine_rank):
        launch(written_in, (*output, fn, *fn_args), *processes, device)


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise InputError for one that no log, config or report of the command could hold."""
    for argument in arguments:
        if not is_text(argument):
            raise InputError(f"{argument!r}: is not accepted; use text of UTF-8")


def run(main: Callable[[], None]) -> None:
    """Call a command's main function; what its user can mend is shown without a traceback."""
    # Of what the hosts import, above the lines that are for the user.
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    try:
        _check_arguments(sys.argv[1:])
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may know no more than ASCII
                stream.reconfigure(errors="backslashreplace")
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # As other tools in front of head. Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, FloatingPointError, OSError) as e:
        if not is_mendable(e):
            raise
        sys.exit(f"error: {one_line(e)}")
    except RankError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
