"""A detector as many projects have: plain Python lists of convolutions, called level by level.

The modules are registered once, by add_module, and all levels go through them one after the other.
"""

import torch
import torch.nn.functional as F
from torch import nn

STRIDES = (4, 8, 16)


class Backbone(nn.Module):
    """Three levels, each of half the size of the one before."""

    def __init__(self, channels=16):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 4, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for _ in STRIDES[1:]
        )

    def forward(self, images):
        features = [self.stem(images)]
        for layer in self.down:
            features.append(layer(features[-1]))
        return features


class Head(nn.Module):
    def __init__(self, channels=16, num_classes=3, num_convs=2, norm=nn.BatchNorm2d):
        super().__init__()
        self.convs, self.norms = [], []
        for k in range(num_convs):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            bn = norm(channels)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"bn{k}", bn)
            self.convs.append(conv)
            self.norms.append(bn)
        self.logits = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, features):
        outputs = []
        for x in features:
            for conv, bn in zip(self.convs, self.norms, strict=True):
                x = F.relu(bn(conv(x)))
            outputs.append(self.logits(x))
        return outputs


class Detector(nn.Module):
    """A dict of losses in training, logits of all places in evaluation."""

    def __init__(self, head=Head):
        super().__init__()
        self.backbone = Backbone()
        self.head = head()

    def forward(self, images, targets=None):
        outputs = self.head(self.backbone(images))
        flat = torch.cat([y.flatten(2) for y in outputs], 2)
        if not self.training:
            return flat
        return {"loss": F.cross_entropy(flat.mean(2), targets)}
