"""The images that a model is to be used on, where these are of another domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from yacs.config import CfgNode

from ..errors import InputError


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
