"""Models of which something is wrong on images, and what is found; nothing of them changes."""

import copy
import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

import bn_det
from bn_det import DomainBatchNorm2d, convert_batchnorm, examine
from bn_det.doctor import Step
from bn_det.doctor.shares import between_sources, share_of
from bn_det.errors import InputError
from bn_det.layers.moments import Moments


def classifier(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 16, 3), norm(16), nn.ReLU()
    )


def batches(number=32, seed=0):
    """Of images that differ from each other in brightness, by a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(8, 3, 12, 12, generator=generator)
        + torch.randn(8, 1, 1, 1, generator=generator)
        for _ in range(number)
    ]


@pytest.fixture
def model():
    """With the EMA that 200 batches leave of weights that do not move."""
    torch.manual_seed(0)
    model = classifier().train()
    with torch.no_grad():
        for x in batches(200, seed=1):
            model(x)
    return model.eval()


def rules(report, severity=("error", "warning")):
    return [of.rule for of in report.findings if of.severity in severity]


def test_healthy(model):
    report = examine(model, batches())
    assert rules(report) == []
    assert report.verdict.startswith("nothing is wrong with its 2 BatchNorm layers")
    assert [of.name for of in report.layers] == ["1", "4"]
    for of in report.layers:
        assert of.worst is None and of.share is None and of.calls == 1
        # Of 8 images whose brightness varies the mean varies by about 1 / sqrt(2 * 8).
        assert 0.02 < of.noise < 0.3 and of.mean_chance < of.noise


@pytest.mark.parametrize("key", ["running_mean", "running_var"])
def test_stale(key, model):
    buffer = getattr(model[4], key)
    buffer += 1.5 * model[4].running_var.sqrt() if key == "running_mean" else 2 * buffer
    (finding,) = [of for of in examine(model, batches()).findings if of.severity != "note"]
    assert finding.rule == "BN201" and finding.where == ("4",)
    # By 1.5 standard deviations; a variance that is threefold is off by 2 of its own.
    expected = {"running_mean": 1.5, "running_var": 2.0}[key]
    assert finding.value == pytest.approx(expected, rel=0.15)
    assert finding.severity == "error" and 0 < finding.standard_error < 0.2


def test_weights_that_are_not_finite(model):
    """The passes fail, and what the state shows is told."""
    with torch.no_grad():
        model[1].weight[2] = math.nan
    report = examine(model, batches())
    assert rules(report) == ["BN107"]
    assert "nothing was seen on images: " in report.verdict and "4: its input" in report.verdict


def test_frozen_statistics_are_constants(model):
    """Those of a pre-trained backbone fit its weights, and not the images of a detector."""
    bn_det.freeze(model)
    model[1].running_mean += 5
    assert rules(examine(model, batches())) == []


def test_the_treatment_mends(model):
    model[4].running_mean += 5
    (finding,) = [of for of in examine(model, batches()).findings if of.rule == "BN201"]
    code, _, _ = finding.treatment.rpartition(", with")
    eval(code, {"bn_det": bn_det, "model": model, "batches": batches()})
    assert rules(examine(model, batches(seed=5))) == []


class Levels(nn.Module):
    """A head that three levels share; they are as bright as each other, or not."""

    def __init__(self, norm, offset):
        super().__init__()
        self.norm, self.offset = norm, offset

    def forward(self, x):
        levels = [x[..., :k, :k] + k * self.offset for k in (12, 6, 3)]
        is_list = isinstance(self.norm, DomainBatchNorm2d)
        return self.norm(levels) if is_list else [self.norm(level) for level in levels]


def trained(head):
    with torch.no_grad():
        for x in batches(100, seed=2):
            head.train()(x)
    return head


def test_levels_that_differ_and_share_statistics():
    report = examine(trained(Levels(nn.BatchNorm2d(3), 0.5)), batches())
    (finding,) = [of for of in report.findings if of.rule == "BN202"]
    assert finding.where == ("norm",) and "3 times" in finding.why
    # Their offsets 6, 3 and 1.5 are weighted by 144, 36 and 9 values; images have variance 2.
    weights, offsets = torch.tensor([144.0, 36.0, 9.0]) / 189, torch.tensor([6.0, 3.0, 1.5])
    between = (weights * (offsets - (weights * offsets).sum()).square()).sum()
    assert finding.value == pytest.approx(float(between / (between + 2)), rel=0.1)
    assert "per_domain" in finding.treatment


class TwoLevels(nn.Module):
    """One layer for half of the images, and for the other half, which are brighter by 2 d."""

    def __init__(self, norm, d):
        super().__init__()
        self.norm, self.d = norm, d

    def forward(self, x):
        darker, brighter = x.chunk(2)
        return [self.norm(darker - self.d), self.norm(brighter + self.d)]


@pytest.mark.parametrize("d, severity", [(1 / 12, "note"), (0.3, "warning")])
def test_levels_that_differ_by_less_than_an_ema_is_off(d, severity):
    """The mean of 4 images is off by 1 / 12, and so are the statistics of the last batch."""
    generator = torch.Generator().manual_seed(5)
    many = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(300)]
    head = TwoLevels(nn.BatchNorm2d(3, momentum=1.0), d)
    with torch.no_grad():
        head.train()(many[0])
    report = examine(head, many, num_iters=300)
    assert report.layers[0].mean_chance == pytest.approx(1 / 12, rel=0.2)
    (finding,) = [of for of in report.findings if of.rule == "BN202"]
    assert finding.severity == severity
    assert ("less than an EMA is off by chance" in finding.why) == (severity == "note")


def test_levels_that_one_layer_normalizes_each_by_itself():
    """As called once for each: statistics are not shared in training, and are at test time."""
    norm = DomainBatchNorm2d(3, 3, statistics="per_domain", population="shared")
    once = trained(Levels(norm, 0.5))
    often = trained(Levels(nn.BatchNorm2d(3), 0.5))
    findings = [
        next(of for of in examine(head, batches()).findings if of.rule == "BN202")
        for head in (once, often)
    ]
    assert findings[0].value == pytest.approx(findings[1].value, rel=1e-5)
    assert findings[0].severity == findings[1].severity and "3 times" in findings[0].why


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("is_list", [False, True])
def test_an_ema_that_levels_move_in_turn(is_list, momentum):
    """Each level counts in it as often, however large, and the last one most: it is not stale."""
    choices = {"statistics": "per_domain", "population": "shared", "momentum": momentum}
    norm = DomainBatchNorm2d(3, 3, **choices) if is_list else nn.BatchNorm2d(3, momentum=momentum)
    head = trained(Levels(norm, 0.5))
    (of,) = examine(head, batches()).layers
    assert of.worst is None and of.mean_shift > 0
    # The variance of an image's mean over 8 images is 1 / 8, and each value's is 2.
    decay = 1 if momentum is None else 1 - momentum
    weights = torch.tensor([decay**2, decay, 1.0]) / (decay**2 + decay + 1)
    expected = float(weights @ torch.tensor([6.0, 3.0, 1.5]))
    assert head.norm.running_mean.mean().item() == pytest.approx(expected, abs=0.6)
    noise = (1 / 8 / 2) ** 0.5
    m = 2 / 33 if momentum is None else 1 - decay**3
    assert of.mean_chance == pytest.approx(noise * (m / (2 - m) + 1 / 32) ** 0.5, rel=0.4)
    norm.running_mean += 10 * of.mean_chance * norm.running_var.sqrt()
    assert rules(examine(head, batches()))[0] == "BN201"


def test_levels_that_do_not_differ_or_do_not_share():
    assert "BN202" not in rules(examine(trained(Levels(nn.BatchNorm2d(3), 0.0)), batches()))
    for choices in ({"population": "per_domain"}, {"statistics": "shared", "population": "shared"}):
        head = trained(Levels(DomainBatchNorm2d(3, 3, **choices), 0.5))
        assert rules(examine(head, batches())) == []


def of_two_sources(offset, mixed):
    """Batches with the sources of their images; those of source 1 are brighter."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for k in range(32):
        sources = [j % 2 if mixed else k % 2 for j in range(8)]
        x = torch.randn(8, 3, 6, 6, generator=generator)
        found.append((x + offset * torch.tensor(sources).view(-1, 1, 1, 1), sources))
    return found


def call_with_sources(model, batch):
    images, sources = batch
    with bn_det.image_sources(sources):
        return model(images)


@pytest.mark.parametrize("mixed, severity", [(False, "warning"), (True, "note")])
def test_sources_that_share_statistics(mixed, severity):
    model = nn.Sequential(nn.BatchNorm2d(3))
    report = examine(model, of_two_sources(2.0, mixed), call=call_with_sources)
    (finding,) = [of for of in report.findings if of.rule == "BN202"]
    # Their means are 1 from the mean of both, and their variances 1.
    assert finding.value == pytest.approx(0.5, abs=0.02) and finding.severity == severity
    assert "2 sources of images" in finding.why and "SourceBatchNorm2d" in finding.treatment
    own = nn.Sequential(bn_det.SourceBatchNorm2d(3, 2))
    for batches, net in ((of_two_sources(0.0, mixed), model), (of_two_sources(2.0, mixed), own)):
        report = examine(net, batches, call=call_with_sources)
        assert "BN202" not in [of.rule for of in report.findings]


def test_the_share_between_sources():
    """Against all values at once, and the jackknife's error against what varies."""

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            [torch.randn(40, 2, generator=generator, dtype=torch.float64) + k for k in range(2)]
            for _ in range(20)
        ]

    found = []
    for seed in range(60):
        values = drawn(seed)
        of_sources = [torch.cat(of) for of in zip(*values, strict=True)]
        means = torch.stack([of.mean(0) for of in of_sources])
        between = means.var(0, correction=0)
        plain = (between / torch.cat(of_sources).var(0, correction=0)).mean()
        share, error = between_sources([[Moments.of(x) for x in of] for of in values])
        assert share == pytest.approx(float(plain), abs=error)
        found.append((share, error))
    shares, errors = torch.tensor(found).T
    assert float(errors.mean()) == pytest.approx(float(shares.std()), rel=0.3)


def flat(images, number=32):
    """Batches of images, each of one brightness: as many independent values as images."""
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(images, 3, 1, 1, generator=generator).expand(-1, -1, 7, 7)
        for _ in range(number)
    ]


def test_noise_of_a_normalization_batch():
    data = flat(4)
    (finding,) = [of for of in examine(nn.BatchNorm2d(3), data).findings if of.rule == "BN203"]
    means = torch.stack([x.mean((0, 2, 3)) for x in data])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in data])
    noise = (means.var(0) / variances.mean(0)).mean()
    assert finding.severity == "note"
    assert finding.value == pytest.approx(float(1 + 1 / noise), rel=1e-3)
    assert finding.value == pytest.approx(4, abs=2 * finding.standard_error)


@pytest.mark.parametrize(
    "norm, data, is_noisy",
    [
        (nn.BatchNorm2d(3), flat(32), False),
        (nn.BatchNorm2d(3), [torch.randn(4, 3, 7, 7) for _ in range(32)], False),
        (bn_det.BatchNorm2d(3, ghost_size=2), flat(32), True),
    ],
)
def test_what_a_normalization_batch_is(norm, data, is_noisy):
    report = examine(norm, data)
    assert ("BN203" in [of.rule for of in report.findings]) == is_noisy
    assert report.layers[0].calls == (16 if is_noisy else 1)


def of_modules(model):
    return {of.rule: of for of in examine(model).findings if of.rule.startswith("BN4")}


def test_frozen_by_half(model):
    model.train()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    finding = of_modules(model)["BN401"]
    assert finding.where == ("1",) and "bn_det.freeze" in finding.treatment
    bn_det.freeze(model, "1")
    assert of_modules(model) == {}


def test_a_part_whose_weights_do_not_train():
    """Its layers have no affine that would say so."""
    part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(part, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert "BN401" not in of_modules(model)
    part.requires_grad_(False)
    assert of_modules(model)["BN401"].where == ("0.1",)
    assert "BN401" not in of_modules(model.eval())


def test_counters_that_the_passes_explain():
    """As many calls a pass: a note; as nobody has called it so often: a warning."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model.append(Levels(nn.BatchNorm2d(3), 0.0))
    found = [of for of in examine(trained(model), batches()).findings if of.rule == "BN112"]
    assert [(of.where, of.severity) for of in found] == [(("3.norm",), "note")]
    assert found[0].why.endswith("a pass calls them 3 times")
    model[3].norm.num_batches_tracked *= 2
    found = [of for of in examine(model, batches()).findings if of.rule == "BN112"]
    assert [of.severity for of in found] == ["warning"]


def test_without_initial_update_bn_stats_would_refuse():
    """What it prescribes of a layer whose statistics have never moved is accepted."""
    model = classifier()
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.weight, 0.5, 2.0)
    found = {of.rule: of.treatment for of in examine(model, batches()).findings}
    assert {"BN101", "BN201"} <= set(found)
    assert "initial=True" in found["BN101"] and "initial=True" in found["BN201"]


def test_evaluation_mode_that_is_undone(model):
    model.train()[4].eval()
    assert of_modules(model)["BN402"].where == ("4",)
    around = nn.ModuleDict({"part": model.eval(), "head": nn.BatchNorm2d(16).train()})
    assert around.training and of_modules(around)["BN402"].where == ("part.1", "part.4")
    assert of_modules(model.train()) == of_modules(model.eval()) == {}
    whole = nn.Sequential(model, nn.BatchNorm2d(16)).train()
    whole[0].eval()  # all of a part, down to the layers
    assert of_modules(whole)["BN402"].where == ("0.1", "0.4")


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.0])
def test_a_decay_for_a_momentum(momentum, model):
    for layer in (model[1], model[4]):
        layer.momentum = momentum
    found = of_modules(model)
    assert list(found) == ["BN403"] and f"momentum {momentum:g}" in found["BN403"].why
    assert found["BN403"].where == ("1", "4")
    assert "mended by bn_det.update_bn_stats" in found["BN403"].treatment


def test_mixed(model):
    model.append(nn.BatchNorm2d(16, eps=1e-3))
    assert of_modules(model)["BN404"].where == ("6",)
    assert "0.001" in of_modules(model)["BN404"].why
    model[6].eps, model[6].momentum = 1e-5, None
    assert "BN404" not in (found := of_modules(model)) and found["BN405"].where == ("6",)


def test_between_share():
    """Against the law of total variance, in float64."""
    parts = [torch.randn(n, 3, 4, 4, dtype=torch.float64) * n + n for n in (2, 3, 5)]
    whole = torch.cat(parts)
    within = sum(p.numel() / whole.numel() * p.var((0, 2, 3), correction=0) for p in parts)
    expected = (1 - within / whole.var((0, 2, 3), correction=0)).mean()
    found = share_of([[Moments.of(p) for p in parts]] * 2)
    assert math.isclose(found.share, float(expected), rel_tol=1e-9)
    assert (found.calls, found.passes, found.error, found.by_noise) == (3, 2, 0, 0)
    assert share_of([[Moments.of(torch.ones(2, 3, 2, 2))] * 2] * 2).share == 0.0


def test_models_of_which_no_layer_is_updated():
    """The state alone is spoken of."""
    frozen = bn_det.freeze(nn.Sequential(nn.BatchNorm2d(8)))[0]
    for norm in (nn.InstanceNorm2d(8, track_running_stats=True), frozen):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
        assert "fit the weights" not in examine(model, batches()).verdict
    lazy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d())
    assert examine(lazy).verdict.startswith("the model has no BatchNorm")


def test_folded_layers_that_are_frozen(model):
    """Right as they are, and no layers that have not been trained, though they have counters."""
    folded = nn.BatchNorm2d(16)
    nn.init.uniform_(folded.weight)
    model[4] = folded
    assert "BN101" in rules(examine(model))
    bn_det.freeze(model, "4")
    assert rules(examine(model)) == []
    assert [of.rule for of in examine(model).findings] == ["BN103"]
    nn.init.ones_(folded.weight)
    assert rules(examine(model)) == ["BN102"]


def test_a_model_without_statistics_is_not_a_fused_file():
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)])
    assert examine(model).findings == []


def test_without_images(model):
    assert examine(model).verdict.startswith("nothing is wrong with the state of its 2")
    model[1].running_var[3] = math.nan
    assert rules(examine(model)) == ["BN107"]
    assert examine(nn.Conv2d(3, 3, 1), batches()).verdict.startswith("the model has no BatchNorm")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(model, fails):
    model[1].train()  # modes that differ
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    number = itertools.count()

    def call(model, x):
        y = model(x)
        if fails and next(number) == 3:
            raise RuntimeError("out of luck")
        return y

    with pytest.raises(RuntimeError, match="out of luck") if fails else nullcontext():
        examine(model, batches(), call=call)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert attributes == [dict(vars(m)) for m in model.modules()]
    assert random.equal(torch.get_rng_state())


def test_a_detector_that_is_called_otherwise():
    """torchvision's, whose BatchNorm of a new model has never seen data."""
    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    data = [[torch.rand(3, 64, 64) for _ in range(2)] for _ in range(3)]
    report = examine(model, data, call=lambda m, images: m(images, [target] * len(images)))
    assert rules(report) == ["BN201", "BN105", "BN502"]  # of batches of two images
    assert len(report.findings[1].where) == len(report.findings[2].where) == 53


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_iters": 0}, "num_iters: 0 is not accepted"),
        ({"rules": ["BN9"]}, "rules: 'BN9' is not accepted"),
        ({"rules": None}, "rules: None is not accepted; use ids of rules, such as"),
        ({"rules": "BN201"}, "rules: 'BN201' is not accepted; use ids"),
        ({"progress": "bar"}, "progress: 'bar' is not accepted; use one of"),
        ({"batches": []}, "^batches: has ended after 0 of 32 batches"),
        ({"batches": batches(1)}, "batches: one is too few"),
        ({"call": lambda model, x: x}, "reaches none of its BatchNorm layers"),
    ],
)
def test_what_cannot_be_examined(model, kwargs, words):
    with pytest.raises(InputError, match=words):
        examine(model, **{"batches": batches(), **kwargs})


def test_a_model_without_values():
    model = classifier().to("meta")
    with pytest.raises(
        InputError, match=r"model: on the meta device, .* value: 0.weight and 1. more; load"
    ):
        examine(model)


def test_depth_is_the_order_of_calls():
    """Not that in which modules were made: a pyramid is often made before its backbone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.last(2 * self.first(x) + 1)

    torch.manual_seed(0)
    model = Net().train()
    source, target = ([torch.randn(4, 3, 8, 8) + k for _ in range(12)] for k in (0, 1))
    for x in source * 5:
        model(x)
    report = examine(model, source, call=lambda m, x: m(x).square().mean(), target=target)
    assert [of.name for of in report.layers] == ["first", "last"]
    assert [of.name for of in report.on_target] == ["first", "last"]
    (found,) = [of for of in report.findings if of.rule == "BN205"]
    assert "the first that differs is first" in found.why
    report = examine(model, source, call=lambda m, x: m(x).square().mean(), evaluate=True)
    assert [of.name for of in report.in_evaluation] == ["first", "last"]

    def sometimes(model, x):
        y = model(x)
        return model.unused(y) if x.mean() > 0 else y

    report = examine(model, [x - x.mean() + 0.1 * (k > 1) for k, x in enumerate(source)],
                     call=sometimes)  # fmt: skip
    assert [of.name for of in report.layers] == ["first", "last", "unused"]


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_training_of_smaller_batches(synchronized):
    """The EMA of batches of two varies as these do, where it is told that they are of two."""
    found = {False: [], True: []}
    for seed in range(4):
        torch.manual_seed(seed)
        model = classifier().train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in batches(200, seed):
                model(x[torch.randperm(8, generator=generator)[:2]])
        if synchronized:  # by its name: then it is of eight, and lags
            model = convert_batchnorm(model, nn.SyncBatchNorm)
        for told in found:
            report = examine(model, batches(seed=9), step=Step(4, 1, 2 / 8) if told else None)
            found[told] += [of for of in report.findings if of.rule == "BN201"]
    assert found[False] and bool(found[True]) == synchronized


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"step": Step(processes=0)}, "step: processes 0 is not accepted; use a number above 0"),
        ({"step": Step(share=math.nan)}, "step: share nan is not accepted"),
        ({"score": float}, "score: it is not accepted without evaluate or treat"),
    ],
)
def test_what_is_no_step_or_asks_for_no_score(model, kwargs, words):
    with pytest.raises(InputError, match=words):
        examine(model, batches(), **kwargs)


def test_the_start_is_no_fault_of_statistics_that_fit():
    """Recomputed after twenty batches: the counter is as it was."""
    torch.manual_seed(0)
    model = classifier().train()
    with torch.no_grad():
        for x in batches(20, seed=1):
            model(x)
    assert "BN106" in rules(examine(model, batches()))
    bn_det.update_bn_stats(model, batches(), allow_short=True)
    report = examine(model, batches())
    assert rules(report) == [] and "BN106" in rules(report, ("note",))


def test_each_cure_beside_new_statistics_is_initial():
    """As without it statistics of the others would look folded."""
    torch.manual_seed(0)
    model = classifier()
    nn.init.normal_(model[1].weight)
    model[4].running_var[0] = -1.0
    model[4].num_batches_tracked += 100
    found = {of.rule: of for of in examine(model).findings}
    assert found.keys() >= {"BN101", "BN108"}
    assert "initial=True" in found["BN108"].treatment and found["BN108"].untried
    bn_det.update_bn_stats(model.train(), batches(), allow_short=True, initial=True)
