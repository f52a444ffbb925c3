"""ResNet-50 with FrozenBN, for weights of ImageNet; stem and res2 are frozen."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

resnet = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="${..stem.norm}"),
    out_features=["res2", "res3", "res4", "res5"],
    freeze_at=2,
)
