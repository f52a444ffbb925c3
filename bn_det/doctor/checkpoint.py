"""The BatchNorm layers in a checkpoint, whoever wrote it; nothing in it is run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..errors import InputError, reason_of, shown
from ..layers.pickled_arrays import read_pickled_arrays
from ..layers.state_dicts import (
    read_checkpoint,
    why_not_dense,
    why_unreadable,
    wrapped_prefix,
)

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
        eps: of a layer of a model.
    """

    name: str
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    batches: int | None
    eps: float | None = None


class Checkpoint(NamedTuple):
    """Attributes:
    part: the key of the file under which they are; "" for the file itself.
    others: further parts that have statistics.
    layers: in the order of the file.
    broken: keys that make no layer, and what is wrong with each.
    convs: convolutions by name, and whether each has a bias.
    momenta: of layers by name, where these are of a model.
    """

    part: str
    others: list[str]
    layers: list[Layer]
    broken: dict[str, str]
    convs: dict[str, bool]
    momenta: Mapping[str, float | None] = {}


def read(path: str | os.PathLike, part: str | None = None) -> Checkpoint:
    """The layers of a file: of torch.save, a Detectron2 .pkl, or safetensors.

    Args:
        part: the key of the file under which to look; by default where weights usually are.

    Raises:
        InputError: it has no weights, not there, or only an unsafe load could read it.
    """
    parts = _parts(path, _content(os.fspath(path)))
    chosen = _chosen(parts, part)
    has_layers = {name for name, state in parts.items() if any(map(_is_statistics, state))}
    others = [name for name in parts if name in has_layers - {chosen}]
    return of_state(parts[chosen])._replace(part=chosen, others=others)


class Stored(NamedTuple):
    """The weights of a file.

    Attributes:
        state: by name.
        content: all of the file, as far as a file of torch can hold it.
        part: the key of the content under which they are; "" for the content itself.
    """

    state: dict[str, Tensor]
    content: Mapping[str, Any]
    part: str

    def with_state(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The content with other weights in their place; what is beside them stays."""
        prefix = wrapped_prefix(self.state, state)
        state = {prefix + name: value for name, value in state.items()}
        old = self.content.get(self.part, {}) if self.part else self.content
        replaced = {name for name in self.state if name.startswith(prefix)}
        new = {**{name: v for name, v in old.items() if name not in replaced}, **state}
        return {**self.content, self.part: new} if self.part else new


def read_state(path: str | os.PathLike, part: str | None = None) -> Stored:
    """The weights of a file by name, as :func:`read` finds them."""
    content = _content(os.fspath(path))
    parts = _parts(path, content)
    chosen = _chosen(parts, part)
    # What is beside the weights of a .pkl are arrays, which no safe load of torch's would read.
    kept = {} if os.fspath(path).endswith(".pkl") else content
    return Stored(parts[chosen], kept, chosen)


def _parts(path: str | os.PathLike, content: Any) -> dict[str, dict[str, Tensor]]:
    """What of a file are weights, by the key under which they are; "" for the file itself."""
    parts = {}
    if isinstance(content, Mapping):
        names = dict.fromkeys((*_PARTS, *(name for name in content if isinstance(name, str))))
        parts = {name: _tensors(content.get(name) if name else content) for name in names}
        parts = {name: state for name, state in parts.items() if state}
    if not parts:
        raise InputError(f"{path}: it has no weights by name, nor has one of {list(_PARTS[1:])}")
    return parts


def _chosen(parts: Mapping[str, Mapping[str, Tensor]], part: str | None) -> str:
    """The part that was asked for, or else the first of those with the most statistics."""
    if part is not None and part not in parts:
        known = sorted(filter(None, parts))
        use = f"use one of {known}, or none" if known else "it has weights outside of any: use none"
        raise InputError(f"--part: {part!r} is not accepted; {use}")
    if part is not None:
        return part
    return max(parts, key=lambda name: sum(map(_is_statistics, parts[name])))


def _is_statistics(name: str) -> bool:
    return name.endswith(STATISTICS)


def of_state(state: Mapping[str, Tensor]) -> Checkpoint:
    """What a state dict has."""
    layers, broken = _layers(state)
    weights = {n: t for n, t in state.items() if n.endswith("weight") and not is_lazy(t)}
    convs = [n.removesuffix(".weight") for n, t in weights.items() if _is_of_conv(t)]
    has_bias = {name: f"{name}.bias" in state for name in convs}
    return Checkpoint("", [], layers, broken, has_bias)


def _is_of_conv(weight: Tensor) -> bool:
    return not weight.is_nested and weight.dim() in (4, 5)


def _content(path: str) -> Any:
    if not os.path.isfile(path):
        is_there = os.path.lexists(path)
        raise InputError(f"{path}: {'is no file' if is_there else 'there is no such file'}")
    if path.endswith(".safetensors"):
        return _safetensors(path)
    if path.endswith(".pkl"):
        try:
            return read_pickled_arrays(path)
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
        except Exception as e:  # what loaders raise is of many kinds
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
            with suppress(TypeError, ValueError):  # a type or strides that torch has not
                value = torch.as_tensor(value)
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = value
    return state


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_CHANNELS = 2**24


def _layers(state: Mapping[str, Tensor]) -> tuple[list[Layer], dict[str, str]]:
    layers, broken = [], {}
    for prefix in _prefixes(state):
        tensors = {name: state.get(prefix + name) for name in (*STATISTICS, _COUNTER)}
        tensors |= {name: _affine(state, prefix, name) for name in ("weight", "bias")}
        of = {name: t for name, t in tensors.items() if t is not None}
        if any(map(is_lazy, of.values())):
            continue
        if why := _why_no_layer(of):
            there = next(name for name in (*STATISTICS, _COUNTER) if name in of)
            broken[shown(prefix + there)] = why
        elif of[STATISTICS[0]].numel():
            counter = of.get(_COUNTER)
            batches = None if counter is None else int(counter)
            mean, var = (of[name] for name in STATISTICS)
            affine = of.get("weight"), of.get("bias")
            layers.append(Layer(shown(prefix.removesuffix(".")), mean, var, *affine, batches))
    return layers, broken


def _why_no_layer(of: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being those of a BatchNorm."""
    missing = [name for name in STATISTICS if name not in of]
    if missing:
        return f"has no {' and no '.join(missing)} beside it"
    for name, t in of.items():
        if kind := why_not_dense(t):
            return f"has a {kind} {name}"
        if t.numel() * t.element_size() > (there := t.untyped_storage().nbytes()):
            return f"has a {name} of {t.numel()} values in {there} bytes"
        if name != _COUNTER and t.dtype not in _DTYPES:
            return f"has a {name} of {str(t.dtype).removeprefix('torch.')}"
    counter = of.get(_COUNTER)
    if counter is not None and (
        counter.numel() != 1 or counter.is_complex() or not 0 <= counter.item() < 2**62
    ):
        return f"has a {_COUNTER} that is no number of batches"
    sizes = {tuple(t.shape) for name, t in of.items() if name != _COUNTER}
    if len(sizes) > 1 or any(len(size) != 1 or size[0] > _MOST_CHANNELS for size in sizes):
        return f"and what is beside it have shapes {sorted(sizes)}"
    return ""


_COUNTER = "num_batches_tracked"


def _prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    ends = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join((*STATISTICS, _COUNTER))})$")
    yield from dict.fromkeys(ends.sub("", name) for name in state if ends.search(name))


def _affine(state: Mapping[str, Tensor], prefix: str, name: str) -> Tensor | None:
    """The layer's own, or that of a list that it is in, whose layers share one."""
    of_list = re.sub(r"\d+\.$", "", prefix)
    return state.get(prefix + name, state.get(of_list + name) if of_list != prefix else None)
