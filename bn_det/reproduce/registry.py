"""The experiments by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from .experiments import (
    batch_size,
    correlated,
    doctor,
    domain_shift,
    frozen,
    laboratories,
    leakage,
    loss_spike,
    multi_domain,
    new_laboratory,
    normalizer_free,
    population,
)

EXPERIMENTS = {
    "multi-domain": multi_domain,
    "leakage": leakage,
    "population": population,
    "batch-size": batch_size,
    "frozen": frozen,
    "domain-shift": domain_shift,
    "correlated": correlated,
    "normalizer-free": normalizer_free,
    "loss-spike": loss_spike,
    "doctor": doctor,
}

_ON_CELLS = {
    "multi-domain": laboratories,
    "leakage": leakage,
    "population": population,
    "domain-shift": new_laboratory,
    "doctor": doctor,
}
"""Whose domains are laboratories."""

NOT_ON_COCO = ("domain-shift", "correlated", "loss-spike", "doctor")
"""Those whose data COCO does not have, or that have no settings for it."""

SEVERAL_GPUS = ("leakage", "batch-size")
"""Those that on COCO compare the batch of a GPU with that of all."""


def experiments_on(data: str) -> Mapping[str, ModuleType]:
    """Those that there are on some data."""
    if data == "cells":
        return _ON_CELLS
    return {n: of for n, of in EXPERIMENTS.items() if data == "shapes" or n not in NOT_ON_COCO}
