"""FCOS R-50 FPN on COCO as in Detectron2's configs/COCO-Detection/fcos_R_50_FPN_1x.py, but with
SyncBN in the head instead of GN: its five levels are normalized together, and share population
statistics. In 8 processes of 2 images.
"""

from ..common.data import dataloader
from ..common.fcos import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

model.head.norm.update(name="SyncBN", statistics="shared", population="shared")
optimizer.lr = 0.01
train.output_dir = "output/heads/fcos_shared"
