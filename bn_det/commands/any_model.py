"""A model of torch, whoever made it, by the functions that a command's flags name."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ..doctor.evaluation import Score
from ..doctor.from_training import Step
from ..errors import InputError, reason_of
from ..layers.kinds import refuse_meta
from ..population.calling import called
from .fitting import load_weights, named_as_in


class AnyModel(NamedTuple):
    """Attributes:
    model: with its weights.
    batches: as ``call`` takes them, or the model.
    call: runs the model on a batch; None for the model's own.
    score: AP of a model in evaluation mode, where there is a test set.
    target: batches of the images that it is to be used on, where these are named.
    target_score: AP on these, where they have labels.
    optimizer: that trains it, where it is known.
    step: what a step of it is of.
    """

    model: nn.Module
    batches: Iterable[Any]
    call: Callable[[nn.Module, Any], Any] | None
    score: Score | None = None
    target: Iterable[Any] | None = None
    target_score: Score | None = None
    optimizer: Optimizer | None = None
    step: Step = Step()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --data and --call."""
    for flag, what in (
        ("model", "makes the model, without a config"),
        ("data", "gives its batches"),
        (
            "call",
            "takes the model and a batch, and calls it; by default model(batch), "
            "or model(*batch) with a tuple of as many arguments as it needs, "
            "such as (images, targets)",
        ),
    ):
        parser.add_argument(f"--{flag}", metavar="MODULE:FUNCTION", help=f"a function that {what}")


def refuse_unread(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    unread: Iterable[str],
    chosen: str,
    opts: str = "KEY VALUE",
) -> None:
    """Raise InputError for a flag that is set, and that what was chosen does not read.

    Args:
        unread: names of arguments.
        chosen: for the message, such as "--config-file".
        opts: what the arguments without a flag are.
    """
    for name in unread:
        if getattr(args, name) != parser.get_default(name):
            flag = opts if name == "opts" else f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: is not accepted with {chosen}, which does not read it")


@contextmanager
def own_folder() -> Iterator[None]:
    """The working folder after the block is that before it, whatever users' code in it changes."""
    folder = os.getcwd()
    try:
        yield
    finally:
        os.chdir(folder)


class Functions(NamedTuple):
    """What the flags name, imported and not yet called."""

    model: Callable[[], Any]
    data: Callable[[], Any]
    call: Callable[[nn.Module, Any], Any] | None


def functions_of(args: argparse.Namespace) -> Functions:
    """What --model, --data and --call name.

    Raises:
        InputError: there are no data, or something cannot be imported.
    """
    if not args.data:
        raise InputError("--data: is needed with --model: MODULE:FUNCTION that gives the batches")
    call = None if args.call is None else _function("call", args.call)
    return Functions(_function("model", args.model), _function("data", args.data), call)


def made(
    functions: Functions, args: argparse.Namespace, weights: Mapping[str, Tensor], path: str
) -> AnyModel:
    """Call the functions, and load the weights into the model.

    Args:
        path: of the file that the weights are from, for messages.
    """
    model = _called("--model", functions.model)
    if not isinstance(model, nn.Module):
        raise InputError(f"--model: {args.model} gave a {type(model).__name__}, and no module")
    refuse_meta("--model", model)
    try:
        load_weights(model, named_as_in(model, weights), of_config=False)
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    batches = _batches("--data", args.data, functions.data)
    return AnyModel(model, batches, partial(_call, functions.call))


def batches_of(flag: str, name: str) -> Iterable[Any]:
    """What the function MODULE:FUNCTION gives that a flag names."""
    return _batches(flag, name, _function(flag.removeprefix("--"), name))


def _batches(flag: str, name: str, function: Callable[[], Any]) -> Iterable[Any]:
    batches = _called(flag, function)
    if not isinstance(batches, Iterable):
        raise InputError(f"{flag}: {name} gave a {type(batches).__name__}, and no batches")
    return _Batches(batches, f"{flag}: {name}")


class _Batches:
    """Batches; what a user's code raises that makes them is told as its own."""

    def __init__(self, batches: Iterable[Any], where: str) -> None:
        self.batches, self.where = batches, where

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.batches
        except InputError:
            raise
        except (Exception, SystemExit) as e:
            raise InputError(f"{self.where}: {type(e).__name__}: {reason_of(e)}") from e


def _call(function: Callable[[nn.Module, Any], Any] | None, model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch; what its code raises is told as its own."""
    try:
        return called(model, function)(batch)
    except InputError:
        raise
    except (Exception, SystemExit) as e:
        how = "as model(batch); name a function(model, batch) by --call" * (function is None)
        raise InputError(
            f"--{'call' if function else 'model'}: the model cannot be called on a batch, a "
            f"{type(batch).__name__}, {how or 'by that function'}: {type(e).__name__}: "
            f"{reason_of(e)}"
        ) from e


def _function(flag: str, name: str) -> Callable[..., Any]:
    """What MODULE:FUNCTION means; the folder that the command is in counts, too, as by python -m.

    It stays on the path for what the function imports when it is called.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise InputError(f"--{flag}: {name!r} is not accepted; use MODULE:FUNCTION")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as e:  # of the module's own code, too
        raise InputError(f"--{flag}: {name!r} cannot be imported: {reason_of(e)}") from e


def _called(flag: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as e:
        raise InputError(
            f"{flag}: it cannot be called without arguments: {type(e).__name__}: {reason_of(e)}"
        ) from e
