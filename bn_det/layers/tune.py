"""Frozen BatchNorm inside the convolution before it, for training."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .freeze import is_frozen
from .fuse import foldable, warn_of_nothing
from .kinds import batch_norms, refuse_meta, unwrapped
from .tuned import tune_pair, untune


class TuneReport(NamedTuple):
    """What :func:`tune` has done.

    Attributes:
        tuned: names of the BatchNorm layers that are in the weight of a convolution in each call.
        left: names of the others, each with the reason.
    """

    tuned: list[str]
    left: dict[str, str]


def tune(model: nn.Module) -> TuneReport:
    """Fold each frozen BatchNorm into the weight of its convolution as often as it is called.

    In place; for fine-tuning, where fused weights (:func:`bn_det.fuse`) would learn otherwise. The
    weight with the scale in it is a part of the graph: outputs and gradients are those of the model
    as it is, but for rounding, of the convolution's weight and bias and of the BatchNorm's, if they
    learn. What it saves is the pass over the output, forward and backward; where weight and bias of
    the BatchNorm learn, also the output, which these hold otherwise. Where the output of a call is
    smaller than the weight, it is the output that is scaled, by the layer as it is. The derived
    weight is held for the backward pass.

    Parameters, buffers and their names stay, and so do optimizers and checkpoints. A head on
    several levels (:class:`~bn_det.DomainBatchNorm2d`) derives a weight for each. Which layers fit
    is found as by :func:`bn_det.fuse`.

    A layer that is thawed afterwards, or somebody's hooks look at, computes by itself again; a call
    decides. :func:`bn_det.thaw` undoes it, :func:`bn_det.convert_batchnorm` and
    :func:`bn_det.fuse` do. A convolution that is called without its BatchNorm returns no tensor.

    It is the Tune mode of You et al., *Efficient ConvBN Blocks for Transfer Learning and Beyond*,
    ICLR 2024, Sec. 3.3.

    Args:
        model: with layers that are frozen (:func:`bn_det.freeze`, FrozenBatchNorm2d of either
            host). Its mode does not matter. Layers that are frozen later need another call.

    Raises:
        InputError: the model is on the meta device.
    """
    report = tune_what_is_frozen(model)
    warn_of_nothing("tune", report.tuned, report.left)
    return report


def tune_what_is_frozen(model: nn.Module) -> TuneReport:
    """As :func:`tune`, of a model in which nothing may be frozen yet."""
    model = unwrapped(model)
    refuse_meta("tune", model)
    untune(model)
    names = batch_norms(model)
    moving = [name for layer, name in names.items() if not is_frozen(layer)]
    found, left = foldable(model, dict.fromkeys(moving, "it is not frozen; call freeze first"))
    for pair in found.values():
        tune_pair(pair.conv, pair.norm)
    return TuneReport(list(found), left)
