"""RoI pooling from a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_area, roi_align


class RoIPooler(nn.Module):
    """RoIAlign, each box on the level that suits its size (Lin et al. 2017, Eq. 1).

    torchvision's ``MultiScaleRoIAlign`` is the same without ``aligned``, the correction by half a
    pixel that Detectron2 calls ROIAlignV2.

    Args:
        output_size: side of the square that a RoI becomes, in cells.
        strides: of the levels in pixels; powers of 2, each twice the one before. A box of 224 x
            224 pixels belongs to that of stride 16, one of half the side to the one before, and so
            on.
        sampling_ratio: samples in a cell in each direction; 0 for as many as it has pixels of the
            level.
        aligned: see above.
    """

    def __init__(
        self, output_size: int, strides: Sequence[int], sampling_ratio: int, aligned: bool
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = list(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool.

        Args:
            features: for each level (N, C, H_k, W_k).
            boxes: for each image (R_n, 4); x1, y1, x2, y2 in pixels.

        Returns:
            shape (sum of R_n, C, output_size, output_size), the RoIs in the order of the boxes.
        """
        # shape[0], not len, which torch.jit.trace takes for a constant
        rois = torch.cat(
            [torch.cat([b.new_full((b.shape[0], 1), n), b], 1) for n, b in enumerate(boxes)]
        ).to(features[0].dtype)
        levels = self.levels(torch.cat(list(boxes)))
        size = (rois.shape[0], features[0].shape[1], self.output_size, self.output_size)
        pooled = features[0].new_zeros(size)
        for k, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            # Also without RoIs: a backward pass reaches every level, on every process.
            (of_level,) = torch.where(levels == k)
            pooled = pooled.index_put(
                (of_level,),
                roi_align(
                    feature,
                    rois[of_level],
                    self.output_size,
                    1 / stride,
                    self.sampling_ratio,
                    self.aligned,
                ),
            )
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """The index of each box's level; boxes of shape (R, 4), the result (R,)."""
        sides = box_area(boxes).sqrt()
        levels = torch.floor(4 + torch.log2(sides / 224 + 1e-8)) - math.log2(self.strides[0])
        return levels.clamp(0, len(self.strides) - 1).long()

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, strides={self.strides}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
