"""What is in the statistics of a BatchNorm, and in its weight and bias: trained, folded, or new."""

from __future__ import annotations

from .domain_batch_norm import state_holders
from .kinds import eps_of, evaluates_by_batch, why_lazy
from .types import Affine, AnyBatchNorm, has_statistics


def has_trivial_statistics(layer: AnyBatchNorm) -> bool:
    """Whether normalizing by the layer's population statistics changes nothing, in any domain."""
    holders = {population for population, _ in state_holders(layer)}
    return not why_lazy(layer) and all(
        has_statistics(holder)
        and holder.running_mean.device.type != "meta"
        and not holder.running_mean.any()
        # Detectron2 writes 1 - eps for what is folded.
        and bool(((holder.running_var - 1).abs() <= 2 * eps_of(layer)).all())
        for holder in holders
    )


def is_folded(layer: AnyBatchNorm, in_list: Affine | None = None) -> bool:
    """Whether statistics seem to have been folded into weight and bias.

    These are trained then, and nothing has updated the statistics since. (So it looks, too, where
    nothing has ever updated them.) A new layer has a constant weight and no bias.

    Args:
        in_list: what has weight and bias for the layer (``lists_with_affine``), if that is so.
    """
    if evaluates_by_batch(layer) or not has_trivial_statistics(layer):
        return False
    holders = state_holders(layer)
    counters = [getattr(population, "num_batches_tracked", None) for population, _ in holders]
    if any(counter is not None and counter > 0 for counter in counters):
        return False
    affines: list[Affine] = [a for _, a in holders] if in_list is None else [in_list]
    return any(map(is_trained, affines))


def is_trained(affine: Affine) -> bool:
    """Whether weight and bias are other than those of a new layer, whose weight is a constant."""
    weight, bias = affine.weight, affine.bias
    varies = weight is not None and not bool((weight == weight[0]).all())
    return varies or (bias is not None and bool(bias.any()))


def has_learned(layer: AnyBatchNorm) -> bool:
    """Whether a layer has statistics or an affine that a new one would not have."""
    holders = state_holders(layer)
    has_statistics = any(population.running_mean is not None for population, _ in holders)
    if has_statistics and not has_trivial_statistics(layer):
        return True
    return any(is_trained(affine) for _, affine in holders)
