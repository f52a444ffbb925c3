"""Values by their keys."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def grouped(values: Iterable[T], keys: Iterable[K]) -> dict[K, list[T]]:
    """The values of each key, keys in the order in which they come first."""
    found: dict[K, list[T]] = {}
    for value, key in zip(values, keys, strict=True):
        if key not in found:  # no setdefault, which torch.compile of torch 2.4 does not know
            found[key] = []
        found[key].append(value)
    return found
