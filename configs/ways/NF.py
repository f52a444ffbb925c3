"""Normalizer-free: an NF-ResNet of timm, scaled weight standardization in FPN and head, and
adaptive gradient clipping (Brock et al. 2021).
"""

from detectron2.config import LazyCall as L

from bn_det.d2.backbone import build_nf_bottom_up

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up = L(build_nf_bottom_up)(
    name="nf_resnet50", pretrained="timm", drop_path_rate=0.0, freeze_at=2
)
model.backbone.weight_norm = "ScaledWS"
model.head.weight_norm = "ScaledWS"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
optimizer.agc = dict(clip_factor=0.01, eps=0.001)
train.init_checkpoint = ""
train.output_dir = "output/ways/NF"
