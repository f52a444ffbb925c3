"""Faults planted into files of real models, and what is found in them."""

from pickle import dumps

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import get_model, mobilenet_v3_small, resnet18

import bn_det
from bn_det.doctor import RULES, examine_file
from bn_det.doctor.from_file import MOMENTUM
from bn_det.errors import InputError


@pytest.fixture(scope="module")
def trained():
    """The state dict of a ResNet-18 that has seen 60 batches, with weights that have moved."""
    torch.manual_seed(0)
    model = resnet18().train()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(2, 3, 32, 32))
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.state_dict()


@pytest.fixture
def state(trained):
    return {name: value.clone() for name, value in trained.items()}


@pytest.fixture
def examine(tmp_path):
    def examine(content, **kwargs):
        torch.save(content, tmp_path / "model.pth")
        return examine_file(tmp_path / "model.pth", **kwargs)

    return examine


NEW = resnet18().state_dict()
LAYER = "layer2.0.bn1"


def of_layers(state):
    return [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]


def without_buffers(state):
    for name in of_layers(state):
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            state[f"{name}.{key}"] = NEW[f"{name}.{key}"]


def without_counters(state):
    for name in of_layers(state):
        del state[f"{name}.num_batches_tracked"]


def frozen_from_scratch(state):
    without_counters(state)
    for name in of_layers(state):
        for key in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{key}"] = NEW[f"{name}.{key}"]


def folded(state):
    without_buffers(state)
    without_counters(state)
    for name in of_layers(state):  # as Detectron2's FrozenBatchNorm2d begins
        state[f"{name}.running_var"] = torch.ones_like(state[f"{name}.running_var"]) - 1e-5


def never_moved(state):
    counter = state["bn1.num_batches_tracked"]
    without_buffers(state)
    for name in of_layers(state):
        state[f"{name}.num_batches_tracked"] = counter


def as_new(state):
    state.update({name: value for name, value in NEW.items() if name.startswith(LAYER)})


def young(state):
    for name in of_layers(state):
        state[f"{name}.num_batches_tracked"] = torch.tensor(2)


def put(key, value, dtype=None):
    def plant(state):
        tensor = state[f"{LAYER}.{key}"]
        if dtype is not None:
            tensor = state[f"{LAYER}.{key}"] = tensor.to(dtype)
        tensor.view(-1)[1] = value

    return plant


def times(factor, more=0):
    def plant(state):
        state[f"{LAYER}.num_batches_tracked"] *= factor
        state[f"{LAYER}.num_batches_tracked"] += more

    return plant


def without(key):
    return lambda state: state.pop(f"{LAYER}.{key}")


def of_type(key, make):
    def plant(state):
        state[f"{LAYER}.{key}"] = make(state[f"{LAYER}.{key}"])

    return plant


def fused(state):
    convs = [name for name in state if state[name].dim() == 4]
    kept = {name: state[name] for name in convs}
    state.clear()
    state.update(kept)
    state.update({n.replace("weight", "bias"): torch.ones(len(kept[n])) for n in convs})


ALL = 20
PLANTED = {
    "averaged without buffers": (without_buffers, "BN101", "error", ALL, ALL),
    "frozen from scratch": (frozen_from_scratch, "BN102", "error", ALL, None),
    "folded": (folded, "BN103", "note", ALL, ALL),
    "momentum 0": (never_moved, "BN104", "error", ALL, ALL),
    "a layer that is not used": (as_new, "BN105", "warning", 1, 1),
    "two batches": (young, "BN106", "warning", ALL, (1 - MOMENTUM) ** 2),
    "NaN": (put("running_mean", float("nan")), "BN107", "error", 1, 1),
    "infinite": (put("running_var", float("inf")), "BN107", "error", 1, 1),
    "negative": (put("running_var", -1e-3), "BN108", "error", 1, 1),
    "clamped": (put("running_var", 65504.0), "BN109", "error", 1, 1),
    "clamped from below": (put("running_mean", -65504.0), "BN109", "error", 1, 1),
    "half": (put("running_var", 1e-6, torch.float16), "BN115", "note", 1, 1),
    "near eps": (put("running_var", 1e-5), "BN110", "note", 1, 1),
    "a dead weight": (put("weight", 0.0), "BN111", "note", 1, 1),
    "a probe": (times(1, 1), "BN112", "warning", 1, 61 / 60),
    "recomputed activations": (times(2), "BN112", "warning", 1, 2),
    "five levels": (times(5), "BN112", "warning", 1, 5),
    "no variance": (without("running_var"), "BN113", "error", 1, 1),
    "fused": (fused, "BN114", "warning", 0, 20),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name, state, examine):
    plant, rule, severity, num_layers, value = PLANTED[name]
    plant(state)
    report = examine(state)
    (finding,) = [of for of in report.findings if of.rule == rule]
    others = {of.rule for of in report.findings if of.severity != "note"} - {rule}
    assert not others, "it is found by one rule"
    assert finding.severity == severity
    assert len(finding.where) == num_layers
    assert num_layers != 1 or finding.where == (LAYER,)
    if value is not None:
        assert finding.value == pytest.approx(value)
    if severity != "note":
        assert rule in report.verdict and finding.place in report.verdict
    assert RULES[rule].name in str(report) and finding.treatment in str(report)


@pytest.mark.parametrize(
    ("blocks", "number"),
    [(["layer2"], 5), (["layer1", "layer2", "layer4"], 14), (["layer1", "layer2", "layer4.0"], 12)],
)
def test_fused_in_part(blocks, number, examine):
    model = resnet18(num_classes=2).eval()
    unfused = {name for name, of in model.named_modules() if isinstance(of, nn.Conv2d)}
    for block in blocks:
        bn_det.fuse(model.get_submodule(block))
    biases = [name for name in unfused if model.get_submodule(name).bias is not None]
    assert len(biases) == number
    (finding,) = [of for of in examine(model.state_dict()).findings if of.rule == "BN114"]
    assert finding.value == number
    assert any(name in finding.why for name in biases)


def test_one_layer_that_fuse_has_left(state, examine):
    fused(state)
    for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        state[f"{LAYER}.{key}"] = NEW[f"{LAYER}.{key}"] + 1
    (finding,) = [of for of in examine(state).findings if of.rule == "BN114"]
    assert finding.value == 20
    assert finding.why.startswith("it has 1 BatchNorm, and 20 of 20 convolutions have a bias")


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "maxvit_t", "densenet121", "mobilenet_v3_small"]
)
def test_convolutions_with_and_without_bias_are_usual(name, examine):
    with torch.device("meta"):
        model = get_model(name, weights=None)
    state = {key: torch.ones(t.shape, dtype=t.dtype) for key, t in model.state_dict().items()}
    assert not [of for of in examine(state).findings if of.rule == "BN114"]


def test_every_rule_is_planted():
    of_files = {rule for rule in RULES if rule.startswith("BN1")}
    assert {rule for _, rule, *_ in PLANTED.values()} == of_files


def test_healthy(state, examine):
    report = examine(state)
    assert report.findings == []
    assert "20 BatchNorm layers" in report.verdict


def test_a_new_model_is_no_error(examine):
    for model in (resnet18(zero_init_residual=True), mobilenet_v3_small()):
        report = examine(model.state_dict())
        assert {of.rule for of in report.findings} == {"BN105"}
        assert "nothing here is trained" in report.findings[0].why


@pytest.mark.parametrize("part", ["model", "state_dict", "model_ema"])
def test_where_training_codes_put_weights(part, state, examine):
    report = examine({part: state, "epoch": 3, "optimizer": {"lr": 0.1}})
    assert "20 BatchNorm layers" in report.verdict


def test_an_average_beside_the_weights(state, examine):
    averaged = {name: value.clone() for name, value in state.items()}
    without_buffers(averaged)
    content = {"model": state, "model_ema": averaged}
    assert examine(content).findings == []
    assert "model_ema" in examine(content).verdict
    (found,) = examine(content, part="model_ema").findings
    assert found.rule == "BN101" and " --part model_ema --model " in found.treatment
    with pytest.raises(InputError, match=r"--part: 'ema' .*\['model', 'model_ema'\]"):
        examine(content, part="ema")


def test_arrays_of_detectron2(state, tmp_path):
    without_buffers(state)
    arrays = {name: value.numpy() for name, value in state.items()}
    path = tmp_path / "model.pkl"
    path.write_bytes(dumps({"model": arrays, "__author__": "somebody"}))
    assert [of.rule for of in examine_file(path).findings] == ["BN101"]


def test_safetensors(state, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    without_buffers(state)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    report = examine_file(tmp_path / "model.safetensors")
    assert [of.rule for of in report.findings] == ["BN101"]
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(InputError, match=r"cut.safetensors: cannot be loaded as safetensors"):
        examine_file(tmp_path / "cut.safetensors")


def test_a_list_of_layers_shares_its_affine(examine):
    """Ours with statistics for each level, and Detectron2's CycleBatchNormList, have it beside."""
    layer = bn_det.DomainBatchNorm2d(4, 2, population="per_domain", affine="shared")
    state = {f"norm.{name}": value for name, value in layer.state_dict().items()}
    state["norm.weight"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (finding,) = examine(state).findings
    assert finding.rule == "BN101" and finding.where == ("norm.0", "norm.1")


def test_detectron2s_list_of_layers(examine):
    pytest.importorskip("detectron2")
    from detectron2.layers import CycleBatchNormList

    layer = CycleBatchNormList(2, num_features=4)
    with torch.no_grad():
        layer.weight += torch.arange(4)
    assert [of.rule for of in examine(layer.state_dict()).findings] == ["BN101"]


class Code:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_code_is_not_run(name, tmp_path, capsys):
    save = {"model.pth": torch.save, "model.pkl": lambda content, p: p.write_bytes(dumps(content))}
    save[name]({"model": Code()}, tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: .*may run any code"):
        examine_file(tmp_path / name)
    torch.save({"model": nn.BatchNorm2d(3)}, tmp_path / "module.pth")
    with pytest.raises(InputError, match=r"module.pth: .*may run any code"):
        examine_file(tmp_path / "module.pth")
    assert "code has run" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_torchscript(tmp_path):
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    torch.jit.save(model, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: .* it is of torch.jit, and has code that a"):
        examine_file(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [{}, {"epoch": 3}, {"model": {"epoch": 3}}, [torch.ones(3)], {"model": {3: torch.ones(3)}}],
)
def test_no_weights(content, examine):
    with pytest.raises(InputError, match=r"model.pth: it has no weights by name"):
        examine(content)


def test_odd_statistics_are_told(state, examine):
    state["bn1.running_mean"] = torch.zeros(3, 3)
    state["bn1.num_batches_tracked"] = torch.ones(2, dtype=torch.int64)
    state[f"{LAYER}.weight"] = torch.ones(3)
    (finding,) = examine(state).findings
    assert finding.rule == "BN113" and finding.where == ("bn1", LAYER)


@pytest.mark.parametrize(
    "key, make",
    [
        ("running_var", lambda t: t.int()),
        ("running_var", lambda t: t.to(torch.complex64)),
        ("running_mean", lambda t: t.to(torch.float8_e4m3fn)),
        ("running_mean", lambda t: t.to_sparse()),
        ("running_var", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ("running_var", lambda t: torch.empty_like(t, device="meta")),
        ("running_mean", lambda t: torch.zeros(1).expand(10**12)),
        ("weight", lambda t: t.bool()),
        ("num_batches_tracked", lambda t: torch.tensor(-5)),
        ("num_batches_tracked", lambda t: torch.tensor(float("nan"))),
        ("num_batches_tracked", lambda t: torch.tensor(1j)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_statistics(key, make, state, examine):
    of_type(key, make)(state)
    (finding,) = examine(state).findings
    assert finding.rule == "BN113" and finding.where == (LAYER,)


def test_a_layer_without_channels_is_none(state, examine):
    for key in ("running_mean", "running_var", "weight", "bias"):
        state[f"{LAYER}.{key}"] = torch.ones(0)
    assert examine(state).findings == [] and "19 BatchNorm layers" in examine(state).verdict


def test_names_leave_the_terminal_as_it_is(examine):
    state = {f"\x1b[31m\n\ud800.{k}": v for k, v in nn.BatchNorm2d(3).state_dict().items()}
    state[next(n for n in state if n.endswith("var"))][0] = torch.nan
    text = str(examine(state))
    assert "BN107" in text and "\x1b" not in text
    text.encode()


def test_a_stray_number_hides_no_weights(state, examine):
    """PyTorch's ImageNet example saves the best accuracy as a tensor beside the state dict."""
    state["bn1.running_var"][0] = torch.nan
    content = {"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(76.1)}
    assert [of.rule for of in examine(content).findings] == ["BN107"]
    state["bn1.running_var"][0] = 1.0
    assert "--part" not in examine({"model": state, "trainer": {"x": torch.ones(3)}}).verdict
    assert examine({"student": state, "teacher": NEW}, part="teacher").findings[0].rule == "BN105"


def test_what_is_left_out_is_said(state, examine):
    state["bn1.running_var"][0] = torch.nan
    report = examine(state, rules=[rule for rule in RULES if rule != "BN107"])
    assert report.findings == [] and "1 rule left out" in report.verdict


BROKEN = [b"", b"garbage", bytes(range(256)), b"\x80\x04\x8a\xff\xff\xff\xff"]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_no_checkpoint(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: cannot be loaded"):
        examine_file(tmp_path / name)


def test_numbers_of_other_types(tmp_path):
    arrays = {"bn.running_mean": np.array(["a"]), "bn.running_var": np.ones(1), "n": np.float64(3)}
    (tmp_path / "model.pkl").write_bytes(dumps(arrays))
    (finding,) = examine_file(tmp_path / "model.pkl").findings
    assert finding.rule == "BN113"


@pytest.mark.parametrize(
    "key, words", [("running_mean", "bn-det recompute --weights"), ("bias", "an earlier checkpoi")]
)
def test_what_is_not_finite_decides_the_cure(key, words, state, examine):
    state[f"{LAYER}.{key}"][0] = float("nan")
    (finding,) = [of for of in examine(state).findings if of.rule == "BN107"]
    assert finding.treatment.startswith(words)


def test_cures_in_a_file_of_new_statistics(state, examine):
    without_buffers(state)
    state[f"{LAYER}.running_var"] = -torch.ones_like(state[f"{LAYER}.running_var"])
    found = {of.rule: of for of in examine(state).findings}
    assert found["BN101"].treatment == found["BN108"].treatment
    assert " --initial " in found["BN108"].treatment


def test_the_cure_of_a_mended_file_is_another(state, tmp_path):
    state[f"{LAYER}.running_var"][0] = -1.0
    path = tmp_path / "mended.pth"
    torch.save(state, path)
    (finding,) = [of for of in examine_file(path).findings if of.rule == "BN108"]
    assert f"--weights {path} --output mended_again.pth" in finding.treatment
