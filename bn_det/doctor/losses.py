"""Losses of a model on the same batches, with its statistics as they are or with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..layers.freeze import is_frozen, thaw
from ..layers.kinds import batch_norms
from ..population.observation import places_with_statistics
from ..population.unchanged import evaluated_losses
from .images import copied
from .modes import as_called
from .progress import SILENT, Advance, Told

Values = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance by the name of the module that holds them."""


class Losses:
    """The losses of a model on a few batches, which every setting of its statistics gets alike.

    Args:
        call: gives the loss of a batch: a number, or a dict or a list of them to be summed.
        batches: held in memory.
        told: how far the passes are.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Any], Any] | None,
        batches: Sequence[Any],
        told: Told = SILENT,
    ) -> None:
        self.model, self.call, self.batches, self.told = model, call, batches, told
        self._advance: Advance = lambda: None

    @contextmanager
    def passes(self, what: str, number: int) -> Iterator[None]:
        """Tell how far so many passes of each batch are, which are taken inside the block."""
        with self.told.bar(what, number * len(self.batches)) as self._advance:
            yield

    def keep(self, batches: Tensor) -> None:
        """Go on with some of the batches; a boolean for each."""
        self.batches = [of for of, is_one in zip(self.batches, batches, strict=True) if is_one]

    def of(self, watch: Callable[[], None] = lambda: None) -> Tensor:
        """The loss of each batch, by the population statistics that the model has.

        What is drawn (samples of anchors, of proposals) is the same each time.

        Args:
            watch: called before each pass; what it does to the model is undone.

        Returns:
            shape (number of batches,), float64; infinite where a loss is NaN.
        """
        return self._of_all(watch)

    def run(self, batch: Any) -> Any:
        """Call the model, as it is."""
        return as_called(self.model, self.call)(copied(batch))

    def by_batch(self, layers: Collection[nn.Module]) -> Tensor:
        """The same, where some layers normalize by their batch, as in training."""

        def prepare() -> None:
            for layer in layers:
                layer.train()

        return self._of_all(prepare)

    def thawed(self) -> Tensor:
        """The same, where frozen layers normalize by their batch.

        Raises:
            InputError: one does more than normalize.
        """
        frozen = [layer for layer in batch_norms(self.model) if is_frozen(layer)]

        def prepare() -> None:
            thaw(self.model, affine=False)
            for layer in frozen:
                layer.train()

        return self._of_all(prepare)

    @torch.no_grad()
    def _of_all(self, prepare: Callable[[], None]) -> Tensor:
        found = []
        for batch in self.batches:
            found.append(self._of(batch, prepare))
            self._advance()
        return torch.tensor(found).double()

    def _of(self, batch: Any, prepare: Callable[[], None]) -> float:
        try:
            with evaluated_losses(self.model):
                prepare()
                loss = total(self.run(batch))
        except Exception as e:
            if not self._is_of_statistics(e, batch):
                raise
            return math.inf
        return math.inf if math.isnan(loss) else loss

    def _is_of_statistics(self, error: Exception, batch: Any) -> bool:
        """Whether a model fails by what its statistics give, as by boxes that are NaN.

        Where layers normalize by their batch it does not then.
        """
        # A command tells what a user's function raises as an error of its own.
        cause = error.__cause__ if isinstance(error, InputError) else error
        if cause is None or isinstance(cause, torch.cuda.OutOfMemoryError):
            return False
        if isinstance(cause, FloatingPointError):  # Detectron2's, of proposals that are NaN
            return True
        try:
            with evaluated_losses(self.model):
                for layer in batch_norms(self.model):
                    layer.train()
                self.run(batch)
        except Exception:
            return False
        return True


def total(outputs: Any) -> float:
    """The sum of what a model gives in training; of a dict with losses by name, of these alone.

    Raises:
        InputError: it is no loss.
    """
    values = outputs
    if isinstance(outputs, Mapping):
        named = [value for name, value in outputs.items() if "loss" in str(name)]
        values = named or list(outputs.values())
    if not isinstance(values, (list, tuple)):
        values = [values]
    if not values or not all(map(_is_number, values)):
        found = f"a tensor of shape {tuple(outputs.shape)}" if torch.is_tensor(outputs) else None
        raise InputError(
            f"call: gives {found or 'a ' + type(outputs).__name__}; to evaluate, it has to give a "
            "loss: a number, or a dict or list of numbers"
        )
    return float(sum(values))


def _is_number(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def statistics_of(model: nn.Module) -> Values:
    """A copy of all population statistics of a model."""
    return {
        name: (mean.clone(), variance.clone()) for name, (mean, variance) in _buffers(model).items()
    }


@torch.no_grad()
def put(model: nn.Module, values: Values) -> None:
    """Write statistics into a model; layers that have none among them keep theirs."""
    for name, buffers in _buffers(model).items():
        for buffer, value in zip(buffers, values.get(name, ()), strict=False):
            buffer.copy_(value)


def _buffers(model: nn.Module) -> Values:
    places = places_with_statistics(model)
    return {of.name: (of.module.running_mean, of.module.running_var) for of in places}
