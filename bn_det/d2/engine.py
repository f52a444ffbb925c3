"""What trainings from either kind of config have in common."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import ParseResult, urlparse

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..commands.checkpoint import CheckpointerMixin
from ..commands.launch import is_mendable
from ..commands.output_folder import end_logs_that_fail, show_no_settings
from ..data.coco import without_objects
from ..errors import InputError, one_line
from ..files import read_text, write_text
from ..layers.pickled_arrays import read_pickled_arrays

_HEURISTICS = "matching_heuristics=True"
"""The option of Detectron2's that is written after the path of weights."""


class _SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's, but that no file of weights runs code when it is read, or is another's."""

    _parsed_url_during_load: ParseResult | None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Detectron2's, which takes any path for a URL with options after a question mark.

        A file that is there is meant by its name as it is.
        """
        is_file = bool(path) and os.path.isfile(path)
        _, mark, options = path.partition("?") if path and not is_file else ("", "", "")
        if mark and options not in ("", _HEURISTICS):
            raise InputError(
                f"{path}: what follows the question mark is not accepted; use ?{_HEURISTICS} or "
                "nothing, or the name of a file"
            )
        load = super(DetectionCheckpointer, self).load if is_file else super().load
        try:
            if is_file:
                self._parsed_url_during_load = urlparse("")  # no options
            return load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pyth"):  # of pycls
            state = self._torch_load(filename)["model_state"]
            weights = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
            return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        content = read_pickled_arrays(filename)
        if "model" in content and "__author__" in content:  # Detectron2's model zoo
            return content
        blobs = content.get("blobs", content)  # Detectron's, and what Caffe2 had trained
        weights = {name: v for name, v in blobs.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> Any:
        content = torch.load(f, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise InputError(f"it has a {type(content).__name__}, and no weights by their names")
        return content


class Checkpointer(CheckpointerMixin, _SafeCheckpointer):
    """Detectron2's checkpointer with :class:`CheckpointerMixin`; loads tensors and plain data only.

    Of ``.pkl`` files NumPy's arrays, as the model zoo has them.
    """


class EvaluatesOnSuccess(TrainerBase):
    """What Detectron2's trainers lack; put it before one of them in the bases.

    EvalHook takes a failure in the last iteration for the end of the training, and its evaluation
    would wait for the other processes, which are not there.
    """

    _hooks: list[HookBase]

    def after_train(self) -> None:
        if self.iter < self.max_iter:  # a failure
            self._hooks = [h for h in self._hooks if not isinstance(h, EvalHook)]
        super().after_train()


def set_up_group_and_log(args: argparse.Namespace, cfg: CfgNode, output_dir: str) -> None:
    """As :func:`set_up_process`, but for the data sets, of either kind of config."""
    if dist.is_initialized():
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="bn_det")
    # As default_setup calls it, which then makes no others.
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank)
    end_logs_that_fail(("bn_det", "fvcore", "detectron2"))
    if args.eval_only:
        show_no_settings(["detectron2"])
    logging.getLogger("detectron2.engine.train_loop").addFilter(_in_a_line)
    with _config_of_training(args, cfg, Path(output_dir, "config.yaml")):
        default_setup(cfg, args)


@contextmanager
def _config_of_training(args: argparse.Namespace, cfg: CfgNode, path: Path) -> Iterator[None]:
    """Keep what resuming a training goes by, where Detectron2 replaces it with any command's."""
    is_kept = args.eval_only and path.is_file()
    text = read_text(path) if is_kept else ""
    if comm.is_main_process() and not is_kept and isinstance(cfg, CfgNode):
        # Detectron2 writes in place, where a full disk would cost what was there.
        write_text(path, cfg.dump())
    yield
    if comm.is_main_process() and is_kept:
        write_text(path, text)


def _in_a_line(record: logging.LogRecord) -> bool:
    """Detectron2's trainer logs what ends a training with a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if is_mendable(error):
        record.msg, record.exc_info = f"{record.msg} {one_line(error)}", None
    return True


@contextmanager
def finite_boxes() -> Iterator[None]:
    """Turn what Detectron2 asserts of boxes in evaluation into what it raises of proposals."""
    try:
        yield
    except AssertionError as e:
        if "infinite or NaN" not in str(e):
            raise
        raise FloatingPointError("the model detects boxes that are NaN or infinite") from e


@contextmanager
def readable_datasets(key: str, names: Sequence[str]) -> Iterator[None]:
    """Turn what Detectron2's loaders raise for a missing or broken file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as e:
        if str(e).startswith("No valid data found"):
            raise without_objects(key, names) from e
        # For no name Detectron2's reason is that there is none.
        reason = " ".join(str(e).split()) if str(e) != str(names) else "name a data set"
        raise InputError(f"{key}: {names!r} cannot be loaded: {reason}") from e
