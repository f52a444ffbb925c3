#!/usr/bin/env python
"""PreciseBN: bn_det.update_bn_stats against fvcore's, on the same batches of the same detectors.

The quick-start RetinaNet, whose head has statistics per level, and a Mask R-CNN with BatchNorm in
the backbone alone, of the torchvision host. fvcore's function refuses a layer for several levels,
so that its RetinaNet has one for each, called in turn as Detectron2's stock head does. Errors are
the largest of a layer (see bn_det.Estimate) against brute force in float64 over the same batches;
the error of the adaptive run (--tolerance) is against --reference-samples of fresh ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch
from fvcore.nn.precise_bn import update_bn_stats as fvcore_update_bn_stats
from tabulate import tabulate
from torch import Tensor, nn

from bn_det import Moments, update_bn_stats
from bn_det.commands.checkpoint import Checkpointer
from bn_det.config.load import load_config
from bn_det.tv import get_cfg
from bn_det.tv.data import build_train_loader
from bn_det.tv.model import build_model
from bn_det.tv.trainer import load_datasets, losses_of
from stock import with_stock_heads
from timing import seconds

CONFIGS = Path(__file__).parents[1] / "configs"
DETECTORS = {
    "quick_start": ("quick_start.yaml", []),
    "mask_rcnn": (
        "Base-RCNN-Shapes.yaml",
        [
            *("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", ""),
            *("MODEL.ROI_MASK_HEAD.NORM", "", "SOLVER.IMS_PER_BATCH", "8"),
        ],
    ),
}


class Losses(nn.Module):
    """A detector as a function of one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: list) -> dict[str, Tensor]:
        return losses_of(self.model, batch)


def brute_force(model: nn.Module, batches: Iterable[list]) -> dict[str, Moments]:
    """The moments of all values that each layer sees in a copy of the model in float64."""
    model = with_stock_heads(copy.deepcopy(model)).double()
    seen: dict[str, Moments] = {}

    def add(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            values = inputs[0].movedim(1, -1).flatten(0, -2)
            var, mean = torch.var_mean(values, 0, correction=0)
            new = Moments(torch.tensor(float(len(values))).double(), mean, var)
            seen[name] = Moments.merge([seen[name], new]) if name in seen else new

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(add(name))
    with torch.no_grad():
        for batch in batches:
            losses_of(model, [(image.double(), _double(t), record) for image, t, record in batch])
    return seen


def _double(target: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in target.items()}


def error(model: nn.Module, expected: dict[str, Moments]) -> float:
    """The largest of a layer: of the mean in standard deviations, of the variance relative."""
    errors = []
    for name, moments in expected.items():
        bn = model.get_submodule(name)
        mean = (bn.running_mean - moments.mean) / moments.var.sqrt()
        var = (bn.running_var - moments.var) / moments.var
        errors += [float(e.square().mean().sqrt()) for e in (mean, var)]
    return max(errors)


def measure(detector: str, args: argparse.Namespace) -> dict[str, float]:
    config, opts = DETECTORS[detector]
    cfg = get_cfg()
    size = ["INPUT.MIN_SIZE_TRAIN", f"({args.size},)", "INPUT.MAX_SIZE_TRAIN", str(args.size)]
    device = ["MODEL.DEVICE", args.device, "SOLVER.MAX_ITER", "1000000"]
    load_config(cfg, str(CONFIGS / config), [*opts, *size, *device], "torchvision")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if args.weights and detector == "quick_start":
        Checkpointer(model).load(args.weights)
    datasets = load_datasets(cfg, "TRAIN")
    batches = list(islice(build_train_loader(cfg, datasets, 0, 0), args.num_iters))
    fvcore_s, ours_s = [], []
    for _ in range(args.rounds):
        theirs, ours = with_stock_heads(copy.deepcopy(model)), copy.deepcopy(model)
        fvcore_s.append(seconds(lambda m=theirs: _fvcore(m, batches)))
        ours_s.append(
            seconds(lambda m=ours: update_bn_stats(m, batches, len(batches), call=losses_of))
        )
    expected = brute_force(model, batches)
    adaptive = copy.deepcopy(model)
    report = update_bn_stats(
        adaptive, batches, len(batches), tolerance=args.tolerance, call=losses_of
    )
    many = copy.deepcopy(model)
    num = args.reference_samples // cfg.SOLVER.IMS_PER_BATCH
    update_bn_stats(many, build_train_loader(cfg, datasets, 1, 0), num, call=losses_of)
    reference = {
        name: Moments(m.count, *(b.double() for b in _statistics(many, name)))
        for name, m in expected.items()
    }
    theirs_s, own_s = statistics.median(fvcore_s), statistics.median(ours_s)
    return {
        "fvcore_s": theirs_s,
        "ours_s": own_s,
        "speedup": theirs_s / own_s,
        "error_ours": error(ours, expected),
        "error_fvcore": error(theirs, expected),
        "adaptive_samples": report.num_samples,
        "fixed_samples": args.num_iters * cfg.SOLVER.IMS_PER_BATCH,
        "adaptive_error": error(adaptive, reference),
    }


def _statistics(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    bn = model.get_submodule(name)
    return bn.running_mean, bn.running_var


def _fvcore(model: nn.Module, batches: list) -> None:
    fvcore_update_bn_stats(Losses(model), batches, len(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--rounds", type=int, default=3, help="of each form, in turn")
    parser.add_argument("--num-iters", type=int, default=200, help="batches of 8 images")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the adaptive run")
    parser.add_argument("--reference-samples", type=int, default=20000)
    parser.add_argument("--size", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--weights", help="a checkpoint of the quick start on this host")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    results = {detector: measure(detector, args) for detector in DETECTORS}
    if args.json:
        print(json.dumps(results))
    else:
        for detector, result in results.items():
            print(f"{detector}\n{tabulate(list(result.items()), floatfmt='.3g')}")


if __name__ == "__main__":
    main()
