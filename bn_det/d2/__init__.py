"""The Detectron2 host: registered components. Importing it registers them."""

from ..config.keys import add_bn_det_config
from .backbone import (
    build_bn_fcos_resnet_fpn_backbone,
    build_bn_resnet_fpn_backbone,
    build_bn_retinanet_resnet_fpn_backbone,
    build_nf_resnet_fpn_backbone,
    build_nf_retinanet_resnet_fpn_backbone,
)
from .datasets import register_datasets
from .default_trainer import BNHooks
from .fcos import BNFCOS, BNFCOSHead
from .hooks import (
    AverageStatistics,
    FreezeBN,
    LossSpikes,
    Monitor,
    PreciseBN,
    RenormSchedule,
    TuneBN,
    VirtualBatch,
    build_precise_bn,
    build_virtual_batch,
)
from .retinanet import BNRetinaNet, BNRetinaNetHead
from .roi_heads import BNCascadeROIHeads, BNFastRCNNConvFCHead, BNMaskRCNNConvUpsampleHead
from .rpn import BNRPNHead
from .sources import BNGeneralizedRCNN

__all__ = [
    "BNFCOS",
    "AverageStatistics",
    "BNCascadeROIHeads",
    "BNFCOSHead",
    "BNFastRCNNConvFCHead",
    "BNGeneralizedRCNN",
    "BNHooks",
    "BNMaskRCNNConvUpsampleHead",
    "BNRPNHead",
    "BNRetinaNet",
    "BNRetinaNetHead",
    "FreezeBN",
    "LossSpikes",
    "Monitor",
    "PreciseBN",
    "RenormSchedule",
    "TuneBN",
    "VirtualBatch",
    "add_bn_det_config",
    "build_bn_fcos_resnet_fpn_backbone",
    "build_bn_resnet_fpn_backbone",
    "build_bn_retinanet_resnet_fpn_backbone",
    "build_nf_resnet_fpn_backbone",
    "build_nf_retinanet_resnet_fpn_backbone",
    "build_precise_bn",
    "build_virtual_batch",
    "register_datasets",
]
