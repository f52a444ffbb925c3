"""What happens between training steps, for either host.

A hook has Detectron2's four methods and gets a ``trainer`` with ``iter`` (the iteration in
progress, counted from 0), ``max_iter`` and ``model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .population import average_population_statistics


class Hook:
    """Does nothing; hooks override what they need."""

    trainer: Any = None

    def before_train(self) -> None:
        """Called before the first iteration."""

    def before_step(self) -> None:
        """Called before each iteration."""

    def after_step(self) -> None:
        """Called after each iteration."""

    def after_train(self) -> None:
        """Called after the last iteration."""


class AverageStatistics(Hook):
    """Average the ranks' EMAs before each evaluation and each saving.

    So that every rank evaluates the model that is saved. To be registered before the hooks that
    evaluate and save.

    Args:
        periods: the iterations between evaluations, and between savings; 0 for only at the end.
    """

    def __init__(self, periods: Sequence[int]) -> None:
        self.periods = [p for p in periods if p > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % p == 0 for p in self.periods):
            average_population_statistics(self.trainer.model)
