"""Statistics that have been folded into weight and bias, made real again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import InputError, check_positive
from ..layers.comm import Group, process_group
from ..layers.domain_batch_norm import state_holders
from ..layers.folded import is_folded
from ..layers.frameworks import with_statistics
from ..layers.kinds import eps_of, key_of, lists_with_affine, selected, unwrapped, uses_in
from ..layers.types import AnyBatchNorm
from .calling import called
from .estimate import Estimate
from .observation import Observer, PopulationLayer, places_of
from .report import PopulationReport
from .update import How, measure_statistics
from .writing import Value, write_all


def unfold(
    model: nn.Module,
    data_loader: Iterable[Any],
    num_iters: int = 200,
    progress: str | None = None,
    *,
    modules: str | Iterable[str] | None = None,
    allow_short: bool = False,
    call: Callable[[nn.Module, Any], Any] | None = None,
    group: Group = "world",
) -> PopulationReport:
    """Give a model whose statistics are folded into weight and bias real ones, in place.

    In published ResNets from Caffe, for example, every layer has mean 0 and variance 1, and what
    normalized is in weight and bias. Such a layer is right only as long as it is frozen: in
    training, a BatchNorm would normalize by the batch, and then apply weights that are of the order
    of one over the standard deviation.

    The statistics are measured in passes through the model as it is, in which every layer applies
    its folded affine, and weight and bias are then changed so that the function in evaluation stays
    the same, but for rounding. Afterwards it is a BatchNorm like any other: :func:`bn_det.thaw` it,
    or train it. Layers that are not folded are left alone.

    Args:
        data_loader, num_iters, progress, allow_short, call, group: as in
            :func:`bn_det.update_bn_stats`.
        modules: names of modules or patterns of names, as in :func:`bn_det.freeze`; None for all.

    Returns:
        the statistics that have been found, by layer.

    Raises:
        InputError: no layer is folded; weight and bias of one cannot take up the difference; and
            whatever ``update_bn_stats`` raises. Nothing is changed then.
    """
    check_positive("num_iters", num_iters)
    model = unwrapped(model)
    layers = selected("unfold", model, modules)
    lists = lists_with_affine(model)
    folded = {m: name for m, name in layers.items() if is_folded(m, lists.get(m))}
    if not folded:
        raise InputError(
            "unfold: no layer is folded (mean 0 and variance 1, no batch tracked, weight and bias "
            "trained)"
        )
    uses = uses_in(model)
    for layer, name in folded.items():
        _refuse(layer, name, uses)
    places = places_of(model, folded)
    how = How(num_iters, "population_variance", 0.0, allow_short, process_group(group))
    observer = Observer(called(model, call), model, places, by_batch=False)
    found, report = measure_statistics(observer, data_loader, how, progress)
    _write(places, found)
    return report


def _refuse(layer: AnyBatchNorm, name: str, uses: Counter[int]) -> None:
    holders = state_holders(layer)
    affines = {affine for _, affine in holders}
    own = [p for affine in affines for p in (affine.weight, affine.bias) if p is not None]
    why = ""
    if len(affines) < len({population for population, _ in holders}):
        why = (
            "statistics of each domain cannot be taken out of an affine that domains share; "
            "convert it to an affine per domain first"
        )
    elif len(own) < 2 * len(affines):
        why = "it has no weight or no bias to take up what statistics change"
    elif any(map(is_parametrized, affines)):
        why = "its weight or bias is parametrized; remove_parametrizations first"
    elif any(uses[key_of(p)] > 1 for p in own):
        why = "its weight or bias is another layer's, too; give each its own first"
    if why:
        raise InputError(f"unfold: {name or type(layer).__name__}: {why}")


def _write(places: list[PopulationLayer], found: list[Estimate | None]) -> None:
    """New statistics, and the weight and bias with which the function is the same."""
    values: list[Value] = []
    for place, estimate in zip(places, found, strict=True):
        if estimate is None:
            continue
        layer, new = place.module, (estimate.mean, estimate.var)
        old = layer.running_mean.double(), layer.running_var.double()
        for population, affine in state_holders(place.owner):
            if population is layer:
                affines = affine.weight.double(), affine.bias.double()
                of_affine = with_statistics(*affines, old, new, eps_of(place.owner))
                values += [
                    Value(place.name, tensor, value)
                    for tensor, value in zip((affine.weight, affine.bias), of_affine, strict=True)
                ]
        values.append(Value(place.name, layer.running_mean, new[0]))
        values.append(Value(place.name, layer.running_var, new[1]))
    write_all("unfold", values)
