"""RoIs of torchvision's detectors, told apart by the source of the image that they are from."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads

from ..errors import InputError, of_other_type
from ..layers import image_sources
from ..layers.sources import named_sources

_HEADS = (
    ("box_roi_pool", "box_head"),
    ("mask_roi_pool", "mask_head"),
    ("keypoint_roi_pool", "keypoint_head"),
)


def name_roi_sources(roi_heads: RoIHeads) -> RoIHeads:
    """Have a :class:`bn_det.SourceBatchNorm2d` in RoI heads know whose image each RoI is from.

        bn_det.tv.sources.name_roi_sources(model.roi_heads)
        with bn_det.image_sources([0, 1]):
            losses = model(images, targets)

    In place, once; the state dict is as before. The sources are those of the images that are named
    around the model's call; where none are, nothing changes.

    Returns:
        the RoI heads.

    Raises:
        InputError: it is no RoIHeads of torchvision, or has been changed already.
    """
    if not isinstance(roi_heads, RoIHeads):
        raise of_other_type("roi_heads", roi_heads, "the roi_heads of a detector of torchvision")
    pairs = [(getattr(roi_heads, pool), getattr(roi_heads, head)) for pool, head in _HEADS]
    pairs = [(pool, head) for pool, head in pairs if head is not None]
    for _, head in pairs:
        if "forward" in vars(head):
            raise InputError(
                f"roi_heads: the forward method of its {type(head).__name__} is replaced already; "
                "call name_roi_sources once, on heads as torchvision makes them"
            )
    for pool, head in pairs:
        counts: list[int] = []
        pool.register_forward_pre_hook(partial(_count, counts))
        head.forward = _OfRois(head, counts)
    return roi_heads


def _count(counts: list[int], _: nn.Module, args: tuple) -> None:
    boxes = args[1]
    counts[:] = [len(of_image) for of_image in boxes]


class _OfRois:
    """A head's forward method, inside of which the samples are RoIs.

    No closure, so that a copy of the head finds its own.

    Attributes:
        counts: how many RoIs each image has.
    """

    def __init__(self, head: nn.Module, counts: list[int]) -> None:
        self.head, self.counts = head, counts

    def __call__(self, rois: Tensor) -> Tensor:
        forward = partial(type(self.head).forward, self.head)
        sources = named_sources()
        if not sources:
            return forward(rois)
        pairs = zip(sources, self.counts, strict=True)
        with image_sources([source for source, number in pairs for _ in range(number)]):
            return forward(rois)
