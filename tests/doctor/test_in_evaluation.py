"""What layers see where population statistics normalize: estimation shift, and proposals."""

import argparse
import copy
from itertools import islice

import pytest
import torch
from torch import nn

import bn_det
from bn_det import examine
from bn_det.commands.cli import import_host
from bn_det.doctor.from_evaluation import Inputs, Watch, detections, proposal_shifts
from bn_det.doctor.losses import Losses
from bn_det.layers.moments import Moments
from bn_det.population.observation import population_layers
from hosts import build_model, every_host, make_cfg
from reference import BASE, RCNN, norm_opts


def deep(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    layers = []
    for k in range(4):
        layers += [nn.Conv2d(8 if k else 3, 8, 3, padding=1), norm(8), nn.ReLU()]
    return nn.Sequential(*layers)


def batches(number=48, seed=0, images=8):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, 3, 8, 8, generator=generator)
        + torch.randn(images, 1, 1, 1, generator=generator)
        for _ in range(number)
    ]


def loss(model, x):
    return model(x).square().mean()


def of_ema(model, images=8):
    """With the EMA that 100 batches leave of weights that do not move."""
    model.train()
    with torch.no_grad():
        for x in batches(100, 1, images):
            model(x)
    return model.eval()


def held(data):
    return data[2::3]


def inputs_of(model, data, name):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    return seen


def statistics(xs):
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in xs])
    return torch.cat(xs).mean((0, 2, 3)), variances.mean(0)


def assert_same(report, model, data):
    assert [of.name for of in report.in_evaluation] == [str(k) for k in range(1, 12, 3)]
    for of in report.in_evaluation:
        mean, var = statistics(inputs_of(model, held(data), of.name))
        layer = model.get_submodule(of.name)
        shift = ((layer.running_mean - mean).square() / var).mean().sqrt()
        assert of.mean_shift == pytest.approx(float(shift), rel=1e-3)
        shift = (layer.running_var / var - 1).square().mean().sqrt()
        assert of.var_shift == pytest.approx(float(shift), rel=1e-3)


def test_a_healthy_model():
    model = of_ema(deep())
    report = examine(model, batches(), call=loss, evaluate=True)
    assert_same(report, model, batches())
    assert [of.rule for of in report.findings] == []
    # An EMA's noise in the layers before it adds to that of a layer's own.
    own = {of.name: of.var_chance for of in report.layers}
    ratios = [of.var_chance / own[of.name] for of in report.in_evaluation]
    assert ratios == sorted(ratios) and ratios[-1] > 2 * ratios[0]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn_det.BatchNorm2d])
def test_what_the_first_layer_hands_on(norm):
    """Its statistics alone are wrong, and those of all others do not fit what they get."""
    model = of_ema(deep(norm))
    model[1].running_mean += 1.5 * model[1].running_var.sqrt()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = examine(model, batches(), call=loss, evaluate=True)
    found = {of.rule: of for of in report.findings}
    assert found["BN201"].where == ("1",)
    assert set(found["BN206"].where) > {"1"}
    # What the others do follows from it, and is no second fault.
    assert found["BN201"].severity != "note" == found["BN206"].severity
    assert found["BN206"].why.endswith(
        "; statistics that are off themselves (BN201) may be all of it"
    )
    assert found["BN206"].gain == report.tried[0].gain
    assert_same(report, model, batches())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


class TwoStages(nn.Module):
    """A head sees a few crops of each image in training, and in evaluation all of them."""

    def __init__(self, same=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.same = same

    def forward(self, x):
        features = self.backbone(x)
        return self.head(self.crops(features))

    def crops(self, features):
        crops = features.unfold(2, 4, 4).unfold(3, 4, 4)  # N, C, 2, 2, 4, 4
        crops = crops.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        if self.training and not self.same:
            crops = crops[:, :1]  # the upper left corner, which is brighter
        return crops.flatten(0, 1)


def bright_corners(number=48, seed=0, by=3.0):
    found = batches(number, seed)
    for x in found:
        x[:, :, :4, :4] += by
    return found


def of_crops(model, data=None):
    model.train()
    with torch.no_grad():
        for x in data or bright_corners(100, 1):
            model(x)
    return model.eval()


def test_proposals_of_test_time():
    torch.manual_seed(0)
    model = of_crops(TwoStages())
    report = examine(model.train(), bright_corners(), call=loss, evaluate=True)
    assert model.training
    model.eval()
    (finding,) = [of for of in report.findings if of.rule == "BN207"]
    assert finding.where == ("head.1",) and "adabn=True" in finding.treatment
    assert finding.untried.startswith("it may harm, as the head has been trained on what training")
    assert "head.1 32 a batch and not the 8 " in finding.why
    data = held(bright_corners())
    tested = inputs_of(model, data, "head.1")
    sampler = copy.deepcopy(model)
    sampler.crops = lambda features: TwoStages.crops(model.train(), features)
    (mean, var), (other, other_var) = map(statistics, (inputs_of(sampler, data, "head.1"), tested))
    shifts = (other - mean) / var.sqrt(), other_var / var - 1
    expected = max(float(shift.square().mean().sqrt()) for shift in shifts)
    assert finding.value == pytest.approx(expected, rel=1e-4)
    assert finding.severity == ("warning" if expected >= 1 else "note")


def test_proposals_that_are_like_sampled_ones():
    """Corners are as bright as the rest, or all crops are sampled."""
    for model, by in ((TwoStages(), 0.0), (TwoStages(same=True), 3.0)):
        model = of_crops(model, bright_corners(100, 1, by))
        report = examine(model, bright_corners(by=by), call=loss, evaluate=True)
        assert "BN207" not in [of.rule for of in report.findings]


def test_a_model_that_fails_in_evaluation():
    """After its layers have run, or before: then there is nothing to tell."""
    torch.manual_seed(0)
    model = of_crops(TwoStages())

    def late(model, x):
        y = loss(model, x)
        return y if model.training else dict(y)

    def early(model, x):
        assert model.training
        return loss(model, x)

    for call, found in ((late, True), (early, False)):
        report = examine(model, bright_corners(), call=call, evaluate=True)
        assert ("BN207" in [of.rule for of in report.findings]) == found
        assert not model.training


@every_host
def test_proposals_of_a_detector(host, tiny_shapes, tmp_path, one_thread):
    """In the box head alone, on the same images, test time's proposals are seen; and the target."""
    small = [*tiny_shapes, "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path)]
    small += [*RCNN, *norm_opts("BN"), "MODEL.MASK_ON", "False", "DATASETS.TEST", "()"]
    model = build_model(host, make_cfg(host, BASE, *small))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "MODEL.DEVICE", "cpu"]
    args = argparse.Namespace(
        config_file=BASE, opts=[*small, *weights], target="tiny_val",
        eval_only=True, resume=False, num_gpus=1, num_machines=1,
    )  # fmt: skip
    doctor = import_host(host, "doctor")
    of = doctor.load(args, doctor.setup(args))
    losses = Losses(of.model, of.call, list(islice(of.batches, 2)))
    trained = Watch(of.model, population_layers(of.model.train()))
    losses.of(trained)
    detected = detections(losses, trained)
    heads = [place.name for place in trained.places if "box_head" in place.name]
    assert [of.name for of in proposal_shifts(Inputs(trained, trained, [], detected))] == heads
    for k, place in enumerate(trained.places):
        for a, b in zip(trained.passes, detected.passes, strict=True):
            if place.name in heads:
                assert a.samples[k] == 64 and 64 < b.samples[k] <= 100
            else:
                torch.testing.assert_close(Moments.merge(a.batches[k]), Moments.merge(b.batches[k]))
    assert len(list(islice(of.target, 3))) == 3
    assert of.model.training
