"""Detectors with weight normalizations, normalizer-free backbones and dropout, on both hosts."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import hosts
from bn_det.config.nf import first_norm
from bn_det.config.parts import PARTS, has_our_batch_norm
from bn_det.errors import InputError
from bn_det.training.agc import PREDICTORS
from hosts import every_host
from reference import BASE, RCNN, dependence, norm_opts

pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

RETINANET_NF = ["MODEL.BACKBONE.NAME", "build_nf_retinanet_resnet_fpn_backbone"]
RCNN_NF = [*RCNN, "MODEL.BACKBONE.NAME", "build_nf_resnet_fpn_backbone"]
TINY = ["MODEL.NF.NAME", "test_nfnet", "MODEL.NF.DROP_PATH_RATE", "0.1"]
SMALL_IMAGES = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"),
    *("SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0"),
    *("DATASETS.TEST", "()", "SOLVER.AGC.ENABLED", "True"),
]


def weight_norm_opts(kind, *parts):
    return [o for part in parts for o in (f"MODEL.{part}.WEIGHT_NORM", kind)]


PARTS_OF = {
    "retinanet": [*RETINANET_NF, *weight_norm_opts("ScaledWS", "FPN", "RETINANET")],
    "rcnn": [
        *RCNN_NF,
        *weight_norm_opts("ScaledWS", "FPN", "RPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"),
    ],
}


def make_cfg(host, *opts):
    return hosts.make_cfg(host, BASE, *opts)


def build(host, *opts):
    return hosts.build_model(host, make_cfg(host, *opts))


def make_trainer(host, cfg):
    if host == "torchvision":
        from bn_det.tv.trainer import Trainer
    else:
        from bn_det.d2 import register_datasets
        from bn_det.d2.train import Trainer

        register_datasets(cfg)
    return Trainer(cfg)


@every_host
@pytest.mark.parametrize("detector", PARTS_OF)
def test_a_training_step(host, detector, tiny_shapes, tmp_path):
    """Of a detector without any norm: every weight gets a gradient."""
    opts = [*PARTS_OF[detector], *norm_opts(""), *TINY, *SMALL_IMAGES, *tiny_shapes]
    cfg = make_cfg(host, *opts, "OUTPUT_DIR", str(tmp_path))
    assert not any(has_our_batch_norm(cfg, part) for part in PARTS)
    trainer = make_trainer(host, cfg)
    model = trainer.model
    assert first_norm(model) == ""
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if p.grad.any():  # not behind a gain of 0, which moves first
            assert not torch.equal(p, before[name]), name
    assert any(p.grad.any() for n, p in model.named_parameters() if n.endswith("conv3.gain"))
    # What has been saved is loaded by name.
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert any(name.endswith(".gain") for name in state)
    assert not any("parametrizations" in name for name in state)
    model.load_state_dict(state)


@every_host
@pytest.mark.parametrize("detector", PARTS_OF)
def test_images_do_not_depend_on_each_other(host, detector):
    """The Jacobian test, of the pyramid of a whole backbone in training mode."""
    model = build(host, *PARTS_OF[detector], *norm_opts(""), "MODEL.NF.NAME", "test_nfnet")
    backbone = model.backbone.double().train()
    for name, p in backbone.named_parameters():
        if name.endswith("gain"):
            nn.init.ones_(p)
    names = sorted(backbone(torch.zeros(1, 3, 64, 64).double()))
    found = dependence(lambda xs: [backbone(xs[0])[names[0]]], [torch.randn(3, 3, 64, 64).double()])
    assert torch.equal(found, torch.eye(3, dtype=torch.bool))
    assert len(names) == 5


HIDDEN = {
    "retinanet": {"FPN": 3 + 3 + 2, "RETINANET": 2 * 2},
    "rcnn": {"FPN": 4 + 4, "RPN": 1, "ROI_BOX_HEAD": 2 + 1, "ROI_MASK_HEAD": 2 + 1},
}


@every_host
@pytest.mark.parametrize("kind", ["WS", "ScaledWS", "WN"])
@pytest.mark.parametrize("detector", HIDDEN)
def test_hidden_layers_of_each_part(host, kind, detector):
    """As many as there are, and no final predictor."""
    expected = HIDDEN[detector]
    opts = RCNN if detector == "rcnn" else []
    for part, number in expected.items():
        norm = [*norm_opts("GN"), *weight_norm_opts(kind, part)]
        model = build(host, *opts, *norm)
        found = [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
        # p6 and p7, the fully connected layer, and the deconvolution have no norm after them.
        without = {"FPN": 2 if detector == "retinanet" else 0, "RETINANET": 0, "RPN": 0}.get(
            part, 1
        )
        assert len(found) == number - (without if kind == "WS" else 0), found
        assert not any(p in name for p in PREDICTORS for name in found)


@every_host
@pytest.mark.parametrize("freeze_at, frozen", [(0, 0), (2, 5), (5, 20)])
def test_resnets(host, freeze_at, frozen):
    """All convolutions of a ResNet-18 that are trained."""
    opts = ["MODEL.BACKBONE.FREEZE_AT", str(freeze_at), *weight_norm_opts("WS", "RESNETS")]
    model = build(host, *opts)
    found = [m for m in model.modules() if parametrize.is_parametrized(m)]
    assert len(found) == 20 - frozen and all(isinstance(m, nn.Conv2d) for m in found)


@every_host
def test_dropout(host):
    """Before the final predictors, in training alone."""
    for detector in ("rcnn", "retinanet"):
        part = {"rcnn": "ROI_BOX_HEAD", "retinanet": "RETINANET"}[detector]
        opts = RCNN if detector == "rcnn" else []
        model = build(host, *opts, *norm_opts("GN"), f"MODEL.{part}.DROPOUT", "0.5")
        rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        number = 2 if (host, detector) == ("torchvision", "retinanet") else 1
        assert rates == [0.5] * number
        head, x = (
            (model.roi_heads.box_head, torch.randn(4, 64, 7, 7))
            if detector == "rcnn"
            else (model.head, [torch.randn(2, 64, k, k) for k in (8, 4, 2, 1, 1)])
        )

        def output(head=head, x=x):
            y = head(x)
            while not torch.is_tensor(y):
                y = next(iter(y.values())) if isinstance(y, dict) else y[0]
            return y

        if detector == "rcnn":
            assert (output() == 0).float().mean() > 0.6  # of a ReLU's outputs
        assert not torch.equal(output(), output())
        model.eval()
        assert torch.equal(output(), output())


BAD = [
    (["MODEL.FPN.WEIGHT_NORM", "SWS"], r"FPN.WEIGHT_NORM: 'SWS' .*one of \['', 'WS', 'ScaledWS'"),
    (["MODEL.RESNETS.WEIGHT_NORM", "ScaledWS"], "RESNETS.*SkipInit.*build_nf_resnet_fpn_backbone"),
    (
        ["MODEL.RETINANET.WEIGHT_NORM", "WS", "MODEL.RETINANET.NORM", ""],
        "'WS' is not accepted with MODEL.RETINANET.NORM ''",
    ),
    (["MODEL.ROI_BOX_HEAD.WEIGHT_NORM", "WN"], "with MODEL.META_ARCHITECTURE 'BNRetinaNet'"),
    (
        [
            *(*RCNN, "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.WEIGHT_NORM", "WN"),
        ],
        "'WN' .*ROI_BOX_HEAD.NAME 'FastRCNNConvFCHead'; use .*'BNFastRCNNConvFCHead'",
    ),
    ([*RCNN, "MODEL.RETINANET.WEIGHT_NORM", "WN"], "META_ARCHITECTURE 'GeneralizedRCNN'; use"),
    (
        [*RCNN, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.WEIGHT_NORM", "WN"],
        "BACKBONE.NAME 'build_resnet_fpn_backbone'; use one of .*'build_nf_resnet_fpn_backbone'",
    ),
    ([*RETINANET_NF, "MODEL.RESNETS.WEIGHT_NORM", "WN"], "'WN' .*build_nf_retinanet"),
    ([*RETINANET_NF, "MODEL.NF.NAME", "resnet50"], r"MODEL.NF.NAME: .*bn1 \(BatchNorm2d\)"),
    (["MODEL.RETINANET.DROPOUT", "1.0"], "MODEL.RETINANET.DROPOUT: 1.0 .*less than 1.0"),
    (["MODEL.ROI_BOX_HEAD.DROPOUT", "-0.1"], "MODEL.ROI_BOX_HEAD.DROPOUT: -0.1"),
    (["MODEL.ROI_BOX_HEAD.DROPOUT", "0.5"], "0.5 is not accepted with .*nor RoI heads"),
]


@every_host
@pytest.mark.parametrize("opts, message", BAD)
def test_values_that_are_not_accepted(host, opts, message):
    with pytest.raises(InputError, match=message):
        make_cfg(host, *opts)


@every_host
def test_keys_of_resnets_do_not_apply(host):
    """Whatever they say, also what the torchvision host would refuse of a ResNet."""
    opts = ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.DEPTH", "20"]
    cfg = make_cfg(host, *RETINANET_NF, *opts)
    assert not has_our_batch_norm(cfg, "RESNETS") and has_our_batch_norm(cfg, "FPN")
    model = build(host, *RETINANET_NF, *opts, *TINY)
    body = "body" if host == "torchvision" else "bottom_up"
    assert first_norm(getattr(model.backbone, body)) == ""
