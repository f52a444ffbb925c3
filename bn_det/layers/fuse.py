"""BatchNorm that is final, inside the convolution before it."""

from __future__ import annotations

import copy
import logging
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import InputError, first_of
from .domain_batch_norm import DomainBatchNorm2d, state_holders
from .freeze import is_frozen
from .kinds import (
    STATE,
    batch_norms,
    eps_of,
    evaluates_by_batch,
    follows,
    is_batch_norm,
    key_of,
    refuse_meta,
    unwrapped,
    uses_in,
    what_else,
)
from .levels import PerLevel
from .roi_levels import RoILevelBatchNorm2d
from .same_outputs import Outputs
from .sources import SourceBatchNorm2d
from .tuned import untune
from .types import Affine, AnyBatchNorm, Statistics, has_statistics

logger = logging.getLogger(__name__)

Convolution = nn.Conv2d | nn.ConvTranspose2d


class FuseReport(NamedTuple):
    """What :func:`fuse` has done.

    Attributes:
        fused: names of the BatchNorm layers that are in a convolution now.
        left: names of the others, each with the reason.
    """

    fused: list[str]
    left: dict[str, str]


def fuse(model: nn.Module, check: Callable[[nn.Module], Any] | None = None) -> FuseReport:
    """Fold each BatchNorm into the convolution that feeds it, in place; for inference.

    The outputs are the same but for rounding. A head on several levels gets a convolution for each
    level where statistics or affine are per level (:class:`~bn_det.layers.PerLevel`), so that
    its BatchNorm costs nothing.

    BatchNorm layers are torch's and ours, and FrozenBatchNorm2d of Detectron2 and torchvision.
    Subclasses are, too, but for those that compute anything else, and so are those of convolutions
    (not timm's, which standardize their weights): it is tried out. What timm's layers do after they
    normalize, an activation, stays in their place.

    A pair is fused where its parent shows that the BatchNorm gets the output of the convolution and
    nothing else does: a convolution with a ``norm`` (Detectron2's ``Conv2d``), neighbours in an
    ``nn.Sequential``, and children of a module whose ``forward`` torch.fx can trace and leaves no
    trace in its attributes. The others are left alone, Detectron2's ``CycleBatchNormList`` among
    them: which of its layers a level gets depends on the number of calls before. What happens
    further up, where somebody may take the outputs of an ``nn.Sequential`` one by one or read the
    weight of a convolution, is seen with ``check`` alone.

    A fused convolution must not be trained: its gradients are those of other parameters than weight
    and bias were, and the model learns otherwise. It warns, once for a model; :func:`bn_det.unfuse`
    undoes it.

    Args:
        model: in evaluation mode.
        check: calls the model that it is given, such as ``lambda model: model(images)``, and
            returns tensors, by themselves or in lists, tuples and dicts. What would change them is
            left, too. It is called with copies of the model.

    Raises:
        InputError: the model is in training mode, or on the meta device; ``check`` does not call
            what it is given, or returns no tensors, or others for the same model.
    """
    if isinstance(model, DistributedDataParallel):
        raise InputError("fuse: a DistributedDataParallel is not accepted; use its module")
    model = unwrapped(model)
    if model.training:
        raise InputError("fuse: not accepted for a model in training mode; call eval() first")
    refuse_meta("fuse", model)
    untune(model)
    report = _fuse(model, _why_changed(model, check) if check else {})
    warn_of_nothing("fuse", report.fused, report.left)
    return report


def warn_of_nothing(what: str, done: list[str], left: dict[str, str]) -> None:
    """Say so where nothing has been done: no BatchNorm is as it has to be, or there is none."""
    if not done:
        reason = "the model has no BatchNorm"
        if left:
            reason = f"{first_of(list(left))}: {next(iter(left.values()))}"
        logger.warning("%s has changed nothing: %s", what, reason)


_CHANGES = "check gives other outputs with it: its output or weight is used elsewhere, too"
_CHANGE_TOGETHER = "check gives other outputs with all that could be fused, though not with each"


def _why_changed(model: nn.Module, check: Callable[[nn.Module], Any]) -> dict[str, str]:
    """The layers whose fusion changes what ``check`` returns, by name, and why they are left."""
    outputs = Outputs("fuse", model, check)

    def changes(of: Container[str] | None) -> bool:
        return not outputs.are_those_of(lambda trial: _fuse(trial, {}, of))

    if not changes(None):
        return {}
    names = _fuse(copy.deepcopy(model), {}).fused
    alone = [name for name in names if changes([name])]
    if not changes(set(names) - set(alone)):
        return dict.fromkeys(alone, _CHANGES)
    return dict.fromkeys(names, _CHANGE_TOGETHER) | dict.fromkeys(alone, _CHANGES)


def _fuse(model: nn.Module, left: dict[str, str], only: Container[str] | None = None) -> FuseReport:
    """Fuse all but those that are to be left, each with a reason, or but those not named."""
    found, left = foldable(model, left, only)
    warned: set[str] = set()
    for name, pair in list(found.items()):
        if why := _why_not_alone(pair, model):
            left[name] = why
            del found[name]
        else:
            _fold(pair, warned)
    return FuseReport(list(found), left)


def foldable(
    model: nn.Module, left: dict[str, str], only: Container[str] | None = None
) -> tuple[dict[str, Pair], dict[str, str]]:
    """The BatchNorm layers that can be folded into the convolution before them, by their names.

    Args:
        left: those that are to be left, each with a reason.
        only: the names of those that are to be looked at; None for all.

    Returns:
        the pairs; and all others, each with the reason.
    """
    names = batch_norms(model)
    uses = uses_in(model)
    reasons = {layer: left.get(name) or _why_not(layer, uses) for layer, name in names.items()}
    found: dict[str, Pair] = {}
    for pair in pairs(model):
        name = names.get(pair.norm, "")
        is_wanted = pair.norm in names and (only is None or name in only)
        if is_wanted and name not in found and not reasons[pair.norm]:
            reasons[pair.norm] = (
                _why_not(pair.conv, uses)
                or ("" if follows(pair.norm) else what_else(pair.norm))
                or _what_else_of_convolution(pair)
            )
            if not reasons[pair.norm]:
                found[name] = pair
    return found, {
        names[layer]: reason or "it is not certain that a convolution alone feeds it"
        for layer, reason in reasons.items()
        if names[layer] not in found
    }


class Pair(NamedTuple):
    """A convolution and its BatchNorm, and where they are: the names in their parents."""

    conv: Convolution
    norm: AnyBatchNorm
    conv_parent: nn.Module
    conv_name: str
    norm_parent: nn.Module
    norm_name: str


def pairs(model: nn.Module) -> Iterator[Pair]:
    """Every BatchNorm that certainly gets the output of one convolution, with that one."""
    places = {m: (parent, n) for parent in model.modules() for n, m in parent._modules.items()}
    for module in model.modules():
        if "forward" in vars(module):
            continue  # not its class's
        # Each place, also where one module is in several.
        children = {n: m for n, m in module._modules.items() if m is not None}
        norms = {n: m for n, m in children.items() if is_batch_norm(m)}
        convs = {n: m for n, m in children.items() if isinstance(m, Convolution)}
        if isinstance(module, nn.Conv2d) and "norm" in norms:
            place = places.get(module, (nn.Module(), ""))  # the model itself is nobody's child
            yield Pair(module, norms["norm"], *place, module, "norm")
        elif norms and type(module).forward is nn.Sequential.forward:
            for a, b in pairwise(children):
                if a in convs and b in norms:
                    yield Pair(convs[a], norms[b], module, a, module, b)
        elif norms and not is_batch_norm(module):
            for a, b in _traced_pairs(module):
                if a in convs and b in norms:
                    yield Pair(convs[a], norms[b], module, a, module, b)


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _traced_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which the second gets the output of the first, which no other does."""
    try:
        # What is its own may change while it is traced; its children stay.
        module = copy.deepcopy(module, {id(child): child for child in module.children()})
        before = _content(vars(module))
        nodes = _ChildrenAreLeaves().trace(module).nodes
    except Exception as e:  # whatever a forward method does that cannot be traced
        logger.debug("%s cannot be traced: %s", type(module).__name__, e)
        return []
    if _content(vars(module)) != before:
        return []  # the next call may call other children: CycleBatchNormList
    calls = [node for node in nodes if node.op == "call_module"]
    reads = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    number = Counter(str(node.target) for node in calls)
    found = []
    for second in calls:
        first = second.args[0] if second.args else None
        if isinstance(first, fx.Node) and first in calls and list(first.users) == [second]:
            a, b = str(first.target), str(second.target)
            if number[a] == number[b] == 1 and a not in reads:
                found.append((a, b))
    return found


def _content(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """What a value holds, at any depth, to be compared with what it holds later."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, (nn.Module, type)) or id(value) in seen:
        return id(value)
    seen = (*seen, id(value))
    if isinstance(value, dict):
        return [(key, _content(held, seen)) for key, held in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [_content(held, seen) for held in value]
    return [id(value), _content(vars(value), seen)] if hasattr(value, "__dict__") else repr(value)


def _why_not_alone(pair: Pair, model: nn.Module) -> str:
    """Why a model that is a convolution itself cannot become one for each level, if so."""
    if pair.conv is model and len(state_holders(pair.norm)) > 1:
        return "its convolution is the model itself, and would be one for each level"
    return ""


def _why_not(module: nn.Module, uses: Counter[int]) -> str:
    """Why a BatchNorm or a convolution cannot take part in fusion, if so."""
    if uses[key_of(module)] > 1:
        return "it or its convolution is in several places of the model"
    own = module._parameters.values() if isinstance(module, Convolution) else ()
    if any(p is not None and uses[key_of(p)] > 1 for p in own):
        return "weight or bias of its convolution are another module's, too"
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        return "it or its convolution has no weight yet; call the model once"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it or its convolution has hooks"
    if "forward" in vars(module):
        return "the forward method of it or of its convolution has been replaced"
    if is_batch_norm(module) and module.training and not is_frozen(module):
        return "it is in training mode"
    if is_parametrized(module):
        return "the weight of its convolution is normalized; call bake_weight_norms first"
    if isinstance(module, SourceBatchNorm2d):
        return "its statistics are of the source of each image"
    if isinstance(module, RoILevelBatchNorm2d) and len(state_holders(module)) > 1:
        return "its statistics or its affine are of the level of each RoI"
    if evaluates_by_batch(module):
        return "it normalizes by batch statistics"
    if is_batch_norm(module):
        return _why_no_constant(module)
    if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
        return "its convolution is transposed and has groups"
    return ""


def _why_no_constant(norm: AnyBatchNorm) -> str:
    """Why a BatchNorm is no scale and shift, if so."""
    for population, affine in state_holders(norm):
        if not has_statistics(population):
            return "it has no population statistics"
        for holder, names in ((population, STATE[:2]), (affine, STATE[2:])):
            for name in names:
                value = getattr(holder, name)
                if value is not None and not value.isfinite().all():
                    return f"its {name} is NaN or infinite"
    return ""


@torch.no_grad()
def _what_else_of_convolution(pair: Pair) -> str:
    """Why a convolution cannot take a BatchNorm by what it computes: with its own weights, say.

    The outputs for noise are compared, before and after, with the first domain's statistics.
    """
    conv, (population, affine) = pair.conv, state_holders(pair.norm)[0]
    if pair.norm_parent is conv and isinstance(pair.norm, DomainBatchNorm2d):
        return ""  # it takes no tensor; forward_levels has it convolve, and nothing else
    pads = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    sizes = zip(conv.dilation, conv.kernel_size, pads, strict=True)
    if not all(p.isfinite().all() for p in (conv.weight, conv.bias) if p is not None):
        return "the weight or bias of its convolution is NaN or infinite"
    size = [2 + d * (k - 1) + p for d, k, p in sizes]  # more than a reflection may pad
    x = torch.randn(
        2, conv.in_channels, *size, generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(conv.weight)
    expected, folded = conv(x), copy.deepcopy(conv)
    if pair.norm_parent is conv:
        setattr(folded, pair.norm_name, None)
    else:
        state = population.running_mean, population.running_var, affine.weight, affine.bias
        expected = F.batch_norm(expected, *state, eps=eps_of(pair.norm))
    difference = _folded(folded, population, affine, eps_of(pair.norm))(x) - expected
    if difference.abs().max() <= 0.02 * expected.abs().max():  # half precision
        return ""
    return f"a {type(conv).__name__} does not only convolve"


class Fused(NamedTuple):
    """What a convolution was before a BatchNorm was folded into it, for :func:`unfuse`.

    Attributes:
        norm: the layer, which is in no model meanwhile.
        norm_name: its name where it was: in the convolution, or in its parent.
        is_inside: whether that is the convolution.
        had_bias: whether the convolution had one.
        dtype, learned: of the convolution's weight.
    """

    norm: AnyBatchNorm
    norm_name: str
    is_inside: bool
    had_bias: bool
    dtype: torch.dtype
    learned: bool


def _fold(pair: Pair, warned: set[str]) -> None:
    conv, norm = pair.conv, pair.norm
    holders = state_holders(norm)
    weight, is_inside, had_bias = conv.weight, pair.norm_parent is conv, conv.bias is not None
    was = Fused(norm, pair.norm_name, is_inside, had_bias, weight.dtype, weight.requires_grad)
    # Before the convolution is copied. Detectron2's takes None for no norm.
    rest = follows(norm) or (None if is_inside else nn.Identity())
    setattr(pair.norm_parent, pair.norm_name, rest)
    if len(holders) > 1:
        convs = [_folded(copy.deepcopy(conv), *holder, eps_of(norm)) for holder in holders]
        levels = PerLevel(convs)
        setattr(pair.conv_parent, pair.conv_name, levels)
        vars(levels)["was"] = was
    else:
        convs = [_folded(conv, *holders[0], eps_of(norm))]
        vars(conv)["was"] = was
    for folded in convs:
        vars(folded)["warned_of_training"] = warned
        folded.register_forward_pre_hook(warn_of_training)


def scale_and_shift(population: Statistics, affine: Affine, eps: float) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation is x * scale + shift; both of shape (C,), float64."""
    assert has_statistics(population)  # or it is not foldable
    mean, var = population.running_mean.double(), population.running_var.double()
    scale = (var + eps).rsqrt()
    if affine.weight is not None:
        scale = scale * affine.weight.double()
    shift = -mean * scale
    return scale, shift if affine.bias is None else shift + affine.bias.double()


def of_outputs(conv: Convolution, values: Tensor) -> Tensor:
    """A value for each output channel of a convolution, in a shape that fits its weight."""
    shape = [1] * conv.weight.dim()
    shape[1 if isinstance(conv, nn.ConvTranspose2d) else 0] = -1
    return values.view(shape)


@torch.no_grad()
def _folded(conv: Convolution, population: Statistics, affine: Affine, eps: float) -> Convolution:
    """The convolution, with the layer's statistics and affine in its weight and bias."""
    scale, shift = scale_and_shift(population, affine, eps)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    conv.weight.copy_(conv.weight.double() * of_outputs(conv, scale))
    bias = shift.to(conv.weight.dtype)
    if conv.bias is None:
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)
    return conv


def warn_of_training(conv: nn.Module, _: tuple[Tensor]) -> None:
    # A plain function, which a fused model can be scripted with (torch.jit.script).
    if not torch.jit.is_scripting():
        warned: set[str] = vars(conv)["warned_of_training"]
        if conv.training and conv.weight.requires_grad and not warned:
            warned.add("training")
            logger.warning(
                "A convolution that a BatchNorm has been folded into is being trained: the "
                "gradients of its weight and bias are not those of the parameters before (a fused "
                "model should not be fine-tuned)"
            )
