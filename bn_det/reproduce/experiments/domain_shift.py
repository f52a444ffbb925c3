"""Section 5: population statistics of the domain that the model is used on (AdaBN)."""

from __future__ import annotations

from ..steps import Setting, Step, Training, recompute
from .common import base_training

DOMAINS = ("night", "fog", "sensor")


def adabn_step(of: Training, domain: str) -> Step:
    flags = ("--adabn", "--dataset", f"shapes_{domain}_val")
    opts = ("TEST.PRECISE_BN.IMS_PER_BATCH", 32)
    return recompute(of, f"adabn-{domain}", 35, flags, opts)


def plan(setting: Setting, seed: int) -> list[Step]:
    of = base_training(setting, seed)
    return [of.step, *(adabn_step(of, domain) for domain in DOMAINS)]
