"""The RPN's head: against stock Detectron2's, its definition, and the torchvision host's."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import copy
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import nn

import d2_models
import reference
from bn_det import BatchNorm2d, DomainBatchNorm2d, SourceBatchNorm2d, fuse, virtual_batch
from bn_det.d2 import AverageStatistics, BNRPNHead
from bn_det.errors import InputError
from bn_det.layers import WEIGHT_NORMS, PerLevel
from bn_det.tv.rcnn import RPNHead as TorchvisionHead
from d2_models import check_checkpoints, make_batch, train_step
from ranks import run_ranks
from reference import EIGHT_CHOICES, RCNN_BASE, choice_opts, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

C, LEVELS = 64, 5
OURS = ["MODEL.MASK_ON", "False", "MODEL.RPN.HEAD_NAME", "BNRPNHead"]
BN = [*OURS, "MODEL.RPN.NORM", "BN"]
every_choice = pytest.mark.parametrize("choices", EIGHT_CHOICES, ids="-".join)
every_depth = pytest.mark.parametrize("dims", [[-1], [24, -1, 16], []], ids=str)

make_cfg = partial(d2_models.make_cfg, RCNN_BASE)


def make_head(*opts, kind=BNRPNHead):
    head = kind(make_cfg(*opts), [ShapeSpec(channels=C, stride=2**k) for k in range(2, 7)])
    randomize(head)
    for p in head.parameters():  # which begin so small that the outputs are
        p.data += 0.05 * torch.randn_like(p)
    return head.double()


def pyramid(num_images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_images, C, 2**k, 2**k + 1, generator=generator, dtype=torch.float64)
        for k in reversed(range(LEVELS))
    ]


def outputs_and_gradients(head, xs):
    """By a fixed random function of the outputs."""
    xs = [x.clone().requires_grad_() for x in xs]
    ys = [y for of_kind in head(xs) for y in of_kind]
    generator = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in ys)
    inputs = [*xs, *head.parameters()]
    return ys, torch.autograd.grad(loss, inputs)


@every_depth
def test_without_a_norm_it_is_the_stock_head(dims):
    """Outputs to the bit; gradients but for the order in which levels are added up."""
    opts = ["MODEL.RPN.CONV_DIMS", str(dims)]
    stock, ours = make_head(*opts, kind=StandardRPNHead), make_head(*OURS, *opts)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    found, expected = (outputs_and_gradients(head, pyramid()) for head in (ours, stock))
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)


def test_checkpoints_go_both_ways(tmp_path):
    stock, ours = (build_model(make_cfg("MODEL.MASK_ON", "False", *o)) for o in ([], OURS))
    assert type(stock.proposal_generator.rpn_head) is StandardRPNHead
    check_checkpoints(ours, stock, tmp_path, make_batch([2, 3]))


def test_weights_of_stock_in_a_head_with_a_norm():
    stock, ours = make_head(kind=StandardRPNHead), make_head(*BN)
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected and all(".norm." in key for key in missing)


@every_choice
@pytest.mark.parametrize("dims", [[-1], [24, -1]], ids=str)
def test_definition(choices, dims):
    """Convolution, normalization by reference.py, ReLU; in float64 to the order of sums."""
    head = make_head(*BN, *choice_opts(choices, "RPN"), "MODEL.RPN.CONV_DIMS", str(dims))
    convs = [head.conv] if len(dims) == 1 else list(head.conv)
    hidden = pyramid()
    for conv in convs:
        assert isinstance(conv.norm, DomainBatchNorm2d) and conv.norm.num_domains == LEVELS
        hidden = [F.conv2d(x, conv.weight, conv.bias, padding=1) for x in hidden]
        affines = [conv.norm.affine_of(k) for k in range(LEVELS)]
        weights, biases = [a.weight for a in affines], [a.bias for a in affines]
        hidden = reference.domain_batch_norm(hidden, weights, biases, choices[0])
        hidden = [x.relu() for x in hidden]
    expected = [head.objectness_logits(x) for x in hidden], [head.anchor_deltas(x) for x in hidden]
    torch.testing.assert_close(head(pyramid()), expected, rtol=1e-10, atol=1e-10)


@every_choice
@every_depth
@pytest.mark.parametrize("training", [True, False])
def test_both_hosts_have_the_same_head(choices, dims, training):
    head = make_head(*BN, *choice_opts(choices, "RPN"), "MODEL.RPN.CONV_DIMS", str(dims))
    named = dict(zip(("statistics", "population", "affine"), choices, strict=True))
    norm = partial(DomainBatchNorm2d, num_domains=LEVELS, **named)
    other = TorchvisionHead(C, head.objectness_logits.out_channels, dims, norm).double()
    assert list(other.state_dict()) == list(head.state_dict())
    other.load_state_dict(head.state_dict())
    found, expected = (outputs_and_gradients(h.train(training), pyramid()) for h in (other, head))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.state_dict(), head.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", WEIGHT_NORMS)
@every_depth
def test_both_hosts_normalize_the_same_weights(kind, dims):
    """Beside BN on levels: the convolution is taken apart, and one weight serves all of them."""
    opts = ["MODEL.RPN.WEIGHT_NORM", kind, "MODEL.RPN.CONV_DIMS", str(dims)]
    head = make_head(*BN, *opts)
    norm = partial(DomainBatchNorm2d, num_domains=LEVELS)
    num_anchors = head.objectness_logits.out_channels
    other = TorchvisionHead(C, num_anchors, dims, norm, kind).double()
    other.load_state_dict(head.state_dict())
    found, expected = (outputs_and_gradients(h, pyramid()) for h in (other, head))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    convs = [m for m in head.conv.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight_norm for m in convs] == [kind] * len(dims)


def test_norms():
    kinds = {
        "BN": DomainBatchNorm2d, "SyncBN": DomainBatchNorm2d, "GhostBN": DomainBatchNorm2d,
        "BRN": DomainBatchNorm2d, "FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm,
    }  # fmt: skip
    for name, kind in kinds.items():
        head = make_head(*OURS, "MODEL.RPN.NORM", name, "MODEL.RPN.GHOST_SIZE", "2")
        norm = head.conv.norm
        assert type(norm) is kind, name
        if kind is DomainBatchNorm2d:
            assert (norm.group, norm.ghost_size, norm.renorm is not None) == (
                "world" if name == "SyncBN" else None, 2 if name == "GhostBN" else None,
                name == "BRN",
            )  # fmt: skip
        assert all(y.isfinite().all() for ys in head(pyramid(4)) for y in ys)


@pytest.mark.parametrize("norm", ["BN", "GhostBN"])
@pytest.mark.parametrize("statistics", reference.SHARING)
def test_jacobian(norm, statistics):
    """Images of all levels, or of one, depend on each other, in a ghost batch or in all."""
    opts = [*OURS, "MODEL.RPN.NORM", norm, "MODEL.RPN.GHOST_SIZE", "2"]
    head = make_head(*opts, *choice_opts((statistics, "shared", "shared"), "RPN"))
    xs = pyramid(4)
    index = torch.arange(4 * LEVELS)
    batch = torch.stack([index // 4, index % 4 // 2])  # level and ghost batch
    if statistics == "shared":
        batch[0] = 0
    if norm == "BN":
        batch[1] = 0
    same = (batch[:, :, None] == batch[:, None, :]).all(0)
    assert torch.equal(reference.dependence(lambda xs: head(xs)[0], xs), same)
    head.eval()
    found = reference.dependence(lambda xs: head(xs)[1], xs)
    assert torch.equal(found, torch.eye(4 * LEVELS).bool())


@pytest.mark.parametrize("num_objects", [[2, 3], [0, 0]], ids=str)
@pytest.mark.parametrize("statistics", reference.SHARING)
def test_a_step_of_a_detector(statistics, num_objects):
    model = build_model(make_cfg(*BN, *choice_opts((statistics, statistics, statistics), "RPN")))
    before = copy.deepcopy(model.proposal_generator.rpn_head.conv.norm.state_dict())
    losses = train_step(model, make_batch(num_objects))
    assert {"loss_rpn_cls", "loss_rpn_loc"} <= losses.keys()
    after = model.proposal_generator.rpn_head.conv.norm.state_dict()
    assert all(not torch.equal(v, before[k]) for k, v in after.items() if "running" in k)


def test_a_virtual_batch():
    """The EMA is of the joined batch, and so are the outputs."""
    ours = make_head(*BN)
    whole = copy.deepcopy(ours)
    xs, extra = pyramid(), pyramid(3, seed=1)
    with virtual_batch(ours, extra):
        found = ours(xs)
    joined = whole([torch.cat(pair) for pair in zip(xs, extra, strict=True)])
    expected = [[y[:2] for y in of_kind] for of_kind in joined]
    torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), whole.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("population", reference.SHARING)
def test_fused(population):
    before = build_model(make_cfg(*BN, "MODEL.RPN.BN.POPULATION", population)).eval()
    randomize(before)
    model = copy.deepcopy(before)
    assert "proposal_generator.rpn_head.conv.norm" in fuse(model).fused
    heads = [m.proposal_generator.rpn_head for m in (model, before)]
    assert isinstance(heads[0].conv, PerLevel) == (population == "per_domain")
    with torch.no_grad():
        found, expected = (head([x.float() for x in pyramid()]) for head in heads)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        inputs = make_batch([1])
        found, expected = (m(copy.deepcopy(inputs))[0]["instances"] for m in (model, before))
    assert len(found) == len(expected)


def test_sources():
    """Statistics of each source and level, in a detector that names the sources."""
    model = build_model(
        make_cfg(
            *(*BN, "MODEL.META_ARCHITECTURE", "BNGeneralizedRCNN"),
            *("MODEL.BN_SOURCES.PARTS", "['RPN']", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"),
            *("DATASETS.SOURCES", "[['a', 'x'], ['b', 'y']]"),
        )
    )
    norm = model.proposal_generator.rpn_head.conv.norm
    assert type(norm) is SourceBatchNorm2d and (norm.num_sources, norm.num_levels) == (2, LEVELS)
    inputs = make_batch([2, 1])
    for image in inputs:
        image["source"] = 1
    train_step(model, inputs)
    seen = [bool(norm.population_of(k).running_mean.any()) for k in range(2 * LEVELS)]
    assert seen == [False] * LEVELS + [True] * LEVELS


def test_statistics_of_one_part():
    parts = ["TEST.BN_STATISTICS_PARTS", "['RPN']"]
    model = build_model(make_cfg(*BN, "TEST.BN_STATISTICS", "batch", *parts))
    assert model.proposal_generator.rpn_head.conv.norm.eval_statistics == "batch"
    assert model.roi_heads.box_head.conv1.norm.eval_statistics == "population"


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["MODEL.RPN.NORM", "BN"],
            "RPN.NORM: 'BN' .*'StandardRPNHead', which has none; .* HEAD_NAME 'BNRPNHead'",
        ),
        ([*BN, "MODEL.RPN.BN.AFFINE", "x"], "MODEL.RPN.BN.AFFINE: 'x' .*'shared', 'per_domain'"),
        ([*BN, "MODEL.RPN.GHOST_ORDER", "x"], "MODEL.RPN.GHOST_ORDER: 'x' .*'contiguous'"),
        (
            ["TEST.BN_STATISTICS", "batch", "TEST.BN_STATISTICS_PARTS", "['RPN']"],
            "'batch' is not accepted for RPN, .* MODEL.RPN.HEAD_NAME in .'BNRPNHead'",
        ),
        (
            [*BN, "MODEL.META_ARCHITECTURE", "BNRetinaNet", "TEST.BN_STATISTICS", "batch"],
            "'batch' is not accepted: no part of the model",
        ),
    ],
)
def test_bad_config(opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg(*opts)


def test_unknown_norm():
    with pytest.raises(InputError, match="MODEL.RPN.NORM: 'SyncBatchNorm2d' .*'BN'"):
        build_model(make_cfg(*OURS, "MODEL.RPN.NORM", "SyncBatchNorm2d"))


def on_two_ranks(rank, opts):
    """A step of a head on this rank's images, and the statistics before and after averaging."""
    torch.manual_seed(0)
    head = make_head(*OURS, *opts)
    found = outputs_and_gradients(head, pyramid(1 + rank, seed=rank))
    statistics = {k: v.clone() for k, v in head.named_buffers() if "running" in k}
    hook = AverageStatistics([1])
    hook.trainer = type("Trainer", (), {"model": head, "iter": 0, "max_iter": 1})()
    hook.after_step()
    averaged = {k: v for k, v in head.named_buffers() if "running" in k}
    return found, statistics, averaged


@pytest.mark.parametrize("statistics", reference.SHARING)
def test_synchronized_over_processes(statistics):
    """As one process with the images of both."""
    opts = ["MODEL.RPN.NORM", "SyncBN", *choice_opts((statistics, statistics, "shared"), "RPN")]
    results = run_ranks(on_two_ranks, 2, opts)
    torch.manual_seed(0)
    whole = make_head(*OURS, "MODEL.RPN.NORM", "BN", *opts[2:])
    per_rank = [pyramid(1 + rank, seed=rank) for rank in range(2)]
    ys = whole([torch.cat(pair) for pair in zip(*per_rank, strict=True)])
    for rank, ((found, _), running, _) in enumerate(results):
        expected = [y[1:] if rank else y[:1] for of_kind in ys for y in of_kind]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for key, value in running.items():
            torch.testing.assert_close(value, whole.get_buffer(key), rtol=1e-10, atol=1e-10)


def test_average_over_processes():
    """Of statistics per level that are each process's own."""
    opts = ["MODEL.RPN.NORM", "BN", *choice_opts(("shared", "per_domain", "shared"), "RPN")]
    (_, first, averaged), (_, second, other) = run_ranks(on_two_ranks, 2, opts)
    assert len(first) == 2 * LEVELS
    for key, value in averaged.items():
        assert torch.equal(value, other[key]) and not torch.equal(first[key], second[key])
        if "mean" in key:
            torch.testing.assert_close(value, (first[key] + second[key]) / 2)


def test_a_norm_of_ones_own():
    """As LazyConfig users pass it."""
    head = BNRPNHead(in_channels=C, num_anchors=3, conv_dims=[16, 16], norm=nn.BatchNorm2d)
    assert type(head.conv.conv1.norm) is nn.BatchNorm2d
    assert not isinstance(head.conv.conv1.norm, BatchNorm2d)
    head([x.float() for x in pyramid()])
    assert head.conv.conv1.norm.num_batches_tracked == LEVELS
