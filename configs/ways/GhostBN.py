"""BatchNorm over parts of a process's samples (Hoffer et al. 2017)."""

from ..common.way import dataloader, lr_multiplier, model, optimizer, train

model.backbone.norm.update(name="GhostBN", ghost_size=1)
model.head.norm.update(name="GhostBN", ghost_size=1)
train.output_dir = "output/ways/GhostBN"
