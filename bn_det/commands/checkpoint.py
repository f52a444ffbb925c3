"""Checkpoints that are never half-written, and that have to fit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from yacs.config import CfgNode

from ..errors import LOAD_ERRORS, InputError, reason_of
from ..files import write_aside, write_json, write_text
from ..layers.state_dicts import READ_ERRORS, weights_of, why_unreadable
from .fitting import refuse_fused, refuse_others, refuse_rest, tell_parts


class CheckpointerMixin:
    """What both hosts add to fvcore's Checkpointer; put it before that class in the bases.

    * A file is written aside and renamed, so that a run killed at any moment leaves the last
      complete checkpoint, and a ``last_checkpoint`` that names it.
    * Weights whose shapes differ are an error instead of a warning, except those of the final
      predictors (PREDICTORS), whose shape a fine-tuning on other classes changes.
    * With ``must_match``, which evaluation and resuming set, those too, weights that the checkpoint
      lacks, and those that the model has no place for: it would compute something else.
    * Otherwise a table says what begins anew and what is not used, by parts of the model; a part
      that the checkpoint has, and of which nothing fits, is an error.
    """

    PREDICTORS = (
        "cls_score.",
        "cls_logits.",
        "box_predictor.bbox_pred.",
        "mask_head.predictor.",
    )

    must_match = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model and all checkpointables to ``<save_dir>/<name>.pth``."""
        if not self.save_dir:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        if not self.save_to_disk:  # only now: a state may be gathered from all processes
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with write_aside(path) as aside:
            torch.save(data, aside)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As fvcore's, with errors that name the file."""
        try:
            return super().load(path, *args, **kwargs)
        except InputError:
            raise
        except LOAD_ERRORS as e:
            raise InputError(f"{path}: cannot be loaded as a checkpoint: {reason_of(e)}") from e

    def _load_file(self, f: str) -> dict[str, Any]:
        try:
            loaded = super()._load_file(f)
        except READ_ERRORS as e:
            reason = why_unreadable(f, e)
            raise InputError(f"{f}: cannot be loaded as a checkpoint: {reason}") from e
        weights = weights_of(loaded, f)
        return loaded if "model" in loaded else {"model": weights}

    def _load_model(self, checkpoint: Any) -> Any:
        weights = set(checkpoint["model"])  # which fvcore takes out
        if not checkpoint.get("matching_heuristics"):
            refuse_others(self.model, weights)
        incompatible = super()._load_model(checkpoint)
        if any(name.endswith("running_mean") for name in incompatible.missing_keys):
            refuse_fused(self.model, weights)
        for key, found, expected in incompatible.incorrect_shapes:
            if self.must_match or not any(p in key for p in self.PREDICTORS):
                raise InputError(
                    f"{key}: the checkpoint has shape {tuple(found)}, the model of this config "
                    f"{tuple(expected)}"
                )
        # Of a BatchNorm that is FrozenBatchNorm2d in the model; it is the same function.
        unused = [n for n in incompatible.unexpected_keys if not n.endswith("num_batches_tracked")]
        if self.must_match:
            refuse_rest(incompatible.missing_keys, unused)
        elif not checkpoint.get("matching_heuristics"):
            new = {*incompatible.missing_keys, *(n for n, *_ in incompatible.incorrect_shapes)}
            tell_parts(self.logger, set(self.model.state_dict()), new, unused)
        return incompatible


class _SafeCheckpointer(_Checkpointer):
    def _load_file(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=True)


class Checkpointer(CheckpointerMixin, _SafeCheckpointer):
    """fvcore's Checkpointer with :class:`CheckpointerMixin`; loads tensors and plain data only."""


def check_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise InputError if there is nothing to resume, or no weights where they are needed."""
    check_files(args, ("OUTPUT_DIR", cfg.OUTPUT_DIR), ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS))


def check_files(
    args: argparse.Namespace, output: tuple[str, str], weights: tuple[str, str]
) -> None:
    """As :func:`check_start`, from the keys and the values of the folder and the weights."""
    if args.resume:
        key, folder = output
        if not os.path.isfile(os.path.join(folder, "last_checkpoint")):
            raise InputError(
                f"--resume: {key} {folder} has nothing to resume (no file last_checkpoint)"
            )
        return
    key, path = weights
    if args.eval_only and not path:
        raise InputError(f"{key}: '' is not accepted; name a checkpoint")
    # Detectron2 takes options after a question mark.
    if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
        raise InputError(f"{key}: there is no file {path}")


def check_output(output: str | None, inputs: Sequence[str], flag: str) -> None:
    """Raise InputError unless a command can write its --output beside what it reads.

    Args:
        output: None for nothing to write.
        inputs: what it reads, by this flag.
    """
    if output is None:
        return
    path = Path(output)
    if path.suffix == ".json":
        raise InputError(
            f"--output: {output!r} is not accepted; the table gets that name, use .pth"
        )
    if path.is_dir() or any(path.exists() and path.samefile(of) for of in inputs):
        raise InputError(f"--output: {output!r} is not accepted; use another file than {flag}")


def save_with_table(content: dict[str, Any], table: dict[str, Any], output: str) -> None:
    """Write a checkpoint, and beside it a table as JSON."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        torch.save(content, aside)
    write_json(path.with_suffix(".json"), table)
    print(f"Saved to {path}, and the table to {path.with_suffix('.json')}")
