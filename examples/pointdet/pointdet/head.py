import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointHead(nn.Module):
    """Scores the classes at every point of a pyramid, and measures the box around it.

    The levels share everything but the scale of their distances.
    """

    def __init__(self, channels: int, num_levels: int, num_classes: int, num_convs: int) -> None:
        super().__init__()
        layers = []
        for _ in range(num_convs):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        self.tower = nn.Sequential(*layers)
        self.scores = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        for conv in (self.scores, self.distances):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        # At first every class has a probability of 1 %.
        nn.init.constant_(self.scores.bias, -math.log(99))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """From one feature map for each level to its logits and its distances in strides."""
        hidden = [self.tower(x) for x in features]
        logits = [self.scores(x) for x in hidden]
        distances = [
            F.softplus(scale * self.distances(x) + 1.0)
            for scale, x in zip(self.scales, hidden, strict=True)
        ]
        return logits, distances


class RefineHead(nn.Module):
    """Takes a second look at a box, in its RoI features: what is it, and where exactly?"""

    def __init__(self, channels: int, resolution: int, num_classes: int, dim: int = 128) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(channels * resolution**2, dim)
        self.scores = nn.Linear(dim, num_classes + 1)
        self.deltas = nn.Linear(dim, 4)
        for layer in (self.scores, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """From RoI features to logits (the last one is "no object") and box deltas."""
        hidden = self.fc(self.convs(rois).flatten(1)).relu()
        return self.scores(hidden), self.deltas(hidden)
