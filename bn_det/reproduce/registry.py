"""The experiments by name."""

from __future__ import annotations

from .experiments import (
    batch_size,
    correlated,
    domain_shift,
    frozen,
    leakage,
    multi_domain,
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
}

SHAPES_ONLY = ("domain-shift", "correlated")
"""Those whose data COCO does not have."""

SEVERAL_GPUS = ("leakage", "batch-size")
"""Those that on COCO compare the batch of a GPU with that of all."""
