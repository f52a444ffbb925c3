"""Statistics for each source of images, against one layer for each."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import reference
from bn_det import (
    BatchNorm2d,
    DomainBatchNorm2d,
    SourceBatchNorm2d,
    convert_batchnorm,
    image_sources,
    update_bn_stats,
)
from bn_det.commands.recompute import transfer
from bn_det.errors import InputError
from ranks import counted_collectives, run_ranks

C, LEVELS = 4, 3
BATCHES = {
    "mixed": [1, 0, 1, 0, 0],
    "in order": [0, 0, 1, 1],
    "of one source": [1, 1, 1],
    "of one image": [0],
    "empty": [],
}
every_batch = pytest.mark.parametrize("sources", BATCHES.values(), ids=BATCHES)


def randomize(layer):
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return layer


def images(sources, size=(3, 5), seed=0, **kwargs):
    """Features of images; those of source 1 are of another scale and mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(sources), C, *size, generator=generator, dtype=torch.float64)
    return (x * (1 + torch.tensor(sources).view(-1, 1, 1, 1)) + 3).to(**kwargs).requires_grad_()


def pyramid(sources, seed=0):
    return [images(sources, (k + 2, 3), seed + k) for k in range(LEVELS)]


def of_source(sources, k):
    return [i for i, s in enumerate(sources) if s == k]


def gradients(ys, inputs):
    """Of a fixed random function of the outputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ys]
    total = sum((y * w).sum() for y, w in zip(ys, weights, strict=True))
    return torch.autograd.grad(total, inputs, allow_unused=True)


@every_batch
def test_one_tensor_is_torchs_layer_for_each_source(sources):
    torch.manual_seed(0)
    layer = randomize(SourceBatchNorm2d(C, 2)).double()
    layers = [nn.BatchNorm2d(C).double() for _ in range(2)]
    for own in layers:
        own.weight, own.bias = layer.weight, layer.bias
    for training in (True, False):
        layer.train(training)
        x = images(sources)
        with image_sources(sources):
            y = layer(x)
        expected = torch.zeros_like(x)
        for k, own in enumerate(layers):
            if mine := of_source(sources, k):
                expected = expected.index_copy(0, torch.tensor(mine), own.train(training)(x[mine]))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        if sources:
            inputs = [x, layer.weight, layer.bias]
            pairs = zip(gradients([y], inputs), gradients([expected], inputs), strict=True)
            for got, wanted in pairs:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    for k, own in enumerate(layers):
        for name, buffer in layer.get_submodule(str(k)).named_buffers():
            torch.testing.assert_close(buffer, own.get_buffer(name), rtol=0, atol=1e-12)


@every_batch
@pytest.mark.parametrize("choices", reference.EIGHT_CHOICES, ids="-".join)
def test_levels_are_a_domain_layer_for_each_source(choices, sources):
    names = ("statistics", "population", "affine")
    choices = dict(zip(names, choices, strict=True))
    torch.manual_seed(0)
    layer = randomize(SourceBatchNorm2d(C, 2, LEVELS, **choices)).double()
    # Per domain both population statistics and affine of the reference are; which is a choice that
    # the layer with sources does not have: its affine is where the population statistics are.
    layers = [DomainBatchNorm2d(C, LEVELS, **choices).double() for _ in range(2)]
    for k, own in enumerate(layers):
        for level in range(LEVELS):
            mine = layer.affine_of(k * LEVELS + level)
            own.affine_of(level).weight, own.affine_of(level).bias = mine.weight, mine.bias
    for training in (True, False):
        xs = pyramid(sources)
        with image_sources(sources):
            ys = layer.train(training)(xs)
        expected = [torch.zeros_like(x) for x in xs]
        for k, own in enumerate(layers):
            mine = of_source(sources, k)
            parts = own.train(training)([x[mine] for x in xs])
            for level, part in enumerate(parts):
                expected[level] = expected[level].index_copy(0, torch.tensor(mine).long(), part)
        for y, e in zip(ys, expected, strict=True):
            torch.testing.assert_close(y, e, rtol=0, atol=1e-12)
        if sources:
            inputs = [*xs, *layer.parameters()]
            pairs = zip(gradients(ys, inputs), gradients(expected, inputs), strict=True)
            for got, wanted in pairs:
                wanted = torch.zeros_like(got) if wanted is None else wanted
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    for k, own in enumerate(layers):
        for level in range(LEVELS):
            mine = layer.population_of(k * LEVELS + level)
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffer = getattr(own.population_of(level), name)
                torch.testing.assert_close(getattr(mine, name), buffer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_levels", [None, LEVELS])
def test_jacobian(num_levels):
    """Exactly the images of one source depend on each other."""
    sources = [1, 0, 1, 0, 0]
    layer = SourceBatchNorm2d(C, 2, num_levels, statistics="shared", population="shared").double()
    xs = [images(sources)] if num_levels is None else pyramid(sources)

    def run(xs):
        with image_sources(sources):
            return [layer(xs[0])] if num_levels is None else layer(xs)

    source_of = torch.tensor(sources * len(xs))
    expected = source_of.unsqueeze(0) == source_of.unsqueeze(1)
    assert torch.equal(reference.dependence(run, xs), expected)


def test_batch_statistics_in_evaluation():
    sources = [1, 0, 1]
    layer = SourceBatchNorm2d(C, 2, eval_statistics="batch").double()
    x = images(sources)
    with image_sources(sources):
        trained, evaluated = layer(x), layer.eval()(x)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_precisions_and_memory_formats(dtype, tolerance, memory_format):
    """Within a rounding of a value of up to 4 in the type."""
    sources = [1, 0, 1, 0]
    layer = SourceBatchNorm2d(C, 2)
    x = images(sources).detach()
    with image_sources(sources):
        y = layer(x.to(dtype, memory_format=memory_format))
        expected = copy.deepcopy(layer).double()(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)


def test_ghost_batches_are_of_one_source():
    sources = [0, 1, 0, 1, 0, 0]
    layer = SourceBatchNorm2d(C, 2, ghost_size=2).double()

    def run(xs):
        with image_sources(sources):
            return [layer(xs[0])]

    expected = torch.zeros(6, 6, dtype=torch.bool)
    for batch in ([0, 2], [4, 5], [1, 3]):
        expected[torch.tensor(batch).unsqueeze(1), torch.tensor(batch)] = True
    assert torch.equal(reference.dependence(run, [images(sources)]), expected)


def test_activation_checkpointing():
    sources = [1, 0, 1, 0]
    layer = randomize(SourceBatchNorm2d(C, 2)).double()
    other = copy.deepcopy(layer)
    x = images(sources)
    with image_sources(sources):
        gradient = gradients([layer(x)], [x])
        repeated = gradients([checkpoint(other, x, use_reentrant=False)], [x])
    assert torch.equal(gradient[0], repeated[0])
    assert torch.equal(layer.get_buffer("1.running_mean"), other.get_buffer("1.running_mean"))


@pytest.mark.parametrize(
    "sources, message",
    [
        ([0, 1, None], "image 2 of the batch is of source None, .* 0 to 1; name the sources"),
        ([0, 2, 1], "image 1 of the batch is of source 2"),
        ([0, "night", 1], "image 1 of the batch is of source 'night'"),
        ([0, 1], "sources of 2 images are named, and the layer got 3 samples"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_sources_that_cannot_be(sources, message, training):
    layer = SourceBatchNorm2d(C, 2).double().train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(InputError, match=message), image_sources(sources):
        layer(images([0, 0, 0]))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_layers_that_know_different_numbers_of_sources():
    with image_sources([1, 0, 1]):
        for num_sources in (2, 3, 2):
            SourceBatchNorm2d(C, num_sources).double()(images([1, 0, 1]))


def test_the_scope_ends_with_its_block():
    layer = SourceBatchNorm2d(C, 2).double()
    with image_sources([0, 1]):
        with pytest.raises(ZeroDivisionError), image_sources([1, 1, 1]):
            raise ZeroDivisionError
        layer(images([0, 1]))
    with pytest.raises(InputError, match=r"no sources: .*bn_det.image_sources.*DATASETS.SOURCES"):
        layer(images([0, 1]))


def test_what_else_is_refused():
    with pytest.raises(InputError, match="num_sources: 0 is not accepted"):
        SourceBatchNorm2d(C, 0)
    with pytest.raises(ValueError, match="population: 'all'"):
        SourceBatchNorm2d(C, 2, population="all")
    layer = SourceBatchNorm2d(C, 2, LEVELS, statistics="shared", population="per_domain").double()
    with image_sources([0, 0]):
        for xs in (images([0, 0]), pyramid([0, 0])[1:]):
            with pytest.raises(TypeError, match="a list of 3 tensors"):
                layer(xs)
    with image_sources([0, 1, 1]), pytest.raises(InputError, match="source 0, domain 0: .*single"):
        layer([images([0, 1, 1], (1, 1)), *pyramid([0, 1, 1])[1:]])


@pytest.mark.parametrize("population", reference.SHARING)
@pytest.mark.parametrize("affine", reference.SHARING)
def test_a_state_dict_without_sources(population, affine):
    """Each source begins with what a layer without them has."""
    choices = {"population": population, "affine": "shared"}
    torch.manual_seed(0)
    old = randomize(DomainBatchNorm2d(C, LEVELS, **choices)).double()
    old([x.detach() for x in pyramid([0, 0])])
    choices["affine"] = affine
    new = SourceBatchNorm2d(C, 2, LEVELS, **choices).double()
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    xs = pyramid([0, 1])
    with image_sources([0, 1]):
        ys = new.eval()(xs)
    for y, e in zip(ys, old.eval()(xs), strict=True):
        torch.testing.assert_close(y, e, rtol=0, atol=1e-12)
    again = SourceBatchNorm2d(C, 2, LEVELS, **choices).double()
    again.load_state_dict(new.state_dict())
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in again.state_dict().items())
    del (state := new.state_dict())["1.running_mean"]
    if population == "shared":
        with pytest.raises(RuntimeError, match="1.running_mean"):
            again.load_state_dict(state)


def test_conversion_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, eps=0.1, momentum=0.3)).double()
    model(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    old = copy.deepcopy(model).eval()
    convert_batchnorm(model.eval(), lambda channels: SourceBatchNorm2d(channels, 2))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with image_sources([1, 0]):
        torch.testing.assert_close(model(x), old(x), rtol=0, atol=1e-12)
        model.train()(x)
    own = nn.BatchNorm2d(C, eps=0.1, momentum=0.3).double()
    own.load_state_dict(old[1].state_dict())
    own(old[0](x[:1]))
    torch.testing.assert_close(model[1].get_buffer("1.running_var"), own.running_var)


@pytest.mark.parametrize("population", reference.SHARING)
def test_precise_statistics_of_each_source(population):
    """The variance of all values of a source, whichever batches they came in."""
    layer = SourceBatchNorm2d(C, 2, LEVELS, statistics="shared", population=population).double()
    batches = [(s, pyramid(s, seed=10 * i)) for i, s in enumerate(BATCHES.values()) if s]

    def call(model, batch):
        with image_sources(batch[0]):
            model(batch[1])

    report = update_bn_stats(layer, batches, len(batches), call=call)
    counts = [sum(sources.count(k) for sources, _ in batches) for k in range(2)]
    for k in range(2):
        levels = [
            [x[of_source(s, k)] for s, xs in batches for x in xs[n : n + 1]] for n in (0, 1, 2)
        ]
        for n, level in enumerate(levels):
            seen = [x for of_level in levels for x in of_level] if population == "shared" else level
            mean, var = reference.mean_var(seen)
            holder = layer.population_of(k * LEVELS + n)
            torch.testing.assert_close(holder.running_mean, mean, rtol=0, atol=1e-9)
            torch.testing.assert_close(holder.running_var, var, rtol=1e-9, atol=0)
    samples = {of.name: of.num_samples for of in report.layers}
    if population == "shared":
        assert samples == {"0": counts[0] * LEVELS, "1": counts[1] * LEVELS}
    else:
        assert samples == {str(k * LEVELS + n): counts[k] for k in range(2) for n in range(LEVELS)}


def test_transfer_to_statistics_per_level():
    """As tools/recompute_statistics.py --population does it, there and back."""
    shared, per_level = (
        nn.Sequential(SourceBatchNorm2d(C, 2, LEVELS, population=p)) for p in reference.SHARING
    )
    for k in range(2):
        shared[0].get_submodule(str(k)).running_mean.fill_(k + 1)
    transfer(shared, per_level)
    for k in range(2 * LEVELS):
        assert (per_level[0].get_submodule(str(k)).running_mean == k // LEVELS + 1).all()
    per_level[0].get_submodule("5").running_mean.fill_(7)  # the last level of source 1
    transfer(per_level, shared)
    assert [shared[0].get_submodule(str(k)).running_mean[0].item() for k in range(2)] == [1, 2]


RANKS = [[0, 0, 0], [1, 1], [1, 0, 1, 1]]
"""The sources of the images of each rank; one has none of a source."""


def synchronized(rank):
    torch.manual_seed(0)
    layer = randomize(SourceBatchNorm2d(C, 2, LEVELS, statistics="shared", population="shared"))
    layer = layer.double()
    layer.group = "world"
    xs, before = pyramid(RANKS[rank], seed=100 * rank), counted_collectives
    with image_sources(RANKS[rank]):
        layer(xs)
        with before() as counts:
            ys = layer(xs)
            sum((y * y * (k + 1)).sum() for k, y in enumerate(ys)).backward()
    return (
        [y.detach() for y in ys],
        [x.grad for x in xs],
        layer.state_dict(),
        sum(counts.values()),
    )


def test_synchronized():
    """As one process that holds the images of all ranks, with two collectives a call."""
    results = run_ranks(synchronized, len(RANKS))
    torch.manual_seed(0)
    whole = SourceBatchNorm2d(C, 2, LEVELS, statistics="shared", population="shared")
    whole = randomize(whole).double()
    per_rank = [pyramid(s, seed=100 * rank) for rank, s in enumerate(RANKS)]
    xs = [torch.cat(of_level).detach().requires_grad_() for of_level in zip(*per_rank, strict=True)]
    with image_sources(source for of_rank in RANKS for source in of_rank):
        whole(xs)
        ys = whole(xs)
    sum((y * y * (k + 1)).sum() for k, y in enumerate(ys)).backward()
    sizes = [len(s) for s in RANKS]
    for rank, (outputs, grads, state, num_collectives) in enumerate(results):
        for y, output in zip(ys, outputs, strict=True):
            torch.testing.assert_close(output, y.split(sizes)[rank], rtol=0, atol=1e-10)
        for x, grad in zip(xs, grads, strict=True):
            torch.testing.assert_close(grad, x.grad.split(sizes)[rank], rtol=0, atol=1e-10)
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-10)
        assert num_collectives == 2 + 2, "two of them of where the ranks are"


def in_parallel(rank):
    """The affine of a source that no image of the rank is of takes part in the exchange."""
    torch.manual_seed(0)
    model = DistributedDataParallel(SourceBatchNorm2d(C, 2, affine="per_domain").double())
    with image_sources([rank] * 3):
        model(images([rank] * 3)).square().sum().backward()
        model(images([rank] * 3)).square().sum().backward()  # it would wait for what is missing
    return [p.grad for p in model.parameters()]


def test_distributed_data_parallel():
    first, second = run_ranks(in_parallel, 2)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(first, second, strict=True))


def test_repr_names_the_sources():
    assert "num_sources=2" in repr(SourceBatchNorm2d(C, 2))
    assert "num_sources=2, num_levels=3" in repr(SourceBatchNorm2d(C, 2, LEVELS))
    assert isinstance(SourceBatchNorm2d(C, 2), BatchNorm2d)


def sources_of(*means, num_levels=None):
    """A layer of as many sources as there are means; of several levels each."""
    layer = SourceBatchNorm2d(C, len(means) // (num_levels or 1), num_levels)
    for k, mean in enumerate(means):
        layer.population_of(k).running_mean.fill_(mean)
    return layer


@pytest.mark.parametrize("num_levels", [None, 2])
def test_a_state_dict_of_other_sources(num_levels):
    """Nobody's statistics become another's."""
    means = range(2 * (num_levels or 1))
    state = sources_of(*means, num_levels=num_levels).state_dict()
    other = SourceBatchNorm2d(C, 3, num_levels)
    missing, _ = other.load_state_dict(copy.copy(state), strict=False)
    assert sorted(name for name in missing if name.endswith("mean")) == [
        f"{k}.running_mean" for k in range(len(means), 3 * (num_levels or 1))
    ]
    same = sources_of(*([7] * len(means)), num_levels=num_levels)
    lacks = {name: of for name, of in state.items() if name != "1.running_mean"}
    missing, _ = same.load_state_dict(lacks, strict=False)
    assert missing == ["1.running_mean"] and (same.population_of(1).running_mean == 7).all()


def test_names_reach_the_thread_of_a_backward_pass():
    """On a GPU, autograd recomputes activations in a thread of its own."""
    layer = SourceBatchNorm2d(C, 2).train()
    x = torch.randn(4, C, 3, 3, requires_grad=True)
    found = []

    def backward():
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        found.append(x.grad)

    with image_sources([0, 0, 1, 1]):
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(60)
    assert len(found) == 1
    with pytest.raises(InputError, match="have no sources"):
        layer(x)


def test_no_levels():
    with pytest.raises(InputError, match="num_levels: 0 is not accepted; use 1 or more"):
        SourceBatchNorm2d(C, 2, 0)
