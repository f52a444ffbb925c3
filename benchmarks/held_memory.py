#!/usr/bin/env python
"""What a ResNet-50-FPN holds for its backward pass, by the state of its BatchNorm, and tune's step.

The backbone is torchvision's, with random weights and its FrozenBatchNorm2d. Activations are all
that autograd saves but parameters and buffers, each memory once; the weights that bn_det.tune
derives are counted apart. Training steps (forward and backward pass) of the tuned and of the frozen
model alternate, so that drifts cancel; a ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from itertools import chain

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from bn_det import freeze, thaw, tune
from bn_det.commands.cli import run
from bn_det.errors import check_positive
from timing import seconds

WARM_UP = 3


def make_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    frozen_bn = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5)
    models = {name: copy.deepcopy(frozen_bn) for name in ("freeze", "tune", "bn")}
    freeze(thaw(models["freeze"]))
    thaw(models["bn"])
    if left := tune(models["tune"]).left:
        raise RuntimeError(f"tune has left {left}")
    return {"frozen_bn": frozen_bn, **models}


def held_mib(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """MiB of activations that a forward pass holds, and of derived weights."""
    own = list(chain(model.parameters(), model.buffers()))
    memory = {t.untyped_storage().data_ptr() for t in own}
    weights = {tuple(t.shape) for t in own if t.dim() == 4}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in memory:
            saved[t.untyped_storage().data_ptr()] = t  # and so its memory is nobody else's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model(images)
    totals = [0, 0]
    for t in saved.values():
        totals[tuple(t.shape) in weights] += t.untyped_storage().nbytes()
    del outputs
    return totals[0] / 2**20, totals[1] / 2**20


def step(model: nn.Module, images: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    sum(level.sum() for level in model(images).values()).backward()


def step_ratios(tuned: nn.Module, frozen: nn.Module, images: Tensor, rounds: int) -> list[float]:
    """Seconds of a step of the tuned model over those of the frozen one, round by round."""
    ratios = []
    for k in range(WARM_UP + rounds):
        order = (tuned, frozen) if k % 2 else (frozen, tuned)
        times = {model: seconds(lambda model=model: step(model, images)) for model in order}
        ratios.append(times[tuned] / times[frozen])
    return ratios[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that count")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[128, 160], metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument(
        "--step-size",
        type=int,
        nargs=2,
        default=[256, 320],
        metavar=("HEIGHT", "WIDTH"),
        help="of the images of a step; where they are smaller, the norm is less of it",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    for flag in ("rounds", "batch"):
        check_positive(f"--{flag}", getattr(args, flag))
    for flag in ("size", "step_size"):
        for value in getattr(args, flag):
            check_positive(f"--{flag.replace('_', '-')}", value)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' is not accepted: torch sees no GPU here; use cpu")
    models = {name: model.to(args.device).train() for name, model in make_models().items()}
    images, of_step = (
        torch.randn(args.batch, 3, *size, device=args.device)
        for size in (args.size, args.step_size)
    )
    held = {name: held_mib(model, images) for name, model in models.items()}
    ratios = step_ratios(models["tune"], models["frozen_bn"], of_step, args.rounds)
    result = {
        **{f"{name}_mib": activations for name, (activations, _) in held.items()},
        "tune_derived_weights_mib": held["tune"][1],
        "tune_step": statistics.median(ratios),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(tabulate(list(result.items()), floatfmt=".4g"))


if __name__ == "__main__":
    run(main)
