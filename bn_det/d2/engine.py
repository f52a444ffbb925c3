"""What trainings from either kind of config have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..commands.checkpoint import CheckpointerMixin
from ..errors import InputError


class Checkpointer(CheckpointerMixin, DetectionCheckpointer):
    """Detectron2's checkpointer with :class:`CheckpointerMixin`."""


class EvaluatesOnSuccess:
    """What Detectron2's trainers lack; put it before one of them in the bases.

    EvalHook takes a failure in the last iteration for the end of the training, and its evaluation
    would wait for the other processes, which are not there.
    """

    def after_train(self) -> None:
        if self.iter < self.max_iter:  # a failure
            self._hooks = [h for h in self._hooks if not isinstance(h, EvalHook)]
        super().after_train()


def set_up_group_and_log(args: argparse.Namespace, cfg: CfgNode, output_dir: str) -> None:
    """As :func:`set_up_process`, but for the data sets, of either kind of config."""
    if dist.is_initialized():
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="bn_det")
    default_setup(cfg, args)


@contextmanager
def readable_datasets(key: str, names: Sequence[str]) -> Iterator[None]:
    """Turn what Detectron2's loaders raise for a missing or broken file into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AssertionError, KeyError, OSError, TypeError, ValueError) as e:
        # For no name Detectron2's reason is that there is none.
        reason = " ".join(str(e).split()) if str(e) != str(names) else "name a data set"
        raise InputError(f"{key}: {names!r} cannot be loaded: {reason}") from e
