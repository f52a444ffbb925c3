"""Two hospitals on torchvision's fasterrcnn_resnet50_fpn_v2."""

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

import bn_det
import snippets


def make():
    return fasterrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64,
        box_batch_size_per_image=8, rpn_post_nms_top_n_train=16, rpn_post_nms_top_n_test=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    return snippets.run("two_hospitals")


def test_each_hospital_has_its_statistics(page):
    model, loader = page["model"], page["loader"]
    states = bn_det.states(model).layers
    assert {of.kind for of in states} == {"bn_det.SourceBatchNorm2d"} and len(states) == 65
    conv, norm = model.backbone.body.conv1, model.backbone.body.bn1
    for k in range(2):
        images = [model.transform(images[2 * k : 2 * k + 2])[0].tensors for images, *_ in loader]
        seen = conv(torch.cat(images)).mean((0, 2, 3))
        found = norm.population_of(k).running_mean
        torch.testing.assert_close(found, seen, rtol=1e-4, atol=1e-4)
    # The RoIs of the first BatchNorm in the head are of both, and differ.
    of_rois = model.roi_heads.box_head[0][1]
    assert not torch.allclose(of_rois.population_of(0).running_mean,
                              of_rois.population_of(1).running_mean)  # fmt: skip
    assert len(page["detections"]) == 1


def test_a_stock_checkpoint(page):
    """Each source begins with its statistics."""
    stock = make()
    stock.backbone.body.bn1.running_mean.uniform_()
    stock.roi_heads.box_head[0][1].running_var.uniform_()
    model = page["model"]
    model.load_state_dict(stock.state_dict())
    for k in range(2):
        found = model.backbone.body.bn1.population_of(k).running_mean
        assert torch.equal(found, stock.backbone.body.bn1.running_mean)
        found = model.roi_heads.box_head[0][1].population_of(k).running_var
        assert torch.equal(found, stock.roi_heads.box_head[0][1].running_var)


def of_one_hospital(page):
    """A stock model with statistics, and batches of one hospital each."""
    torch.manual_seed(0)
    loader = [page["batch"]([k % 2] * 3) for k in range(8)]
    model = make().train()
    bn_det.update_bn_stats(model, loader, 8, call=page["call"])
    return model, loader


def test_what_the_doctor_says(page):
    model, loader = of_one_hospital(page)
    report = bn_det.examine(model, loader, call=page["call"])
    assert snippets.rules(report) == snippets.shown_rules("two_hospitals")[0]
    of_sources = next(of for of in report.findings if of.rule == "BN202")
    assert "2 sources of images" in of_sources.why
    assert "bn_det.SourceBatchNorm2d" in of_sources.treatment
