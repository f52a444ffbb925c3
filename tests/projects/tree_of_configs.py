"""A detector like those that are built from nested dicts: ConvModule, norm_eval, frozen_stages.

Its names are those of such a tree (backbone.layer1.0.bn1, bbox_head.cls_convs.0.bn), and its files
hold state_dict, meta and optimizer.
"""

import torch
import torch.nn.functional as F
from torch import nn


class BaseModule(nn.Module):
    def __init__(self, init_cfg=None):
        super().__init__()
        self.init_cfg = init_cfg


class ConvModule(BaseModule):
    """Convolution, norm and activation; the norm by a name, found by a property."""

    def __init__(self, inputs, outputs, size=3, stride=1, norm_cfg=None, act=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=norm_cfg is None)
        self.norm_name = None
        if norm_cfg is not None:
            norm_cfg = dict(norm_cfg)
            kind, requires_grad = norm_cfg.pop("type"), norm_cfg.pop("requires_grad", True)
            self.norm_name = "bn"
            self.add_module("bn", {"BN": nn.BatchNorm2d}[kind](outputs, **norm_cfg))
            for parameter in self.bn.parameters():
                parameter.requires_grad = requires_grad
        self.activate = nn.ReLU(inplace=True) if act else None

    @property
    def norm(self):
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x, activate=True, norm=True):
        x = self.conv(x)
        if norm and self.norm_name:
            x = self.norm(x)
        return self.activate(x) if activate and self.activate is not None else x


class Block(BaseModule):
    def __init__(self, inputs, outputs, stride, norm_cfg):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.add_module(self.norm1_name, nn.BatchNorm2d(outputs))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(outputs))
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Backbone(BaseModule):
    def __init__(self, frozen_stages=-1, norm_eval=True, norm_cfg=None, channels=8):
        super().__init__(init_cfg={"type": "Pretrained", "checkpoint": "none"})
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.conv1 = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.norm1_name = "bn1"
        self.add_module(self.norm1_name, nn.BatchNorm2d(channels))
        self.res_layers = []
        for k in range(3):
            name = f"layer{k + 1}"
            stage = nn.Sequential(
                Block(channels, channels, 1 + (k > 0), norm_cfg),
                Block(channels, channels, 1, norm_cfg),
            )
            self.add_module(name, stage)
            self.res_layers.append(name)
        self._freeze_stages()

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    def _freeze_stages(self):
        if self.frozen_stages >= 0:
            self.norm1.eval()
            for module in (self.conv1, self.norm1):
                for parameter in module.parameters():
                    parameter.requires_grad = False
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            stage = getattr(self, name)
            stage.eval()
            for parameter in stage.parameters():
                parameter.requires_grad = False

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        outs = []
        for name in self.res_layers:
            x = getattr(self, name)(x)
            outs.append(x)
        return tuple(outs)

    def train(self, mode=True):
        """What such backbones do: their BatchNorm stays in evaluation mode, whatever is asked."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class Head(BaseModule):
    def __init__(self, num_classes=3, channels=8, stacked_convs=2, norm_cfg=None):
        super().__init__(init_cfg={"type": "Normal", "layer": "Conv2d", "std": 0.01})
        self.cls_convs = nn.ModuleList(
            ConvModule(channels, channels, norm_cfg=norm_cfg) for _ in range(stacked_convs)
        )
        self.atss_cls = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward_single(self, x):
        for conv in self.cls_convs:
            x = conv(x)
        return self.atss_cls(x)

    def forward(self, features):
        return [self.forward_single(x) for x in features]


class Detector(BaseModule):
    """Called as model(inputs, data_samples, mode="loss"), or by train_step(data)."""

    def __init__(self, frozen_stages=1, norm_eval=True, norm_cfg=None):
        super().__init__()
        norm_cfg = norm_cfg or {"type": "BN", "requires_grad": True}
        self.backbone = Backbone(frozen_stages, norm_eval, norm_cfg)
        self.neck = nn.ModuleList(ConvModule(8, 8, 1, norm_cfg=norm_cfg) for _ in range(3))
        self.bbox_head = Head(norm_cfg=norm_cfg)

    def extract_feat(self, x):
        return [conv(f) for conv, f in zip(self.neck, self.backbone(x), strict=True)]

    def forward(self, inputs, data_samples=None, mode="tensor"):
        outputs = self.bbox_head(self.extract_feat(inputs))
        if mode == "tensor":
            return outputs
        if mode == "predict":
            return [y.amax((2, 3)) for y in outputs]
        labels = torch.tensor([sample["label"] for sample in data_samples])
        means = torch.stack([y.mean((2, 3)) for y in outputs]).mean(0)
        return {"loss_cls": F.cross_entropy(means, labels)}


def save_checkpoint(model, path, optimizer=None):
    content = {
        "meta": {"epoch": 3, "iter": 30, "CLASSES": ("a", "b", "c"), "config": "model = dict(...)"},
        "state_dict": model.state_dict(),
    }
    if optimizer is not None:
        content["optimizer"] = optimizer.state_dict()
    torch.save(content, path)
