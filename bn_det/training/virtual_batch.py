"""Virtual batch normalization: extra images in the normalization batch, without their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..layers.batch import Batch
from ..layers.batch_norm import BatchNorm2d
from ..layers.blocks import no_population_update
from ..layers.ema import refuse_recomputation
from ..layers.forward import Extension
from ..layers.freeze import is_frozen
from ..layers.grouping import grouped
from ..layers.kinds import batch_norms, unwrapped
from ..population.calling import called
from ..population.passes import surroundings


@contextmanager
def virtual_batch(
    model: nn.Module, extra: Any, call: Callable[[nn.Module, Any], Any] | None = None
) -> Iterator[None]:
    """Inside the block, extra images are in every normalization batch of a model.

        with bn_det.virtual_batch(model, extra_images):
            losses = model(images)

    The extra images are run first, normalized by themselves, and without gradient; what each layer
    sees of them is then merged into the batches of the one forward pass in the block, and into
    their update of the EMA. (Salimans et al., *Improved Techniques for Training GANs*, 2016,
    normalize by a fixed batch and one example of one's own: so with images one by one.) The
    normalization batch grows for the price of a forward pass; nothing else does.

    The first pass moves neither population statistics nor what is assigned to attributes, such as
    the moving average that Detectron2's RetinaNet divides its loss by. What a layer writes into
    other buffers or containers of its own stays.

    Args:
        model: with layers of ours in training mode (``convert_batchnorm``); a
            DistributedDataParallel or compiled one is run as the module in it. Over several
            processes every one has to take part.
        extra: a batch, as the model takes it.
        call: how the model is run on a batch, ``model(batch)`` by default; a tuple may be several
            arguments (:func:`bn_det.population.calling.called`).

    Raises:
        InputError: the model has no such layer, or another kind of BatchNorm in training mode; a
            layer is called more often in the block than with the extra images.
        RuntimeError: from the backward pass, with activation checkpointing.
    """
    model = unwrapped(model)
    layers = extended_layers(model)
    if not layers:
        raise InputError(
            "virtual_batch: the model has no BatchNorm in training mode that a virtual batch could "
            "be for"
        )
    seen = {layer: _Seen(name) for layer, name in layers.items()}
    with _extended({layer: of_layer.record for layer, of_layer in seen.items()}):
        _run(model, extra, call)
    with _extended({layer: of_layer.merge for layer, of_layer in seen.items()}):
        yield


@contextmanager
def _extended(extensions: Mapping[BatchNorm2d, Extension]) -> Iterator[None]:
    handles = [layer.register_extension(extend) for layer, extend in extensions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """What a layer has seen of the extra images, call by call."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: list[dict[int, Batch]] = []
        self._num_merged = 0

    def record(self, batches: list[Batch], domain_of: Sequence[int]) -> list[Batch]:
        of_domain = grouped(batches, domain_of)
        self._calls.append({k: Batch.merge(parts) for k, parts in of_domain.items()})
        return batches

    def merge(self, batches: list[Batch], domain_of: Sequence[int]) -> list[Batch]:
        refuse_recomputation("a virtual batch")
        if self._num_merged == len(self._calls):
            raise InputError(
                f"virtual_batch: {self.name} is called more often than with the extra images "
                f"({len(self._calls)} times); a block is for one forward pass"
            )
        extra = self._calls[self._num_merged]
        self._num_merged += 1
        return [
            Batch.merge([batch, extra[domain]])
            for batch, domain in zip(batches, domain_of, strict=True)
        ]


def extended_layers(model: nn.Module) -> dict[BatchNorm2d, str]:
    """The layers in whose batches extra images are, each with its name: those in training mode."""
    layers: dict[BatchNorm2d, str] = {}
    for layer, name in batch_norms(model).items():
        if not layer.training or is_frozen(layer):
            continue
        if not isinstance(layer, BatchNorm2d):
            raise InputError(
                f"virtual_batch: {name} is a {type(layer).__name__}; use BatchNorm2d of ours "
                "(convert_batchnorm)"
            )
        layers[layer] = name
    return layers


def _run(model: nn.Module, extra: Any, call: Callable[[nn.Module, Any], Any] | None) -> None:
    attributes = [(vars(m), dict(vars(m))) for m in model.modules()]
    try:
        with torch.no_grad(), surroundings(), no_population_update(model):
            called(model, call)(extra)
    finally:
        for now, before in attributes:
            now.update(before)
        # Weights that the caller's autocast has cast here are without a graph; older versions of
        # torch would take them in the block, too.
        torch.clear_autocast_cache()
