"""update_bn_stats on several ranks: the same on all, exact, and no rank waits for ever."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bn_det import BatchNorm2d, DomainBatchNorm2d, shuffled, update_bn_stats
from ranks import counted_collectives, run_ranks
from reference import values

SIZES = ((3, 1, 4, 2), (6, 5, 2, 7))
"""Of the batches of each rank."""


def make_batches(rank, sizes=SIZES):
    generator = torch.Generator().manual_seed(rank)
    return [
        1 + (1 + k) * torch.randn(n, 3, 5, 6, generator=generator)
        for k, n in enumerate(sizes[rank])
    ]


def make_model(**choices):
    torch.manual_seed(0)
    first = BatchNorm2d(4, **choices) if choices else nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 1), first, nn.Conv2d(4, 4, 3), BatchNorm2d(4, **choices))


def statistics_of(model):
    return {k: v for k, v in model.state_dict().items() if "running" in k}


def updated(rank, sizes, kwargs, choices):
    model, batches = make_model(**choices), make_batches(rank, sizes)
    model[1].running_mean.fill_(rank)
    with counted_collectives() as counts:
        report = update_bn_stats(model, iter(batches), **kwargs)
    return statistics_of(model), report.as_dict(), dict(counts)


def test_all_ranks_have_the_statistics_of_all_data():
    results = run_ranks(updated, 2, SIZES, {"num_iters": 4}, {})
    reports = [r[1] for r in results]
    assert all(torch.equal(v, results[1][0][k]) for k, v in results[0][0].items()), "to the bit"
    assert [r[2] for r in results] == [{"all_gather_object": 1}] * 2
    with torch.no_grad():
        inputs = [make_model()[0](x).double() for rank in (0, 1) for x in make_batches(rank)]
    every = values(inputs)
    mean, var = every.mean(0), every.var(0, correction=0)
    # Float32's rounding; the convolution's result may depend on the batch, too.
    assert ((results[0][0]["1.running_mean"] - mean).abs() <= 1e-6 * var.sqrt()).all()
    assert ((results[0][0]["1.running_var"] - var).abs() <= 1e-6 * var).all()
    for report in reports:
        assert report["num_batches"] == 8 and report["num_samples"] == 30
        assert report["layers"][0]["mean_error"] == reports[0]["layers"][0]["mean_error"]
    assert reports[0]["layers"][0]["mean_shift"] != reports[1]["layers"][0]["mean_shift"]


def test_errors_are_those_of_one_process_with_all_data():
    results = run_ranks(updated, 2, SIZES, {"num_iters": 4}, {})
    model = make_model()
    report = update_bn_stats(model, make_batches(0) + make_batches(1), 8)
    for ours, alone in zip(results[0][1]["layers"], report.layers, strict=True):
        assert ours["mean_error"] == pytest.approx(alone.mean_error, rel=1e-5)
        assert ours["var_error"] == pytest.approx(alone.var_error, rel=1e-5)


@pytest.mark.parametrize("estimator", ["population_variance", "mean_of_batch_variances"])
def test_synchronized_layers(estimator):
    """Normalized over the ranks in each pass; a batch of all ranks counts once."""
    kwargs = {"num_iters": 4, "estimator": estimator}
    results = run_ranks(updated, 2, SIZES, kwargs, {"group": "world"})
    assert all(torch.equal(v, results[1][0][k]) for k, v in results[0][0].items())
    model = make_model()
    together = [torch.cat(pair) for pair in zip(make_batches(0), make_batches(1), strict=True)]
    report = update_bn_stats(model, together, 4, estimator=estimator)
    torch.testing.assert_close(results[0][0]["3.running_var"], model[3].running_var)
    torch.testing.assert_close(results[0][0]["3.running_mean"], model[3].running_mean)
    synchronized = results[0][1]["layers"][1]
    assert synchronized["num_batches"] == 4 and synchronized["num_samples"] == 30
    assert synchronized["var_error"] == pytest.approx(report.layers[1].var_error, rel=1e-4)


def domains(rank, group):
    torch.manual_seed(0)
    bn = DomainBatchNorm2d(3, 2, statistics="shared", group=group)
    update_bn_stats(bn, [(x, 2 * x[:, :, 1:] + 1) for x in make_batches(rank)], 4)
    return statistics_of(bn)


def test_synchronized_domains():
    results = run_ranks(domains, 2, "world")
    for k in range(2):
        batches = [x for rank in (0, 1) for x in make_batches(rank)]
        every = values([2 * x[:, :, 1:] + 1 if k else x for x in batches]).double()
        torch.testing.assert_close(results[1][f"{k}.running_mean"].double(), every.mean(0))
        torch.testing.assert_close(
            results[1][f"{k}.running_var"].double(), every.var(0, correction=0)
        )


@pytest.mark.parametrize("choices", [{}, {"group": "world"}])
def test_ranks_with_fewer_batches(choices):
    sizes = ((3, 1, 4, 2), (6, 5))
    with pytest.raises(RuntimeError, match="after 2 of 4 batches .* on rank 1"):
        run_ranks(updated, 2, sizes, {"num_iters": 4}, choices)
    results = run_ranks(updated, 2, sizes, {"num_iters": 4, "allow_short": True}, choices)
    assert all(torch.equal(v, results[1][0][k]) for k, v in results[0][0].items())
    # Where ranks run in step they end with the first that has no more.
    assert results[0][1]["layers"][0]["num_batches"] == (2 if choices else 6)
    kwargs = {"num_iters": 4, "allow_short": True}
    results = run_ranks(updated, 2, ((3, 1, 4, 2), ()), kwargs, {})
    assert results[0][1]["num_batches"] == 4, "nothing at all on one rank"
    assert torch.equal(results[0][0]["1.running_mean"], results[1][0]["1.running_mean"])


@pytest.mark.parametrize("choices", [{}, {"group": "world"}])
def test_tolerance(choices):
    sizes = ((4,) * 100, (3,) * 100)
    results = run_ranks(updated, 2, sizes, {"num_iters": 100, "tolerance": 0.5}, choices)
    for _, report, counts in results:
        assert report["reason"] == "tolerance" and report["error"] < 0.5
        # The checks come after 8, 9, ... batches of each rank.
        num = report["layers"][0]["num_batches"] // (1 if choices else 2)
        expected, done = 1, 8
        while done < num:
            expected, done = expected + 1, done + max(done // 8, 1)
        # Ranks agree before each batch that they have one, and find out where they are in each of
        # two layers after none, after the first, and twice after both.
        agree = {"all_gather_object": expected, "all_gather_into_tensor": 3 * num + 4}
        assert counts == (agree if choices else {"all_gather_object": expected})


def failing(rank, where, choices):
    model, batches = make_model(**choices), make_batches(rank)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loader():
        yield from batches[:2]
        if where == "loader":
            raise OSError("no such image")
        yield torch.full_like(batches[2], float("nan"))
        yield batches[3]

    class NotStarted:
        def __iter__(self):
            raise OSError("no such image")

    data_loader = NotStarted() if where == "its beginning" else loader()
    try:
        update_bn_stats(model, data_loader if rank == 1 else batches, 4)
    except Exception as e:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        dist.barrier()  # the group is still of use
        return type(e).__name__, str(e)


@pytest.mark.parametrize("choices", [{}, {"group": "world"}])
def test_a_failing_rank(choices):
    for where in ("loader", "its beginning"):
        results = run_ranks(failing, 2, where, choices)
        assert results[1] == ("OSError", "no such image")
        assert results[0][0] == "RuntimeError"
        assert "rank 1 failed: OSError: no such image" in results[0][1]
    results = run_ranks(failing, 2, "nan", choices)
    assert {r[0] for r in results} == {"InputError", "RuntimeError"}
    assert all("1: its input has NaN or infinity in batch 2" in r[1] for r in results)


def disagreeing(rank, frozen, tolerance):
    model = make_model()
    for layer in frozen[rank]:
        model[layer].eval()
    return update_bn_stats(model, make_batches(rank), 4, tolerance=tolerance).reason


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
@pytest.mark.parametrize("frozen", [((), (3,)), ((), (1, 3))])
def test_ranks_that_disagree(frozen, tolerance):
    with pytest.raises(RuntimeError, match="layers in training mode is .*on rank 0 and .*rank 1"):
        run_ranks(disagreeing, 2, frozen, tolerance)


def test_no_layers_on_any_rank():
    assert run_ranks(disagreeing, 2, ((1, 3), (1, 3)), 0.0) == ["no layers"] * 2


def in_ddp(rank):
    model = DistributedDataParallel(make_model())
    report = update_bn_stats(model, make_batches(rank), 4)
    return statistics_of(model.module), report.as_dict()["layers"][0]["name"]


def test_distributed_data_parallel():
    results = run_ranks(in_ddp, 2)
    expected = run_ranks(updated, 2, SIZES, {"num_iters": 4}, {})[0][0]
    for statistics, name in results:
        assert name == "1"
        assert all(torch.equal(v, expected[k]) for k, v in statistics.items())


def with_shuffle(rank, sizes):
    model = make_model()
    model[2] = shuffled(model[2])
    try:
        update_bn_stats(model, iter(make_batches(rank, sizes)), 4)
    except AssertionError as e:
        return str(e)
    return statistics_of(model)


def test_shuffled_modules_run_in_step():
    results = run_ranks(with_shuffle, 2, SIZES)
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    for message in run_ranks(with_shuffle, 2, (SIZES[0], SIZES[1][:3])):
        assert "after 3 of 4 batches (num_iters) on rank 1" in message


def group_of_one(rank):
    model, batches = make_model(), make_batches(rank)
    report = update_bn_stats(model, batches, 4, group=None)
    return statistics_of(model), report.num_batches


def test_one_rank_by_itself():
    results = run_ranks(group_of_one, 2)
    assert [num for _, num in results] == [4, 4]
    assert not torch.equal(results[0][0]["1.running_mean"], results[1][0]["1.running_mean"])
