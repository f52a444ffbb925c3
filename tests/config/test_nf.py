"""Normalizer-free backbones, and timm's bookkeeping of variances in them."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from bn_det.config.nf import STRIDES, NFBackbone, build_nf, check_nf, first_norm
from bn_det.errors import InputError
from reference import dependence

timm = pytest.importorskip("timm", reason="timm is not installed")

TINY = "test_nfnet"  # timm's, for tests: one block in each stage, with squeeze and excitation
NETS = timm.list_models(module="nfnet")


def make_cfg(name=TINY, pretrained="", drop_path_rate=0.0, freeze_at=0, std=58.0, image="BGR"):
    nf = {"NAME": name, "PRETRAINED": pretrained, "DROP_PATH_RATE": drop_path_rate}
    backbone = {"NAME": "build_nf_resnet_fpn_backbone", "FREEZE_AT": freeze_at}
    model = {"NF": nf, "BACKBONE": backbone, "PIXEL_MEAN": [127.5] * 3, "PIXEL_STD": [std] * 3}
    return CfgNode({"MODEL": model, "INPUT": {"FORMAT": image}})


def opened(module):
    """A module with the learned gains that are 0 at first, of residual branches, at 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "gain" in name and (p == 0).all():
                p.fill_(1)
    return module


@pytest.mark.parametrize("name", [TINY, "nf_resnet26", "nf_regnet_b0"])
def test_features_are_timms(name):
    """To the bit those of ``features_only``, also of odd sizes."""
    ours = opened(build_nf(make_cfg(name)))
    theirs = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
    renamed = {}
    for key, value in ours.state_dict().items():
        first, rest = key.split(".", 1)
        renamed[f"{first}_{rest}" if first in ("stem", "stages") else key] = value
    theirs.load_state_dict(renamed)
    x = torch.randn(2, 3, 65, 96)
    found = ours(x)
    assert list(found) == list(STRIDES)
    for (feature, y), expected in zip(found.items(), theirs(x), strict=True):
        assert torch.equal(y, expected)
        assert y.shape[1] == ours.channels[feature] and y.shape[3] == 96 // STRIDES[feature]


@pytest.mark.parametrize("name", NETS)
def test_every_net_of_timm(name):
    """None has a norm, and each has the strides of a ResNet."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    assert first_norm(net) == ""
    assert [info["reduction"] for info in net.feature_info[1:]] == list(STRIDES.values())
    backbone = NFBackbone(net)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing(freeze_at):
    net = build_nf(make_cfg(freeze_at=freeze_at, drop_path_rate=0.9)).train()
    parts = [net.stem, *net.stages]
    for k, part in enumerate(parts):
        assert all(p.requires_grad == (k >= freeze_at) for p in part.parameters())
    assert all(p.requires_grad == (freeze_at < 5) for p in net.final_conv.parameters())
    if freeze_at == 5:  # no stochastic depth, either
        opened(net)
        x = torch.randn(4, 3, 64, 64)
        torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)


def test_drop_path_rate():
    net = opened(build_nf(make_cfg(drop_path_rate=0.6)))
    rates = [getattr(stage[0].drop_path, "drop_prob", 0) for stage in net.stages]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])
    x = torch.randn(64, 3, 32, 32)
    assert not torch.equal(net(x)["res5"], net(x)["res5"])
    net.eval()
    assert torch.equal(net(x)["res5"], net(x)["res5"])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_weights_of_a_file(wrap, tmp_path):
    """Of the whole net, with its classifier."""
    whole = opened(timm.create_model(TINY, num_classes=7))
    torch.save(wrap(whole.state_dict()), tmp_path / "weights.pth")
    cfg = make_cfg(pretrained=str(tmp_path / "weights.pth"))
    check_nf(cfg)
    net = build_nf(cfg)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x)["res5"], whole.final_conv(whole.stages(whole.stem(x))))


def test_files_that_are_not_this_nets_weights(tmp_path):
    path = tmp_path / "weights.pth"
    state = timm.create_model(TINY).state_dict()
    key = "stages.0.0.conv1.weight"
    lacking = {k: v for k, v in state.items() if k != key}
    for content, message in [
        (lacking, f"1 weights are missing and 0 are none of its, such as {key}"),
        ({**state, "more": state[key]}, "0 weights are missing and 1 are none of its.*more"),
        ({**state, key: state[key][:1]}, f"size mismatch for {key}"),
        (timm.create_model("resnet18").state_dict(), "are missing"),
        ([1, 2], "has no attribute"),
    ]:
        torch.save(content, path)
        with pytest.raises(InputError, match=f"MODEL.NF.PRETRAINED: {path} .*{TINY}: .*{message}"):
            build_nf(make_cfg(pretrained=str(path)))
    path.write_text("no checkpoint")
    with pytest.raises(
        InputError, match="cannot be loaded as the weights of .*: it is a text file; use"
    ):
        build_nf(make_cfg(pretrained=str(path)))


def test_timm_is_not_imported_without_need_nor_found_without_a_network(tmp_path):
    """The error of the download of published weights is one that names the key."""
    code = (
        "import sys, bn_det.tv, bn_det.config.nf\n"
        "assert 'timm' not in sys.modules\n"
        "from test_nf import *\n"
        "cfg = make_cfg(pretrained='timm')\n"
        "check_nf(cfg)\n"
        "try:\n    build_nf(cfg)\n"
        "except InputError as e:\n    print(e)\n"
    )
    here = os.path.dirname(__file__)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert f"MODEL.NF.PRETRAINED: timm's weights of {TINY} cannot be had" in done.stdout, done


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "nf_resnet5"}, "NAME: 'nf_resnet5' .*no model of that name; .*'nf_resnet50'"),
        (
            {"name": "resnet18"},
            r"'resnet18' .*bn1 \(BatchNorm2d\) is a norm; .*'nf_resnet50'",
        ),
        ({"name": "convnext_atto"}, r"its stem.1 \(LayerNorm2d\) is a norm"),
        ({"name": "vgg11"}, "'vgg11' is not accepted: it is none of timm's normalizer-free nets"),
        ({"name": "nf_resnet50.no_such_tag"}, "no model of that name"),
        ({"pretrained": "no/such.pth"}, "PRETRAINED: there is no file no/such.pth"),
        (
            {"name": "nf_resnet26", "pretrained": "timm"},
            "has none for nf_resnet26, .*nf_resnet50",
        ),
        ({"drop_path_rate": 1.0}, "DROP_PATH_RATE: 1.0 is not accepted; use 0.0 or more"),
        ({"drop_path_rate": -0.1}, "DROP_PATH_RATE: -0.1"),
    ],
)
def test_values_that_are_not_accepted(arguments, message):
    with pytest.raises(InputError, match=message):
        check_nf(make_cfg(**arguments))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"need timm, .* pip install 'bn_det\[nf\]'"):
        check_nf(make_cfg())


def test_warnings_of_pixels(caplog, tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    file = str(tmp_path / "weights.pth")
    check_nf(make_cfg())
    timms = make_cfg(pretrained=file, std=127.5, image="RGB")  # those of test_nfnet are 0.5
    check_nf(timms)
    assert not caplog.records
    check_nf(make_cfg(std=1.0))
    assert "PIXEL_STD [1.0, 1.0, 1.0] leaves" in caplog.records.pop().getMessage()
    for arguments in ({"std": 127.5}, {"image": "RGB"}):
        check_nf(make_cfg(pretrained=file, **arguments))
        assert "expect INPUT.FORMAT RGB" in caplog.records.pop().getMessage()


@pytest.mark.parametrize("name", [TINY, "nf_resnet26"])
def test_images_do_not_depend_on_each_other(name):
    """The Jacobian test."""
    net = opened(build_nf(make_cfg(name))).double().train()
    found = dependence(lambda xs: [net(xs[0])["res5"]], [torch.randn(3, 3, 64, 64).double()])
    assert torch.equal(found, torch.eye(3, dtype=torch.bool))


def blocks_of(net, x):
    """For each block its input, residual branch, and output."""
    found, hooks = [], []
    for stage in net.stages:
        for block in stage:
            record = {"alpha": block.alpha, "beta": block.beta, "is_first": block is stage[0]}
            hooks += [
                block.conv3.register_forward_hook(lambda *a, r=record: r.update(branch=a[2])),
                block.register_forward_hook(lambda *a, r=record: r.update(x=a[1][0], y=a[2])),
            ]
            found.append(record)
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def mean_squared_and_var(x):
    """Over channels, the averages of the squared mean and of the variance (2021a, Sec. 3.1)."""
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    return mean.square().mean().item(), var.mean().item()


def test_branches_are_closed_at_initialization():
    """By timm's gain of the last convolution, or its SkipInit: a block is its shortcut."""
    net = build_nf(make_cfg("nf_resnet26"))
    blocks = blocks_of(net, torch.randn(2, 3, 64, 64))
    assert all(not b["branch"].any() for b in blocks)
    assert all(torch.equal(b["x"], b["y"]) for b in blocks if not b["is_first"])
    skip_init = build_nf(make_cfg("dm_nfnet_f0")).stages[0][0]
    assert skip_init.skipinit_gain == 0 and skip_init.conv3.gain.all()


def test_variance_bookkeeping():
    """Of timm's nf_resnet50 with open branches, of which alpha is 0.2.

    beta is 1 / the standard deviation that timm expects of a block's input: 1, and + alpha^2 with
    each block since the last transition. So a branch's variance is 1 where the input's is as
    expected, and in any case beta^2 times the input's; it is added times alpha^2, and without a
    mean. Within 10 %, by few images and random weights, and 20 % where the zeros around a small
    feature take their part.
    """
    net = opened(build_nf(make_cfg("nf_resnet50")))
    # Without the stem: its convolution corrects for a ReLU that is not there, and there is a max
    # pooling, which the expectation does not know of.
    net.stem = nn.Identity()
    blocks = blocks_of(net, torch.randn(2, 64, 64, 64))
    expected = 1.0
    for k, block in enumerate(blocks):
        assert block["beta"] == pytest.approx(expected**-0.5)
        expected = (1 if block["is_first"] else expected) + 0.2**2
        (_, before), (_, branch), (mean_squared, after) = (
            mean_squared_and_var(block[name]) for name in ("x", "branch", "y")
        )
        assert branch == pytest.approx(before * block["beta"] ** 2, rel=0.2)
        assert mean_squared < 0.02
        if not block["is_first"]:
            assert after == pytest.approx(before + 0.04 * branch, rel=0.02)
        if k < 3:  # the one stage whose shortcut has no average pooling, not in timm's expectation
            assert branch == pytest.approx(1, rel=0.1) and after == pytest.approx(expected, rel=0.1)
    assert [b["is_first"] for b in blocks].count(True) == 4
