"""Teacher and student: averaged weights, two BN states, unlabelled batches of another domain."""

import copy
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bn_det
import snippets
from bn_det.errors import InputError
from bn_det.training import Monitor
from teacher_and_student import Data, Detector, make, train


def call(model, batch):
    return model(*batch)


@pytest.fixture(scope="module")
def trained():
    """Student, teacher, labelled batches, and unlabelled images."""
    torch.manual_seed(0)
    data, (student, teacher) = Data(), make()
    train(student, teacher, data, 60)
    labelled = [data.labelled() for _ in range(12)]
    return student, teacher, labelled, [data.unlabelled()[0] for _ in range(12)]


@torch.no_grad()
def right(model, data):
    model.eval()
    found = [(model(images).argmax(1) == labels).sum() for images, labels in data]
    return int(sum(found))


def test_what_the_doctor_says(trained):
    student, teacher, labelled, unlabelled = trained
    of_teacher, of_student = snippets.shown_rules("teacher_and_student")
    report = bn_det.examine(teacher, labelled, call=call)
    assert snippets.rules(report) == of_teacher and report.verdict.count("initial=True") == 1
    # Without it update_bn_stats would refuse, of every finding that prescribes it.
    for finding in report.findings:
        assert ("update_bn_stats" in finding.treatment) == ("initial=True" in finding.treatment)
    images = [images for images, _ in labelled]
    assert snippets.rules(bn_det.examine(student, images, target=unlabelled)) == of_student


def test_two_passes_a_step(trained, caplog):
    student, teacher = copy.deepcopy(trained[:2])
    monitor, data = Monitor(8), Data(1)
    said = {}
    monitor.trainer = SimpleNamespace(
        model=student, max_iter=8, iter=0, put_scalars=lambda scalars: said.update(scalars)
    )
    with caplog.at_level(logging.INFO, "bn_det"):
        for monitor.trainer.iter in range(8):
            monitor.before_step()
            train(student, teacher, data, 1)
            monitor.after_step()
        monitor.after_train()
    assert said["bn_monitor/non_finite"] == 0 and "bn_monitor/staleness" in said
    assert "2 passes a step, each with a normalization batch of its own" in caplog.text


def test_statistics_of_a_teacher(trained):
    """Recomputed ones are those of the images, on the weights as they are."""
    _, teacher, labelled, unlabelled = copy.deepcopy(trained)
    with pytest.raises(InputError, match="they have never been updated, then say initial=True"):
        bn_det.update_bn_stats(teacher.train(), unlabelled, 12)
    bn_det.update_bn_stats(teacher.train(), unlabelled, 12, initial=True)
    first = torch.cat([teacher.backbone.stem[0](images) for images in unlabelled])
    norm = teacher.backbone.stem[1]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())
    # They are not those of the labelled images.
    teacher.eval()
    of = {of.rule: of.severity for of in bn_det.examine(teacher, labelled, call=call).findings}
    assert of == {"BN201": "error"}


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_of_torch(use_buffers, trained):
    student, _, labelled, _ = copy.deepcopy(trained)
    averaged = AveragedModel(
        student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
    )
    student.backbone.stem[1].running_mean += 1
    averaged.update_parameters(student)
    averaged.update_parameters(student)
    report = bn_det.update_bn_stats(averaged.train(), labelled, 4, call=call)
    assert report.layers[0].name == "module.backbone.stem.1"
    assert not {"BN101", "BN402"} & {of.rule for of in bn_det.examine(averaged).findings}


def test_two_states(trained):
    """Each pass moves the statistics of its own domain, and the teacher reads those of its."""
    student, teacher, labelled, unlabelled = copy.deepcopy(trained)
    for model in (student, teacher):
        bn_det.convert_batchnorm(model, partial(bn_det.SourceBatchNorm2d, num_sources=2))
    student.train()
    norm = student.backbone.stem[1]
    before = norm.population_of(0).running_mean.clone()
    with bn_det.image_sources([1] * 8):
        student(unlabelled[0])
    assert torch.equal(norm.population_of(0).running_mean, before)
    assert not torch.equal(norm.population_of(1).running_mean, before)
    with pytest.raises(InputError, match="the images have no sources: name the sources of a batch"):
        student(labelled[0][0])
    with torch.no_grad():
        for a, b in zip(teacher.buffers(), student.buffers(), strict=True):
            a.copy_(b)
    same = Detector().eval()
    with bn_det.image_sources([1] * 8):
        found = teacher.eval()(unlabelled[0])
    same.load_state_dict(teacher.state_dict(), strict=False)
    for name, layer in same.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            own = teacher.get_submodule(name).population_of(1)
            layer.running_mean.copy_(own.running_mean)
            layer.running_var.copy_(own.running_var)
    torch.testing.assert_close(found, same(unlabelled[0]))


def test_the_strong_pass_is_not_remembered(trained):
    student, teacher, _, unlabelled = copy.deepcopy(trained)
    student.train()
    before = copy.deepcopy(student.state_dict())
    with bn_det.no_population_update(student):
        student(unlabelled[0])
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    refused = pytest.raises(InputError, match="unchanged_statistics: backbone.stem.1.running_mean")
    with refused, bn_det.unchanged_statistics(teacher.train()):
        teacher(unlabelled[0])


def test_the_page():
    names = snippets.run("teacher_and_student")
    assert names["student"][1].num_sources == names["teacher"][1].num_sources == 2
