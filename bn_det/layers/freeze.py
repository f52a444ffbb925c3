"""BatchNorm whose population statistics are final, for further training."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from .batch_norm import BatchNorm2d
from .convert import convert_batchnorm
from .domain_batch_norm import called_batch_norms, state_holders

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, affine: bool = True) -> nn.Module:
    """Have every BatchNorm of a model normalize by its population statistics, in training, too.

    In place, and for good: the statistics no longer change, as in Detectron2's FrozenBatchNorm2d,
    neither by training nor by ``update_bn_stats``. torch's layers are exchanged for ours
    (``convert_batchnorm``).

    With ``affine=False`` it warns of layers with mean 0 and variance 1: a checkpoint has them where
    statistics have been folded into weight and bias, as in the published ResNets of Caffe. These
    then learn otherwise than those of the model before folding. A model that has never been trained
    has such statistics, too, and gets the same warning.

    Args:
        affine: whether weight and bias are frozen, too (they need no gradient).

    Returns:
        the model, or the new layer if it is a BatchNorm itself.

    Raises:
        InputError: the model has a BatchNorm1d or 3d.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm3d)):
            raise InputError(
                f"freeze: {name} is a {type(layer).__name__}; BatchNorm2d and SyncBatchNorm can be "
                "frozen"
            )
    frozen = {"train_statistics": "population", "track_running_stats": False, "renorm": None}
    model = convert_batchnorm(model, BatchNorm2d)
    for layer in model.modules():
        if isinstance(layer, BatchNorm2d):
            vars(layer).update(frozen)
            if affine:
                layer.requires_grad_(False)
    if not affine:
        warn_of_folded_statistics(model)
    return model


def warn_of_folded_statistics(model: nn.Module) -> None:
    """Warn of layers whose weight and bias are to be trained, but with statistics folded into them.

    With scale a = weight / std and shift b = bias - mean * a the layer computes a x + b. A step of
    SGD on a and b is not one on weight and bias: it lacks the factor 1 / var in a, for example.
    """
    names = [
        name or type(layer).__name__
        for layer, name in called_batch_norms(model).items()
        if any(p.requires_grad for p in layer.parameters()) and _is_trivial(layer)
    ]
    if names:
        logger.warning(
            "Frozen BatchNorm with mean 0 and variance 1: %s. Where statistics have been folded "
            "into weight and bias, these have other gradients than before and learn otherwise; "
            "freeze them, too, unless the model has not been trained before",
            ", ".join(names),
        )


def _is_trivial(layer: _BatchNorm) -> bool:
    """Whether normalizing by the layer's population statistics changes nothing, in any domain."""
    holders = {population for population, _ in state_holders(layer)}
    return all(
        holder.running_mean is not None
        and not holder.running_mean.any()
        # Detectron2 writes 1 - eps for what is folded.
        and bool(((holder.running_var - 1).abs() <= 2 * layer.eps).all())
        for holder in holders
    )
