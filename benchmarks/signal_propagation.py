#!/usr/bin/env python
"""Signal propagation through ResNet-50s at initialization, from images of Gaussian noise.

After each residual block: averages over channels of the squared mean and of the variance, of the
residual stream and of the residual branch's last convolution or BatchNorm (Brock et al.,
*Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets*, 2021,
Sec. 3.1). Medians over weights.

timm's nf_resnet50 begins with branches that are closed, by a gain of 0; it stands here as it
begins, and with branches opened, a gain of 1. torchvision's ResNet-50 stands here with BatchNorm in
training mode, and with its norms removed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import resnet50

COLUMNS = ("stream_mean2", "stream_var", "branch_mean2", "branch_var")


def nf_closed() -> nn.Module:
    return timm.create_model("nf_resnet50", num_classes=0)


def nf_opened() -> nn.Module:
    net = nf_closed()
    for stage in net.stages:
        for block in stage:
            nn.init.ones_(block.conv3.gain)
    return net


def without_norms() -> nn.Module:
    return resnet50(norm_layer=nn.Identity)


NETS = {
    "nf_resnet50": nf_closed,
    "nf_resnet50, opened": nf_opened,
    "ResNet-50, BN": resnet50,
    "ResNet-50, no norm": without_norms,
}


def stages_of(net: nn.Module) -> list[nn.Sequential]:
    if hasattr(net, "stages"):
        return list(net.stages)
    return [net.layer1, net.layer2, net.layer3, net.layer4]


def mean2_and_var(x: Tensor) -> tuple[float, float]:
    """Averages over channels, of (N, C, H, W)."""
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    return mean.square().mean().item(), var.mean().item()


@torch.no_grad()
def measure(make: Callable[[], nn.Module], x: Tensor) -> Tensor:
    """Of each block the values of COLUMNS: (number of blocks, 4)."""
    net, rows = make().train(), []
    for stage in stages_of(net):
        for block in stage:
            # What the branch gives, before it is added.
            last = block.conv3 if hasattr(net, "stages") else block.bn3
            row: dict[str, tuple[float, float]] = {}
            rows.append(row)
            for module, name in ((block, "stream"), (last, "branch")):
                module.register_forward_hook(
                    lambda *a, row=row, name=name: row.update({name: mean2_and_var(a[2])})
                )
    net(x)
    return torch.tensor([row["stream"] + row["branch"] for row in rows], dtype=torch.float64)


def plot(results: dict[str, Tensor], ends: list[int], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ["squared mean", "variance", "squared mean of branches", "variance of branches"]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for k, (axis, title) in enumerate(zip(axes.T.flat, titles, strict=True)):
        for (name, values), marker in zip(results.items(), "o^sx", strict=True):
            blocks = range(1, len(values) + 1)
            axis.plot(blocks, values[:, k].clamp(min=1e-6), label=name, marker=marker, markersize=4)
        for end in ends:
            axis.axvline(end + 0.5, color="0.8", linewidth=0.8)
        axis.set(yscale="log", title=f"{title}, mean of channels")
    for axis in axes[1]:
        axis.set_xlabel("residual block")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", help="a picture to write")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="of new weights and images")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = (args.images, 3, args.size, args.size)
    results = {
        name: torch.stack([measure(make, torch.randn(shape)) for _ in range(args.rounds)])
        .median(0)
        .values
        for name, make in NETS.items()
    }
    depths = torch.tensor([len(stage) for stage in stages_of(resnet50())])
    if args.output:
        plot(results, depths.cumsum(0)[:-1].tolist(), args.output)
    blocks = [f"res{s + 2}.{b}" for s, depth in enumerate(depths.tolist()) for b in range(depth)]
    tables = {
        name: [
            {"block": block, **dict(zip(COLUMNS, row, strict=True))}
            for block, row in zip(blocks, values.tolist(), strict=True)
        ]
        for name, values in results.items()
    }
    if args.json:
        print(json.dumps(tables))
        return
    for name, rows in tables.items():
        print(f"\n{name}\n{tabulate(rows, headers='keys', floatfmt='.3g')}")


if __name__ == "__main__":
    main()
