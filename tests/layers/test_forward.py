"""The one way through a layer: what it shows, and what can be added on the way."""

import pytest
import torch
from torch import nn

from bn_det import BatchNorm2d, DomainBatchNorm2d, Moments, SourceBatchNorm2d, image_sources
from bn_det.layers.batch import Batch
from bn_det.layers.forward import Domain, Plan, batch_norm


def observed(layer, *args):
    """What a call shows, as (population, batches) in their order."""
    seen = []
    handle = layer.register_observer(lambda *of_population: seen.append(of_population))
    layer(*args)
    handle.remove()
    layer(*args)
    return seen


def levels():
    return [torch.randn(4, 3, 2 * k, 3 * k) * k + k for k in (3, 2, 1)]


def assert_moments(batch, *xs):
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1).double()
    assert batch.size == rows.shape[1]
    torch.testing.assert_close(batch.moments.mean.double(), rows.mean(1), rtol=1e-5, atol=1e-5)
    var = rows.var(1, correction=0)
    torch.testing.assert_close(batch.moments.var.double(), var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ghost_size", [None, 2])
def test_an_observer_sees_each_normalization_batch(ghost_size):
    layer, x = BatchNorm2d(3, ghost_size=ghost_size), torch.randn(4, 3, 2, 2)
    ((population, batches),) = observed(layer, x)
    assert population is layer
    for batch, part in zip(batches, x.split(ghost_size or 4), strict=True):
        assert_moments(batch, part)


@pytest.mark.parametrize("ghost_size", [None, 2])
def test_what_is_observed_computes_what_it_does_otherwise(ghost_size):
    x = torch.randn(4, 3, 2, 2)
    layer, other = (BatchNorm2d(3, ghost_size=ghost_size) for _ in range(2))
    layer.register_observer(lambda population, batches: None)
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())


def test_a_population_sees_of_a_batch_the_part_that_is_its_own():
    xs = levels()
    shared = DomainBatchNorm2d(3, 3, statistics="shared", population="shared")
    ((population, (batch,)),) = observed(shared, xs)
    assert population is shared
    assert_moments(batch, *xs)

    layer = DomainBatchNorm2d(3, 3, statistics="shared", population="per_domain")
    seen = observed(layer, xs)
    assert [population for population, _ in seen] == [layer.population_of(k) for k in range(3)]
    for (_, (batch,)), x in zip(seen, xs, strict=True):
        assert_moments(batch, x)


@pytest.mark.parametrize("ghost_size", [None, 2])
def test_a_population_sees_one_level_after_the_other(ghost_size):
    """As one nn.BatchNorm2d that is called once a level."""
    xs = levels()
    layer = DomainBatchNorm2d(
        3, 3, statistics="per_domain", population="shared", ghost_size=ghost_size
    )
    seen = observed(layer, xs)
    assert [population for population, _ in seen] == [layer] * 3
    for (_, batches), x in zip(seen, xs, strict=True):
        for batch, part in zip(batches, x.split(ghost_size or 4), strict=True):
            assert_moments(batch, part)


def test_the_levels_of_a_source_are_one_batch():
    layer = SourceBatchNorm2d(3, 2, 3, statistics="shared", population="shared")
    xs = levels()
    with image_sources([1, 0, 0, 1]):
        seen = observed(layer, xs)
    assert [population for population, _ in seen] == [layer.population_of(k) for k in (0, 3)]
    for (_, (batch,)), images in zip(seen, ([1, 2], [0, 3]), strict=True):
        assert_moments(batch, *(x[images] for x in xs))


def test_an_extension_is_in_batch_and_ema_until_it_is_removed():
    x, extra = torch.randn(2, 3, 2, 2), torch.randn(3, 3, 2, 2) + 1
    layer, reference = BatchNorm2d(3), nn.BatchNorm2d(3)
    more = Batch(Moments.of(extra), 12)
    handle = layer.register_extension(
        lambda parts, domains: [Batch.merge([part, more]) for part in parts]
    )
    expected = reference(torch.cat([x, extra]))[:2]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name), getattr(reference, name))
    handle.remove()
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 3, 4)])
def test_layers_of_torch_take_the_same_way(shape):
    """For any number of dimensions, on a layer that knows nothing of us."""
    x = torch.randn(shape)
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}
    layer, reference = (kinds[len(shape)](3) for _ in range(2))
    (y,) = batch_norm(Plan([Domain(x, layer, layer)], layer.eps))
    torch.testing.assert_close(y, reference(x))
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())
