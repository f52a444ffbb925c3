"""A plain training loop with torchvision's detectors."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn_v2,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
    ssdlite320_mobilenet_v3_large,
)

import bn_det
import snippets

SIZES = {"min_size": 64, "max_size": 64}
FEW = {"box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 16}
MAKERS = {
    "ssdlite": (ssdlite320_mobilenet_v3_large, {}, 70),
    "fcos": (fcos_resnet50_fpn, SIZES, 53),
    "fasterrcnn_v2": (fasterrcnn_resnet50_fpn_v2, {**SIZES, **FEW}, 65),
    "retinanet_v2": (retinanet_resnet50_fpn_v2, SIZES, 53),
}


def make(name):
    maker, choices, number = MAKERS[name]
    return maker(weights=None, weights_backbone=None, num_classes=4, **choices).train(), number


def make_loader(number=2):
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    return [([torch.rand(3, 64, 64) for _ in range(2)], [target] * 2) for _ in range(number)]


@pytest.mark.parametrize("name", MAKERS)
def test_freeze_tune_step_and_recompute(name):
    (model, number), loader = make(name), make_loader()
    report = bn_det.update_bn_stats(model, loader, 2)
    assert len(report.layers) == number and not report.left
    bn_det.freeze(model, "backbone.*")
    of_backbone = [x for x, layer in model.named_modules() if type(layer) is bn_det.FrozenBatchNorm]
    assert bn_det.tune(model).tuned == of_backbone
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    sum(model(*loader[0]).values()).backward()
    optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    running = {key.rpartition(".")[0] for key in moved if "running_" in key}
    assert running == {of.name for of in bn_det.states(model).layers} - set(of_backbone)
    assert any(key.startswith("backbone") for key in moved)  # convolutions train


def test_what_the_doctor_says():
    torch.manual_seed(0)
    (model, _), loader = make("ssdlite"), make_loader(3)
    bn_det.update_bn_stats(model, loader, 3)
    assert (
        snippets.rules(bn_det.examine(model, loader)) == snippets.shown_rules("torchvision_loop")[0]
    )


def test_the_page():
    """Its statistics are those of the images, without targets, as the last block makes them."""
    names = snippets.run("torchvision_loop")
    model = names["model"]
    first = model.backbone.features[0][0]
    conv, norm = first[0], first[1]
    assert type(norm) is nn.BatchNorm2d and not norm.training
    with torch.no_grad():
        seen = torch.cat(
            [conv(model.transform(images)[0].tensors) for images, _ in names["loader"]]
        )
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert len(names["model"](names["loader"][0][0])) == 4
