"""Stand-ins for what pickles of NumPy's arrays call, which make arrays of numbers and text alone.

NumPy's own types take flags and pointers from a pickle as they are: a dtype of objects turns bytes
into addresses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError


class _DType:
    """For ``numpy.dtype``: of numbers, truth values or text."""

    def __init__(self, name: Any, align: bool = False, copy: bool = False) -> None:
        self.of = np.dtype(name) if isinstance(name, str) else np.dtype("V")
        if self.of.kind not in "?biufcSU":
            raise InputError(f"it has an array of type {name!r}; use numbers or text")

    def __setstate__(self, state: tuple) -> None:
        """Of (version, byte order, ...): fields, sizes and flags are those of its name."""
        if state[1] in ("<", ">"):
            self.of = self.of.newbyteorder(state[1])


class _Array(np.ndarray):
    """For ``numpy.ndarray``."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, values = state
        checked: tuple[Any, ...] = (1, shape, _checked(dtype), bool(is_fortran), values)
        super().__setstate__(checked)


def _checked(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _DType):
        raise InputError(f"it has an array whose type is a {type(dtype).__name__}")
    return dtype.of


def _reconstruct(*_: Any) -> np.ndarray:
    """An empty array, whose content follows."""
    return np.ndarray.__new__(_Array, (0,), "b")


def _scalar(dtype: Any, value: Any = b"") -> np.generic:
    of, value = _checked(dtype), value.encode("latin1") if isinstance(value, str) else value
    if len(value) != of.itemsize:
        raise InputError(f"it has a number of {of.itemsize} bytes in {len(value)}")
    return np.frombuffer(value, of, 1)[0]


def _frombuffer(values: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    of = np.frombuffer(values, _checked(dtype))
    if order == "K" and axes is not None:  # strides of another order than C's and Fortran's
        return of.reshape(shape).transpose(axes)
    return of.reshape(shape, order=order)


STAND_INS = {
    "dtype": _DType,
    "ndarray": _Array,
    "_reconstruct": _reconstruct,
    "scalar": _scalar,
    "_frombuffer": _frombuffer,
}
"""By the names of NumPy's."""
