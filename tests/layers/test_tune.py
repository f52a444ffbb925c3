"""Tuning: a tuned model trains as the frozen one that it was, whatever is done to it."""

import copy
import io
import re
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

import reference
from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    RoILevelBatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
    forward_levels,
    freeze,
    fuse,
    normalize_weight,
    roi_levels,
    states,
    thaw,
    tune,
    unfuse,
    update_bn_stats,
)
from bn_det.errors import InputError
from bn_det.layers.tuned import Deferred, TunedConv, TunedNorm
from kinds import ConvNormReLU, NormAndMore, fill
from old_torch import not_on_torch_2_4
from ranks import run_ranks

C = 6


class Block(nn.Module):
    """Children that a forward method calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, C, 3, padding_mode="reflect", padding=1), BatchNorm2d(C)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class OnRoILevels(nn.Module):
    """A box head that knows the levels of its RoIs."""

    def __init__(self):
        super().__init__()
        shared = {"statistics": "shared", "population": "shared"}
        self.tower = sequential(make_norm=lambda c: RoILevelBatchNorm2d(c, 2, **shared))

    def forward(self, x):
        with roi_levels([0, 1] * (len(x) // 2)):
            return self.tower(x)


class OnLevels(nn.Module):
    """A head."""

    def __init__(self, choices, is_inside):
        super().__init__()
        names = ("statistics", "population", "affine")
        norm = DomainBatchNorm2d(C, 3, **dict(zip(names, choices, strict=True)))
        inside = ConvNormReLU(C, norm)
        outside = nn.Sequential(nn.Conv2d(4, C, 3, padding=1, bias=False), norm, nn.ReLU())
        self.tower = nn.Sequential(*([inside] if is_inside else outside))

    def forward(self, x):
        ys = forward_levels([self.tower], [x, 2 * x[..., 1:] + 1, x[..., :1, :4] - 1])
        return torch.cat([y.flatten(2) for y in ys], 2)


def sequential(bias=True, make_norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(4, C, 3, stride=2, padding=1, groups=2, bias=bias), make_norm(C), nn.ReLU(),
        nn.ConvTranspose2d(C, 5, 2, stride=2, bias=bias), make_norm(5),
    )  # fmt: skip


MODELS = {
    "sequential": sequential,
    "no bias": partial(sequential, bias=False),
    "hosts'": partial(sequential, make_norm=FrozenBatchNorm2d),
    "no affine": partial(sequential, make_norm=partial(nn.BatchNorm2d, affine=False)),
    "RoI levels": OnRoILevels,
    "block": Block,
    "inside": lambda: nn.Sequential(ConvNormReLU(C, nn.BatchNorm2d(C))),
    "inside and more": lambda: nn.Sequential(ConvNormReLU(C, NormAndMore(C, p=0.0))),
    "and more": partial(sequential, make_norm=partial(NormAndMore, p=0.0)),
    **{
        f"levels {'inside ' * is_inside}{'-'.join(choices)}": partial(OnLevels, choices, is_inside)
        for choices in reference.EIGHT_CHOICES
        for is_inside in (False, True)
    },
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
both_affines = pytest.mark.parametrize("affine", [True, False])


def make(name, affine=True, dtype=torch.float64):
    """A frozen model, and the same one tuned; in training mode."""
    torch.manual_seed(0)
    frozen = freeze(fill(MODELS[name]()).to(dtype), affine=affine).train()
    tuned = copy.deepcopy(frozen)
    assert tune(tuned).left == {}
    return frozen, tuned


def images(dtype=torch.float64, seed=0, num=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, 16, 12, generator=generator, dtype=torch.float64).to(dtype)


def pass_of(model, x):
    """Outputs and gradients, None for those that there are none of."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y**2).mean().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def assert_same(a, b, tolerance=1e-12):
    for found, expected in zip(a[:2], b[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for found, expected in zip(a[2], b[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def number_of_folds(model, x):
    """The convolutions and levels of a call that were given a derived weight."""
    own, derived = {p.data_ptr() for p in model.parameters()}, []

    def pack(t):
        if t.dim() == 4 and t.shape in shapes and t.data_ptr() not in own:
            derived.append(t.data_ptr())
        return t

    shapes = {p.shape for p in model.parameters() if p.dim() == 4}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return len(set(derived))


@both_affines
@every_model
def test_outputs_and_gradients(name, affine):
    frozen, tuned = make(name, affine)
    assert_same(pass_of(tuned, images()), pass_of(frozen, images()))
    frozen.eval(), tuned.eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(images()), frozen(images()), rtol=1e-12, atol=1e-12)


@every_model
def test_what_is_folded(name):
    """Every convolution, and a level by a weight that it shares with those of the same state."""
    frozen, tuned = make(name)
    expected = {"block": 1, "inside": 1, "inside and more": 1}.get(name, 2)
    if "levels" in name and "RoI" not in name:  # the last level is smaller than the weight
        expected = 1 if name.endswith("shared-shared") else 2
    assert number_of_folds(tuned, images()) == expected
    assert number_of_folds(frozen, images()) == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("learns", [True, False])
@every_model
def test_trained_steps(name, learns, dtype, tolerance):
    """An optimizer that there is before goes on; state dicts are the same but for rounding."""
    torch.manual_seed(0)
    frozen = freeze(fill(MODELS[name]()).to(dtype), affine=not learns).train()
    tuned = copy.deepcopy(frozen)
    kwargs = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [torch.optim.SGD(model.parameters(), **kwargs) for model in (frozen, tuned)]
    parameters, before = list(tuned.parameters()), copy.deepcopy(tuned.state_dict())
    tune(tuned)
    assert all(p is q for p, q in zip(tuned.parameters(), parameters, strict=True))
    for k in range(5):
        for model, optimizer in zip((frozen, tuned), optimizers, strict=True):
            optimizer.zero_grad()
            model(images(dtype, k)).square().mean().backward()
            optimizer.step()
    found, expected = tuned.state_dict(), frozen.state_dict()
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not all(torch.equal(v, before[k]) for k, v in found.items())
    other = freeze(fill(MODELS[name]()).to(dtype))
    other.load_state_dict(found)
    tuned.load_state_dict(other.state_dict())
    expected = other(images(dtype))
    assert (tuned(images(dtype)) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_resnet(norm):
    torch.manual_seed(0)
    frozen = freeze(fill(resnet18(norm_layer=norm)).double())
    for name, t in frozen.named_buffers():  # so that activations keep their scale
        if name.endswith("running_var"):
            t.fill_(3000.0)
    tuned, x = copy.deepcopy(frozen), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    report = tune(tuned)
    assert len(report.tuned) == 20 and report.left == {}
    assert list(tuned.state_dict()) == list(frozen.state_dict())
    for model in (frozen, tuned):
        model.train()(x).square().mean().backward()
    for p, q in zip(tuned.parameters(), frozen.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-9 * q.grad.abs().max()


def test_only_what_is_smaller_is_scaled():
    frozen, tuned = make("block")
    x = images()
    assert number_of_folds(tuned, x) == 1
    small = x[..., :5, :3]
    assert number_of_folds(tuned, small) == 0
    assert_same(pass_of(tuned, small), pass_of(frozen, small))


@every_model
def test_no_images(name):
    frozen, tuned = make(name, affine=False)
    x = images(num=0).requires_grad_()
    ys = tuned(x), frozen(x)
    assert ys[0].shape == ys[1].shape
    ys[0].sum().backward()
    for p in tuned.parameters():
        assert p.grad is None or not p.grad.any()


def held(model, x):
    """Bytes that a pass holds beside parameters, buffers and derived weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    shapes, saved = {p.shape for p in model.parameters() if p.dim() == 4}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own and t.shape not in shapes:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def test_what_is_held():
    """No more than by a host's frozen layers; where the affine learns, not what these hold."""
    torch.manual_seed(0)
    model = fill(resnet18(norm_layer=FrozenBatchNorm2d)).train()
    x = torch.randn(2, 3, 64, 64)
    of_frozen = held(model, x)
    ours = freeze(thaw(copy.deepcopy(model)))
    assert held(ours, x) <= of_frozen
    tune(ours)
    tune(model)
    assert max(held(ours, x), held(model, x)) <= of_frozen
    learning = freeze(thaw(copy.deepcopy(model)), affine=False)
    of_learning = held(learning, x)
    tune(learning)
    assert held(learning, x) < 0.9 * of_learning


@both_affines
@pytest.mark.parametrize(
    "name", ["sequential", "hosts'", "inside", "levels " + "-".join(reference.EIGHT_CHOICES[-1])]
)
def test_autocast(name, affine):
    """The weight is derived in float32, and then cast."""
    frozen, tuned = make(name, affine, torch.float32)
    reference_, _ = make(name, affine)
    expected = pass_of(reference_, images())
    for model in (frozen, tuned):
        with torch.autocast("cpu", torch.bfloat16):
            x = images(torch.float32).requires_grad_()
            model.zero_grad()
            y = model(x)
        assert y.dtype == torch.bfloat16 or model is frozen
        y.float().square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        for a, b in zip([y, x.grad, *grads], [*expected[:2], *expected[2]], strict=True):
            assert a is b is None or (a - b).norm() <= 0.02 * b.norm()
            assert a is None or a is y or a.dtype == torch.float32


def test_half_precision():
    _, tuned = make("sequential", affine=False, dtype=torch.bfloat16)
    frozen, _ = make("sequential", affine=False)
    x = images(torch.bfloat16)
    found, expected = pass_of(tuned, x), pass_of(frozen, x.double())
    for a, b in zip([*found[:2], *found[2]], [*expected[:2], *expected[2]], strict=True):
        assert a.dtype == torch.bfloat16 and (a - b).norm() <= 0.05 * b.norm()


@every_model
def test_channels_last(name):
    frozen, tuned = make(name, affine=False)
    expected = pass_of(frozen, images())
    tuned = tuned.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    if "levels" not in name:
        assert tuned(x).is_contiguous(memory_format=torch.channels_last)
    assert_same(pass_of(tuned, x), expected)


follows_layers = not_on_torch_2_4("makes no whole graph of a layer that is tuned")


@follows_layers
def test_compiled():
    """As one graph."""
    for name in ("sequential", "block", "inside"):
        frozen, tuned = make(name, affine=False)
        torch._dynamo.reset()
        compiled = torch.compile(tuned, backend="aot_eager", fullgraph=True)
        assert_same(pass_of(compiled, images()), pass_of(frozen, images()))


@follows_layers
def test_sizes_that_change_compile_once_each_way():
    """One graph for outputs that are larger than the weight, and one for the others."""
    frozen, tuned = make("block", affine=False)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tuned, backend=counter, fullgraph=True, dynamic=True)
    for height, width in ((16, 12), (20, 14), (40, 16), (5, 3), (4, 3)):
        x = torch.randn(2, 4, height, width, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["sequential", "inside"])
def test_activation_checkpointing(name, use_reentrant):
    frozen, tuned = make(name)
    found = pass_of_checkpointed(tuned, images(), use_reentrant)
    assert_same(found, pass_of(frozen, images()))


def pass_of_checkpointed(model, x, use_reentrant):
    x = x.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    (y**2).mean().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@every_model
def test_copies(name, copied):
    """They are tuned, and have nothing in common with the model."""
    frozen, tuned = make(name, affine=False)
    other, before = copied(tuned), copy.deepcopy(tuned.state_dict())
    assert number_of_folds(other, images()) == number_of_folds(tuned, images()) > 0
    assert_same(pass_of(other, images()), pass_of(frozen, images()))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
        assert not torch.equal(other(images()), tuned(images()))
    torch.testing.assert_close(tuned.state_dict(), before, rtol=0, atol=0)


def move_statistics(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean.add_(1)


def hooked(model, of, kind):
    """With a hook, and what it has seen."""
    seen = []
    module = next(m for m in model.modules() if isinstance(m, of))
    getattr(module, f"register_{kind}")(lambda m, *args: seen.append(args) and None)
    return seen


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("of", [nn.Conv2d, (nn.modules.batchnorm._NormBase, FrozenBatchNorm2d)])
@pytest.mark.parametrize("name", ["sequential", "hosts'", "inside", "block"])
def test_hooks_see_what_they_saw(name, of, kind):
    frozen, tuned = make(name)
    seen = [hooked(model, of, kind) for model in (frozen, tuned)]
    assert_same(pass_of(tuned, images()), pass_of(frozen, images()))
    assert seen[0]
    torch.testing.assert_close(seen[1], seen[0])


@both_affines
@every_model
def test_thawed(name, affine):
    """It normalizes by the batch, and its statistics move; frozen again, it computes as such."""
    frozen, tuned = make(name, affine)
    for model in (frozen, tuned):
        thaw(model).train()
    assert_same(pass_of(tuned, images()), pass_of(frozen, images()))
    torch.testing.assert_close(tuned.state_dict(), frozen.state_dict())
    for model in (frozen, tuned):
        freeze(model)
    assert_same(pass_of(tuned, images()), pass_of(frozen, images()))
    assert tune(tuned).left == {}
    assert number_of_folds(tuned, images()) > 0
    assert_same(pass_of(tuned, images()), pass_of(frozen, images()))


def to_ours(model):
    convert_batchnorm(model, lambda c: BatchNorm2d(c, ghost_size=2))


def recompute(model):
    update_bn_stats(model, [images()], 1, frozen=True, initial=True)


def standardize(model):
    normalize_weight(next(m for m in model.modules() if isinstance(m, nn.Conv2d)), "WS")


def double_weight(model):
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    parametrize.register_parametrization(conv, "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def new_weight(model):
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach() + 1)


def tune_again(model):
    tune(model)


def fuse_and_unfuse(model):
    model.eval()
    if fuse(model).fused:
        unfuse(model)


CHANGES = {
    f.__name__: f
    for f in (to_ours, recompute, standardize, double_weight, new_weight, tune_again,
              fuse_and_unfuse, nn.Module.float, nn.Module.eval, states)
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["sequential", "hosts'", "inside", "block", "levels per_domain-per_domain-shared"]
)
def test_changed_afterwards(name, change):
    frozen, tuned = make(name)
    for model in (frozen, tuned):
        CHANGES[change](model)
    dtype = next(frozen.parameters()).dtype
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(pass_of(tuned, images(dtype)), pass_of(frozen, images(dtype)), tolerance)
    torch.testing.assert_close(tuned.state_dict(), frozen.state_dict())


@every_model
def test_fused(name):
    """Its weights are then plain ones, for inference."""
    frozen, tuned = make(name)
    frozen.eval(), tuned.eval()
    assert fuse(tuned).left == {}
    assert not any(isinstance(m, (TunedConv, TunedNorm)) for m in tuned.modules())
    with torch.no_grad():
        torch.testing.assert_close(tuned(images()), frozen(images()), rtol=1e-10, atol=1e-10)


def test_a_replaced_forward_method():
    for which in (0, 1):
        frozen, tuned = make("sequential")
        for model in (frozen, tuned):
            original = model[which].forward
            model[which].forward = lambda x, original=original: original(x) + 1
        assert_same(pass_of(tuned, images()), pass_of(frozen, images()))


def test_a_convolution_alone_returns_no_tensor():
    _, tuned = make("sequential")
    assert isinstance(tuned[0](images()), Deferred)
    with pytest.raises(TypeError):
        tuned[2](tuned[0](images()))


def trained_in_ddp(rank, affine):
    """Gradients of a frozen and of a tuned model, frozen before and within."""
    found = []
    for is_tuned in (False, True):
        for within in (False, True):
            torch.manual_seed(0)
            model = fill(nn.Sequential(*sequential(), nn.Conv2d(5, 2, 1)).double())
            of = DistributedDataParallel(model) if within else model
            freeze(of, affine=affine)
            assert not is_tuned or tune(of).left == {}
            wrapped = of if within else DistributedDataParallel(model)
            for k in range(2):  # and DDP is ready for a second step
                model.zero_grad()
                wrapped(images(seed=2 * k + rank)).square().mean().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return found


@both_affines
def test_in_ddp(affine):
    ranks = run_ranks(trained_in_ddp, 2, affine)
    for before, within, tuned_before, tuned_within in ranks:
        torch.testing.assert_close(tuned_before, before)
        torch.testing.assert_close(tuned_within, within)
        assert not any(g.any() for n, g in within.items() if n not in before)
        assert {n for n in within if n not in before} == (
            {"1.weight", "1.bias", "4.weight", "4.bias"} if affine else set()
        )
    torch.testing.assert_close(ranks[0], ranks[1])


def bytes_in_ddp(rank):
    """That layers frozen within hold, tuned or not, and those that learn."""
    del rank
    model = sequential()
    x = images(torch.float32)
    wrapped = DistributedDataParallel(model)
    found = [held(freeze(wrapped, affine=affine), x) for affine in (False, True)]
    tune(wrapped)
    return [*found, held(wrapped, x)]


def test_what_is_held_in_ddp():
    (learning, frozen, tuned), _ = run_ranks(bytes_in_ddp, 2)
    assert tuned <= frozen < 0.8 * learning


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("name", ["sequential", "inside"])
def test_in_threads(name):
    """Nothing of a call is to be seen by another one."""
    (_, model), x = make(name), images()
    expected, wrong = model(x), []

    def work():
        for _ in range(20):
            try:
                wrong.append(not torch.equal(model(x), expected))
            except Exception as e:
                wrong.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 80


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=follows_layers)])
def test_exported_for_any_number_of_images(strict):
    model, x = make("sequential")[1].eval(), images(num=3)
    sizes = ({0: torch.export.Dim("num", min=2, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
    for num in (3, 7):
        x = images(num=num)
        torch.testing.assert_close(exported(x), model(x), atol=1e-12, rtol=1e-12)


def test_parameters_of_one_storage():
    model = freeze(nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)))
    parameters = [*model.parameters()]
    vector_to_parameters(parameters_to_vector(parameters), parameters)
    assert tune(model) == (["1"], {})


def test_on_the_meta_device():
    with torch.device("meta"):
        model = freeze(nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)))
    message = r"on the meta device, where nothing has a value: 0.weight and \d+ more; load"
    for function, name in ((tune, "tune"), (fuse, "fuse")):
        with pytest.raises(InputError, match=f"^{name}: {message}"):
            function(model.eval())


def test_reasons():
    shared, hooked = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
    hooked.register_forward_hook(lambda *_: None)
    standardized = nn.Conv2d(C, C, 1)
    normalize_weight(standardized, "WS")
    pairs = {
        "moving": (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
        "evaluating": (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C).eval()),
        "source": (nn.Conv2d(C, C, 1), SourceBatchNorm2d(C, 2)),
        "levels": (nn.Conv2d(C, C, 1), RoILevelBatchNorm2d(C, 2)),
        "activation": (nn.Conv2d(C, C, 1), WithActivation(C)),
        "places": (shared, nn.BatchNorm2d(C)),
        "again": (shared,),
        "hook": (hooked, nn.BatchNorm2d(C)),
        "groups": (nn.ConvTranspose2d(C, C, 1, groups=2), nn.BatchNorm2d(C)),
        "standardized": (standardized, nn.BatchNorm2d(C)),
        "alone": (nn.BatchNorm2d(C),),
        "lazy": (nn.LazyConv2d(C, 1), nn.BatchNorm2d(C)),
        "nan": (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
        "fits": (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
    }
    model = nn.ModuleDict({name: nn.Sequential(*of) for name, of in pairs.items()})
    nn.init.constant_(model["nan"][0].weight, float("nan"))
    freeze(model, [name for name in pairs if name not in ("moving", "evaluating", "again")])
    words = {
        "moving.1": "not frozen; call freeze", "evaluating.1": "not frozen; call freeze",
        "source.1": "source of each image", "levels.1": "level of each RoI",
        "activation.1": "does not only normalize", "places.1": "several places", "hook.1": "hooks",
        "groups.1": "has groups", "standardized.1": "bake_weight_norms", "alone.0": "not certain",
        "lazy.1": "no weight yet; call the model once", "nan.1": "convolution is NaN or infinite",
    }  # fmt: skip
    types = [type(m) for m in model.modules()]
    report = tune(model)
    assert report.tuned == ["fits.1"] and report.left.keys() == words.keys()
    for name, reason in report.left.items():
        assert re.search(words[name], reason), (name, reason)
    changed = [
        n for (n, m), t in zip(model.named_modules(), types, strict=True) if type(m) is not t
    ]
    assert changed == ["fits.0", "fits.1"]
