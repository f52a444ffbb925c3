"""The BatchNorm layers in a checkpoint, whoever wrote it; nothing in it is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, reason_of
from ..layers.pickled_arrays import read_pickled_arrays
from ..layers.state_dicts import READ_ERRORS, read_checkpoint, why_unreadable

STATISTICS = ("running_mean", "running_var")
_PARTS = ("", "model", "state_dict", "model_state", "ema", "model_ema", "state_dict_ema")
"""Where training codes put weights, most telling first: Detectron2 and torchvision under "model",
timm and mmdetection under "state_dict", and averaged ones beside them."""


class Layer(NamedTuple):
    """A BatchNorm as a file has it; of what it does not have None.

    Attributes:
        name: what its keys begin with.
        mean, var, weight, bias: shape (C,).
        batches: counted.
    """

    name: str
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    batches: int | None


class Checkpoint(NamedTuple):
    """Attributes:
    part: the key of the file under which they are; "" for the file itself.
    others: further parts that have weights.
    layers: in the order of the file.
    broken: keys that make no layer, and what is wrong with each.
    num_convs, num_with_bias: weights of convolutions, and how many of these have a bias.
    """

    part: str
    others: list[str]
    layers: list[Layer]
    broken: dict[str, str]
    num_convs: int
    num_with_bias: int


def read(path: str | os.PathLike, part: str | None = None) -> Checkpoint:
    """The layers of a file: of torch.save, a Detectron2 .pkl, or safetensors.

    Args:
        part: the key of the file under which to look; by default where weights usually are.

    Raises:
        InputError: it has no weights, not there, or only an unsafe load could read it.
    """
    parts = _parts(path)
    chosen = _chosen(parts, part)
    others = [name for name in parts if name != chosen]
    return of_state(parts[chosen])._replace(part=chosen, others=others)


def read_state(path: str | os.PathLike, part: str | None = None) -> dict[str, Tensor]:
    """The weights of a file by name, as :func:`read` finds them."""
    parts = _parts(path)
    return parts[_chosen(parts, part)]


def _parts(path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """What of a file are weights, by the key under which they are."""
    content = _content(os.fspath(path))
    parts = {}
    if isinstance(content, Mapping):
        parts = {name: _tensors(content.get(name) if name else content) for name in _PARTS}
        parts = {name: state for name, state in parts.items() if state}
    if not parts:
        raise InputError(f"{path}: it has no weights by name, nor has one of {list(_PARTS[1:])}")
    return parts


def _chosen(parts: Mapping[str, Any], part: str | None) -> str:
    if part is not None and part not in parts:
        raise InputError(f"--part: {part!r} is not accepted; use one of {sorted(parts)}")
    return next(iter(parts)) if part is None else part


def of_state(state: Mapping[str, Tensor]) -> Checkpoint:
    """What a state dict has."""
    layers, broken = _layers(state)
    convs = [name for name, t in state.items() if name.endswith("weight") and t.dim() in (4, 5)]
    biases = sum(name.removesuffix("weight") + "bias" in state for name in convs)
    return Checkpoint("", [], layers, broken, len(convs), biases)


def _content(path: str) -> Any:
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file")
    if path.endswith(".safetensors"):
        return _safetensors(path)
    if path.endswith(".pkl"):
        try:
            return read_pickled_arrays(path)
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
        except READ_ERRORS as e:
            raise InputError(f"{path}: cannot be loaded: {why_unreadable(path, e)}") from e
    return read_checkpoint(path)


def _safetensors(path: str) -> Mapping[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path}: reading it needs a package: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: cannot be loaded as safetensors: {reason_of(e)}") from e


def _tensors(content: Any) -> dict[str, Tensor]:
    """What of it are tensors by name; arrays are taken, too."""
    if not isinstance(content, Mapping):
        return {}
    state = {}
    for name, value in content.items():
        if getattr(getattr(value, "dtype", None), "kind", "") in tuple("fiu"):  # of NumPy
            value = torch.as_tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided:
            state[name] = value
    return state


def _layers(state: Mapping[str, Tensor]) -> tuple[list[Layer], dict[str, str]]:
    layers, broken = [], {}
    for prefix in _prefixes(state):
        missing = [name for name in STATISTICS if prefix + name not in state]
        if missing:
            there = next(n for n in (*STATISTICS, _COUNTER) if prefix + n in state)
            broken[prefix + there] = f"has no {' and no '.join(missing)} beside it"
            continue
        mean, var = (state[prefix + name] for name in STATISTICS)
        affine = [_affine(state, prefix, name) for name in ("weight", "bias")]
        sizes = {t.shape for t in (mean, var, *affine) if t is not None}
        if mean.dim() != 1 or not mean.is_floating_point() or len(sizes) > 1:
            broken[prefix + STATISTICS[0]] = f"and what is beside it have shapes {sorted(sizes)}"
            continue
        counter = state.get(prefix + _COUNTER)
        batches = int(counter) if counter is not None and counter.numel() == 1 else None
        layers.append(Layer(prefix.removesuffix("."), mean, var, *affine, batches))
    return layers, broken


_COUNTER = "num_batches_tracked"


def _prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    ends = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join((*STATISTICS, _COUNTER))})$")
    yield from dict.fromkeys(ends.sub("", name) for name in state if ends.search(name))


def _affine(state: Mapping[str, Tensor], prefix: str, name: str) -> Tensor | None:
    """The layer's own, or that of a list that it is in, whose layers share one."""
    of_list = re.sub(r"\d+\.$", "", prefix)
    return state.get(prefix + name, state.get(of_list + name) if of_list != prefix else None)
