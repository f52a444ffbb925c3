"""The images that a model is to be used on, where these are of another domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from yacs.config import CfgNode

from ..errors import InputError
from .results import Score, score_of


@contextmanager
def as_training(cfg: CfgNode, name: str) -> Iterator[CfgNode]:
    """Inside the block, the config with a data set of --target in place of the training's.

    All of its images count, those without objects, too. An error that is about the key names the
    flag.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.freeze()
    try:
        yield cfg
    except InputError as e:
        key, _, reason = str(e).partition(": ")
        if key != "DATASETS.TRAIN":
            raise
        raise InputError(f"--target: {reason}") from e


def target_score(
    cfg: CfgNode,
    records: Callable[[CfgNode], Iterable[dict[str, Any]]],
    test: Callable[[CfgNode, nn.Module], Mapping],
) -> Score | None:
    """The AP on the target's images, None where none of them has an object.

    Args:
        cfg: of :func:`as_training`.
        records: the images of DATASETS.TEST.
        test: gives results, as :func:`bn_det.commands.results.score_of` takes it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.freeze()
    has_labels = any(record.get("annotations") for record in records(cfg))
    return score_of(cfg, test) if has_labels else None
