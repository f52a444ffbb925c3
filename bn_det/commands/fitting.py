"""Whether the weights of a checkpoint are those of a model, and what is the matter if not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..errors import InputError
from ..layers.state_dicts import State, wrapped_prefix
from ..layers.unfuse import fused_layers

_HOST_OF = {"backbone.bottom_up.": "Detectron2", "backbone.body.": "torchvision"}
"""By how names of weights begin."""


def refuse_others(model: nn.Module, weights: Collection[str]) -> None:
    """Before every weight that is missing is listed."""
    own = {name.removeprefix("module.") for name in model.state_dict()}
    if any(name.removeprefix("module.") in own for name in weights):
        return
    for start, host in _HOST_OF.items():
        if any(name.startswith(start) for name in weights):
            hint = f"they are those of a detector of {host}; use --host {host.lower()}"
            break
    else:
        first = f"its first is {min(weights)!r}, the model's {min(own)!r}" if weights else ""
        hint = first or "it has none"
    raise InputError(f"the checkpoint has no weights with the names of this config's model: {hint}")


def refuse_rest(missing: Sequence[str], unused: Sequence[str]) -> None:
    """Raise InputError for weights that a checkpoint lacks, or has no place for in the model."""
    if missing:
        raise InputError(
            f"{missing[0]}: the checkpoint lacks it and {len(missing) - 1} more of the model of "
            "this config"
        )
    if unused:
        raise InputError(
            f"{unused[0]}: the checkpoint has it and {len(unused) - 1} more, for which the model "
            "of this config has no place"
        )


_NORMALIZATION = ("pixel_mean", "pixel_std")
"""Of images; with the anchors what Detectron2 saved until 2021, and has of the config since."""


def without_constants(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of a checkpoint without constants that a model has of its config.

    Raises:
        InputError: images would be normalized by others.
    """
    own, buffers = model.state_dict(), dict(model.named_buffers())
    left = {
        name
        for name in weights
        if name not in own and (name in _NORMALIZATION or "anchor_generator.cell_anchors" in name)
    }
    for name in sorted(left.intersection(_NORMALIZATION) & buffers.keys()):
        both = weights[name], buffers[name]
        before, now = (torch.as_tensor(t, dtype=torch.float32).flatten().tolist() for t in both)
        if before != now:
            raise InputError(
                f"{name}: the checkpoint has {before}, and MODEL.{name.upper()} is {now}; images "
                "would be normalized otherwise than in its training"
            )
    return {name: weight for name, weight in weights.items() if name not in left}


def refuse_not_finite(named: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise InputError for tensors that have NaN or infinity.

    Args:
        what: ends the message: what there is to do.
    """
    broken = [
        name
        for name, tensor in named
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise InputError(f"{broken[0]}: it and {len(broken) - 1} more have NaN or infinity; {what}")


def refuse_failed(model: nn.Module) -> None:
    """Raise InputError for a model with parameters of a checkpoint that have NaN or infinity."""
    what = "the training had failed: use an earlier checkpoint"
    refuse_not_finite(model.named_parameters(), what)


def refuse_types(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise InputError for weights that are no real numbers where the model's are.

    torch would make some of them: of integers, and of complex numbers their real parts.
    """
    for name, own in model.state_dict().items():
        tensor = weights.get(name)
        if isinstance(tensor, Tensor) and own.is_floating_point() != tensor.is_floating_point():
            raise InputError(
                f"{name}: the checkpoint has {tensor.dtype}, the model of this config {own.dtype}"
            )


def refuse_broken_statistics(model: nn.Module) -> None:
    """Raise InputError for a model that cannot be evaluated by its statistics.

    They are not finite, or a variance is negative.
    """
    mends = "bn-det recompute measures statistics anew"
    refuse_not_finite(model.named_buffers(), mends)
    negative = [
        name
        for name, tensor in model.named_buffers()
        if name.endswith("running_var") and bool((tensor < 0).any())
    ]
    if negative:
        raise InputError(
            f"{negative[0]}: it and {len(negative) - 1} more have a negative variance; {mends}"
        )


def tell_parts(
    logger: logging.Logger, own: Collection[str], new: Collection[str], unused: Collection[str]
) -> None:
    """Say by parts of a model what begins anew, and what of a checkpoint is not used.

    Args:
        own: the names of the model's weights.
        new: those of them that the checkpoint does not give.
        unused: what it has beside them.

    Raises:
        InputError: it has weights of a part, and none of them fits.
    """
    if not new and not unused:
        return
    of_own, of_new, of_unused = (
        # Of counters torch does not say that a checkpoint lacks them.
        Counter(_part(name) for name in names if not name.endswith("num_batches_tracked"))
        for names in (own, new, unused)
    )
    parts = sorted({*of_new, *of_unused})
    rows = [(part, of_own[part] - of_new[part], of_new[part], of_unused[part]) for part in parts]
    table = tabulate(rows, ["part", "loaded", "begin anew", "not used"])
    logger.warning("Weights of the checkpoint that do not fit the model:\n%s", table)
    for part, loaded, _, num_unused in rows:
        if of_own[part] and not loaded and num_unused:
            first = min(name for name in unused if _part(name) == part)
            raise InputError(
                f"{part}: all of it would begin anew, though the checkpoint has {first} and "
                f"{num_unused - 1} more of it, none of which fits"
            )


def _part(name: str) -> str:
    return name.partition(".")[0]


def refuse_fused(model: nn.Module, weights: Collection[str]) -> None:
    fused = fused_layers(model, weights)
    if fused:
        raise InputError(
            f"the checkpoint is of a fused model: {fused[0]} and {len(fused) - 1} more are "
            "inside the convolutions before them; bn_det.unfuse(model, file) reads it"
        )


def named_as_in(model: nn.Module, weights: State) -> State:
    """Weights of a model that was saved in a wrapper, by the names that they have without it."""
    prefix = wrapped_prefix(weights, model.state_dict())
    if not prefix:
        return weights
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def load_weights(model: nn.Module, weights: State, of_config: bool = True) -> None:
    """Load all weights of a model.

    Args:
        of_config: whether the model is a host's, that of a config.

    Raises:
        InputError: they do not fit; whose they are, where that can be told.
    """
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError) as e:
        if of_config:
            refuse_others(model, weights)
        refuse_fused(model, weights)
        reason = " ".join(str(e).split())
        reason = reason if len(reason) <= 300 else f"{reason[:300]} ..."  # every key
        raise InputError(f"the weights do not fit the model: {reason}") from e
