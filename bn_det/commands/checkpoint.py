"""Checkpoints that are never half-written, and that have to fit."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer as _Checkpointer
from yacs.config import CfgNode

from ..config.yaml_file import load_yaml
from ..errors import LOAD_ERRORS, InputError, escaped, reason_of
from ..files import write_aside, write_json, write_text
from ..layers.pickled_arrays import read_pickled_arrays
from ..layers.state_dicts import refuse_damaged, weights_of, why_unreadable
from .fitting import (
    refuse_broken_statistics,
    refuse_failed,
    refuse_fused,
    refuse_others,
    refuse_rest,
    refuse_types,
    tell_parts,
    without_constants,
)


class CheckpointerMixin(_Checkpointer):
    """What both hosts add to fvcore's Checkpointer; put it before that class in the bases.

    * A file is written aside and renamed, so that a run killed at any moment leaves the last
      complete checkpoint, and a ``last_checkpoint`` that names it.
    * Weights whose shapes differ are an error instead of a warning, except those of the final
      predictors (PREDICTORS), whose shape a fine-tuning on other classes or anchors changes.
    * With ``must_match``, which evaluation sets, and where a run is resumed, those too, weights
      that the checkpoint lacks, and those that the model has no place for: it would compute
      something else.
    * Statistics that are not finite, or negative variances, are an error, but with ``is_mended``.
    * Otherwise a table says what begins anew and what is not used, by parts of the model; a part
      that the checkpoint has, and of which nothing fits, is an error.
    """

    PREDICTORS = (
        "cls_score.",
        "cls_logits.",
        "bbox_pred.",
        "objectness_logits.",
        "anchor_deltas.",
        "mask_head.predictor.",
        "sem_seg_head.predictor.",
        "keypoint_head.score_lowres.",
    )

    must_match = False

    is_mended = False
    """Whether the command is about broken statistics: it recomputes them, or finds them."""

    _is_resumed = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's, but that a last checkpoint that one cannot go on from is an error."""
        self._is_resumed = resume and self.has_checkpoint()
        self.must_match = self.must_match or self._is_resumed
        return super().resume_or_load(path, resume=resume)

    def save_final(self, iteration: int, max_iter: int) -> None:
        """Save model_final where a resumed training was ended right before, all else being done."""
        is_done = self._is_resumed and iteration == max_iter - 1
        if is_done and os.path.basename(self.get_checkpoint_file()) != "model_final.pth":
            self.save("model_final", iteration=iteration)

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
        _save(data, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As fvcore's, with errors that name the file."""
        try:
            return super().load(path, *args, **kwargs)
        except InputError as e:
            raise e if str(path) in str(e) else InputError(f"{path}: {e}") from e
        except LOAD_ERRORS as e:
            raise InputError(f"{path}: cannot be loaded as a checkpoint: {reason_of(e)}") from e

    def _load_file(self, f: str) -> dict[str, Any]:
        refuse_damaged(f)
        try:
            loaded = super()._load_file(f)
        except Exception as e:  # what loaders raise is of many kinds
            reason = why_unreadable(f, e)
            raise InputError(f"{f}: cannot be loaded as a checkpoint: {reason}") from e
        weights = weights_of(loaded, f)
        for name in [name for name in weights if not name.isprintable()]:
            weights[escaped(name)] = weights.pop(name)  # no model has it; it would reach the logs
        return loaded if "model" in loaded else {"model": weights}

    def _load_model(self, checkpoint: Any) -> Any:
        if self._is_resumed and not self.checkpointables.keys() <= checkpoint.keys():
            raise InputError(
                "--resume: the last checkpoint has weights alone: a training cannot go on from it, "
                "but begin with it (MODEL.WEIGHTS)"
            )
        weights = set(checkpoint["model"])  # which fvcore takes out
        if self.must_match:
            checkpoint["model"] = without_constants(self.model, checkpoint["model"])
        if not checkpoint.get("matching_heuristics"):
            refuse_others(self.model, weights)
        refuse_types(self.model, checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        refuse_failed(self.model)
        if not self.is_mended:
            refuse_broken_statistics(self.model)
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


def _save(content: dict[str, Any], path: str | Path) -> None:
    # In a file of Python's, whose errors have the system's reason.
    with write_aside(path) as aside, open(aside, "wb") as file:
        torch.save(content, file)


class _SafeCheckpointer(_Checkpointer):
    def _load_file(self, f: str) -> dict[str, Any]:
        if f.endswith(".pkl"):
            return read_pickled_arrays(f)
        return torch.load(f, map_location="cpu", weights_only=True)


class Checkpointer(CheckpointerMixin, _SafeCheckpointer):
    """fvcore's Checkpointer with :class:`CheckpointerMixin`; loads tensors and plain data only."""


OF_OPTIMIZER = (
    *("BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV"),
    *("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS"),
)
"""Keys of SOLVER that a checkpoint's optimizer has, with which a resumed training goes on."""

_CONFIG = "config.yaml"
"""What a run writes into its folder before anything else."""


def check_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise InputError if there is nothing to resume, or no weights where they are needed.

    A run that was ended before its first checkpoint begins anew: ``args.resume`` is False then.
    """
    check_files(args, ("OUTPUT_DIR", cfg.OUTPUT_DIR), ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS))
    path = os.path.join(cfg.OUTPUT_DIR, _CONFIG)
    # It is empty where a run was killed as it wrote it.
    has_config = os.path.isfile(path) and os.path.getsize(path) > 0
    if args.resume and not args.eval_only and has_config:
        before = load_yaml(path).get("SOLVER", {})
        for key in OF_OPTIMIZER:
            if key in before and cfg.SOLVER.get(key) != before[key]:
                raise InputError(
                    f"SOLVER.{key}: {cfg.SOLVER.get(key)!r} is not accepted with --resume: the "
                    f"run's optimizer goes on with {before[key]!r}; or begin another run with its "
                    "weights (MODEL.WEIGHTS, and another OUTPUT_DIR)"
                )


def check_files(
    args: argparse.Namespace, output: tuple[str, str], weights: tuple[str, str]
) -> None:
    """As :func:`check_start`, from the keys and the values of the folder and the weights."""
    key, folder = output
    last = os.path.join(folder, "last_checkpoint")
    if args.resume and not os.path.isfile(last):
        if os.path.lexists(last):
            raise InputError(f"--resume: {last} is no file; it names the last checkpoint")
        if args.eval_only or not os.path.isfile(os.path.join(folder, _CONFIG)):
            raise InputError(
                f"--resume: {key} {folder} has nothing to resume (no file last_checkpoint)"
            )
        args.resume = _has_unnamed(key, Path(folder))
    if args.resume:
        _check_last(last)
        return
    key, path = weights
    if args.eval_only and not path:
        raise InputError(f"{key}: '' is not accepted; name a checkpoint")
    # Detectron2 takes options after a question mark, where no file has such a name.
    is_there = any(os.path.isfile(of) for of in (path, path.split("?")[0]))
    if path and "://" not in path and not is_there:
        raise InputError(f"{key}: there is no file {path}")


def _has_unnamed(key: str, folder: Path) -> bool:
    """Whether a run was killed after its first checkpoint, and before that was named the last.

    It is now. A run that has none begins anew.

    Raises:
        InputError: there are some of an earlier run, over which it would write.
    """
    found = sorted(folder.glob("model_*.pth"), key=_time_of)
    if not found:
        print(f"--resume: {key} {folder} has no checkpoint yet; the training begins anew")
        return False
    if _time_of(found[0]) < _time_of(folder / _CONFIG):
        raise InputError(
            f"--resume: {key} {folder} has {found[0].name}, which is older than the run, and no "
            "file last_checkpoint that names the last; write that name into one, or use another "
            "folder"
        )
    write_text(folder / "last_checkpoint", found[-1].name)
    print(f"--resume: {key} {folder} has no last_checkpoint; {found[-1].name} is the newest")
    return True


def _time_of(path: Path) -> int:
    return path.stat().st_mtime_ns


def _check_last(path: str) -> None:
    with open(path, "rb") as file:
        name = file.read(1000).decode(errors="replace").strip()
    if not name or not name.isprintable():
        raise InputError(f"--resume: {path}: {name!r} is not the name of a checkpoint beside it")


def save_with_table(content: dict[str, Any], table: dict[str, Any], output: str) -> None:
    """Write a checkpoint, and beside it a table as JSON."""
    path = Path(output)
    was_there = ", in place of what was there," if path.exists() else ","
    _save(content, path)
    write_json(path.with_suffix(".json"), table)
    print(f"Saved to {path}{was_there} and the table to {path.with_suffix('.json')}")
