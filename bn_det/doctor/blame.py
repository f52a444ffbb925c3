"""Which part of a model a loss is due to, by exchanging the statistics of one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .losses import Losses, Values, put

MOST_PARTS = 8


def parts_of(names: Iterable[str], most: int = MOST_PARTS) -> dict[str, list[str]]:
    """Layers by the part of the model that they are in: the tree of names, cut where it is wide.

    The part with the most layers is divided as long as there are no more than ``most``.

    Args:
        names: of one layer at least.

    Returns:
        names of layers by that of the part.
    """
    parts = {"": list(names)}
    while True:
        name = max(parts, key=lambda n: len(parts[n]))
        children = _children(name, parts[name])
        if children.keys() == {name} or len(parts) - 1 + len(children) > most:
            return parts
        parts = {  # in its place, so that the order is that of the model
            n: layers
            for of, own in parts.items()
            for n, layers in (children if of == name else {of: own}).items()
        }


def _children(part: str, layers: Sequence[str]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    start = len(part) + 1 if part else 0
    for layer in layers:
        end = layer.find(".", start)
        children.setdefault(layer if end < 0 else layer[:end], []).append(layer)
    return children


def attribute(
    losses: Losses,
    old: Values,
    new: Values,
    parts: dict[str, list[str]],
    whole: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """What each part's old statistics add to the loss of each batch, in place of new ones.

    The mean of two: what the loss falls by if this part alone has new ones, and what it rises by
    if this part alone has old ones. With two parts these are Shapley's values, whose sum is the
    whole; with more the sum may be another, where parts act together.

    Args:
        old, new: statistics of all layers of the parts; the model is left with some of both.
        whole: the losses by all old ones, and by all new ones.

    Returns:
        by part, shape (number of batches,). Where the old statistics give no finite loss it is what
        the part does alone, infinite if it is one of those that bring this about.
    """
    of_old, of_new = whole
    found = {}
    for part, layers in parts.items():
        put(losses.model, new | {layer: old[layer] for layer in layers})
        added = losses.of() - of_new
        if of_old.isfinite().all():
            put(losses.model, old | {layer: new[layer] for layer in layers})
            added = (added + of_old - losses.of()) / 2
        found[part] = added
    return found
