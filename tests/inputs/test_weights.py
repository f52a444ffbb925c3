"""Weights and what they get, where they are not those of the config's model: on both hosts."""

import argparse
import os
import pickle
import re
import resource
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from bn_det.commands.checkpoint import check_files
from bn_det.commands.outputs import check_output
from bn_det.doctor import examine_file
from bn_det.errors import InputError
from bn_det.files import write_aside
from bn_det.layers.pickled_arrays import read_pickled_arrays
from here import run_here
from hosts import build_model, make_cfg
from reference import BASE


def checkpointer(host, model, folder=""):
    if host == "torchvision":
        from bn_det.commands.checkpoint import Checkpointer
    else:
        from bn_det.d2.engine import Checkpointer
    return Checkpointer(model, str(folder))


def model_of(host, *opts):
    torch.manual_seed(0)
    return build_model(host, make_cfg(host, BASE, *opts))


@pytest.fixture(scope="module", params=["torchvision", "detectron2"])
def host(request):
    if request.param == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    return request.param


@pytest.fixture(scope="module")
def weights(host, tmp_path_factory):
    """The path of those of the base config, with BN everywhere."""
    path = tmp_path_factory.mktemp("weights") / "bn.pth"
    torch.save({"model": model_of(host).state_dict()}, path)
    return path


OTHERS = {
    "no norm in the backbone": ("MODEL.RESNETS.NORM", ""),
    "GN in the backbone": ("MODEL.RESNETS.NORM", "GN"),
    "GN in the head": ("MODEL.RETINANET.NORM", "GN"),
    "a shorter head": ("MODEL.RETINANET.NUM_CONVS", "1"),
}


@pytest.mark.parametrize("row", OTHERS)
def test_evaluation_refuses_what_has_no_place(host, weights, row):
    """It would be of another function, with an AP that says nothing of the checkpoint."""
    loads = checkpointer(host, model_of(host, *OTHERS[row]))
    loads.must_match = True
    with pytest.raises(InputError, match=r": the checkpoint (has|lacks) it and \d+ more"):
        loads.load(str(weights))


def test_evaluation_takes_what_is_the_same_function(host, weights):
    """Counters have no place in a FrozenBatchNorm2d."""
    loads = checkpointer(host, model_of(host, "MODEL.RESNETS.NORM", "FrozenBN"))
    loads.must_match = True
    loads.load(str(weights))


def test_training_says_what_begins_anew(host, weights, caplog):
    loads = checkpointer(host, model_of(host, "MODEL.RESNETS.NORM", "GN"))
    with caplog.at_level("WARNING"):
        loads.load(str(weights))
    (table,) = [m for m in caplog.messages if m.startswith("Weights of the checkpoint that do not")]
    header, _, *rows = table.splitlines()[1:]
    assert header.split("  ")[0] == "part" and "begin anew" in header and "not used" in header
    assert [row.split()[0] for row in rows] == ["backbone"]
    assert int(rows[0].split()[-1]) > 0


def test_names_that_would_change_the_terminal(host, weights, tmp_path, caplog):
    """Escape codes, that are in no log, and ends of lines."""
    state = torch.load(weights, weights_only=True)["model"]
    odd = {f"{start}\x1b[31mred\nx": torch.zeros(1) for start in ("", "backbone.", "a.b.")}
    torch.save({"model": {**state, **odd}}, tmp_path / "odd.pth")
    loads = checkpointer(host, model_of(host))
    with caplog.at_level("WARNING"):
        loads.load(str(tmp_path / "odd.pth"))
    (table,) = [m for m in caplog.messages if m.startswith("Weights of the checkpoint that do not")]
    (unused,) = [m for m in caplog.messages if "not used by the model" in m]
    for text in (table, unused):
        assert "\x1b[31mred" not in text and r"\x1b[31mred\nx" in text


def test_training_stops_where_a_whole_part_begins_anew(host, weights, tmp_path):
    state = torch.load(weights)["model"]
    renamed = {name.replace("backbone.", "backbone.old."): v for name, v in state.items()}
    torch.save(renamed, tmp_path / "renamed.pth")
    words = r"backbone: all of it would begin anew, though the checkpoint has backbone\.old\."
    with pytest.raises(InputError, match=words):
        checkpointer(host, model_of(host)).load(str(tmp_path / "renamed.pth"))


def broken(path, name, value=float("nan")):
    state = torch.load(path, weights_only=True)["model"]
    state[name].view(-1)[0] = value
    return {"model": state}


def test_weights_that_are_not_finite(host, weights, tmp_path):
    names = torch.load(weights, weights_only=True)["model"]
    name = next(n for n in names if n.startswith("head") and n.endswith("weight"))
    torch.save(broken(weights, name), tmp_path / "nan.pth")
    for must_match in (True, False):
        loads = checkpointer(host, model_of(host))
        loads.must_match = must_match
        with pytest.raises(InputError, match=f"{name}: it and 0 more have NaN or infinity; the tr"):
            loads.load(str(tmp_path / "nan.pth"))


def test_statistics_that_are_not_finite(host, weights, tmp_path):
    """Evaluation refuses them; recomputing does not, which mends them."""
    names = torch.load(weights, weights_only=True)["model"]
    name = next(n for n in names if n.endswith("running_var"))
    torch.save(broken(weights, name, float("inf")), tmp_path / "inf.pth")
    torch.save(broken(weights, name, -1.0), tmp_path / "negative.pth")
    for file, words in (
        ("inf.pth", "have NaN or infinity; .*bn-det recompute"),
        ("negative.pth", "have a negative variance; bn-det recompute"),
    ):
        for must_match in (True, False):
            loads = checkpointer(host, model_of(host))
            loads.must_match = must_match
            with pytest.raises(InputError, match=f"{file}: {name}: it and 0 more {words}"):
                loads.load(str(tmp_path / file))
        loads = checkpointer(host, model_of(host))
        loads.is_mended = True
        loads.load(str(tmp_path / file))


BROKEN = {"weight": float("nan"), "running_var": -1.0}
COMMANDS = {
    "train_net": (*BROKEN,),
    "measure_loss": (*BROKEN,),
    "recompute_statistics": ("weight",),
    "average_checkpoints": ("weight",),
}
"""And the endings of names of which a broken value is refused."""


@pytest.mark.parametrize("command, end", [(c, end) for c, ends in COMMANDS.items() for end in ends])
def test_commands_name_the_file(host, weights, tiny_shapes, tmp_path, command, end):
    name = next(n for n in torch.load(weights, weights_only=True)["model"] if n.endswith(end))
    path = tmp_path / "broken.pth"
    torch.save(broken(weights, name, BROKEN[end]), path)
    given = {
        "train_net": ("--eval-only", "MODEL.WEIGHTS", path),
        "measure_loss": ("MODEL.WEIGHTS", path),
        "recompute_statistics": ("--weights", path),
        "average_checkpoints": ("--inputs", path, path, "--output", tmp_path / "new.pth"),
    }[command]
    opts = *tiny_shapes, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "out"
    config = "--host", host, "--config-file", BASE, *opts
    done = run_here(f"tools/{command}.py", *config, *given)
    assert done.returncode == 1
    assert f"{path}: {name}: it and 0 more have " in done.stderr.splitlines()[-1]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def arrays():
    return {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(2), "c": np.array(["x"])}


class Forged:
    """A number whose dtype is set as a pickle can set it."""

    def __init__(self, name, flags):
        self.name, self.flags = name, flags

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (ForgedType(self.name, self.flags), b"A" * 8)


class ForgedType(Forged):
    def __reduce__(self):
        return np.dtype, (self.name, False, True), (3, "|", None, None, None, -1, -1, self.flags)


@pytest.mark.parametrize("name", ["O8", "V8", "f4,O"])
def test_pickled_pointers(tmp_path, name):
    """NumPy would take the bytes for the address of an object."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": Forged(name, 0)}))
    with pytest.raises(InputError, match="an array of type '.*'; use numbers or text"):
        read_pickled_arrays(path)


def test_pickled_flags(tmp_path):
    """Of a type of numbers they are not taken over, as its values would be counted as objects."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": Forged("f8", 63)}))
    value = read_pickled_arrays(path)["model"]
    assert value.dtype == np.float64 and not value.dtype.hasobject


def test_pickled_layouts(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    arrays = {"turned": x.transpose(2, 0, 1), "fortran": np.asfortranarray(x), "back": x[::-1]}
    arrays |= {"big": x.astype(">f4"), "half": x.astype("f2"), "true": x > 0}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
        found = read_pickled_arrays(tmp_path / "a.pkl")
        for name, value in arrays.items():
            assert np.array_equal(found[name], value), (protocol, name)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": arrays(), "__author__": "me"}, protocol))
    found = read_pickled_arrays(path)
    assert found["__author__"] == "me"
    for name, value in arrays().items():
        assert np.array_equal(found["model"][name], value)
    path.write_bytes(pickle.dumps({"model": Code(tmp_path / "ran")}, protocol))
    with pytest.raises(InputError, match=r"posix.system, which may run any code .* NumPy arrays"):
        read_pickled_arrays(path)
    path.write_bytes(pickle.dumps([1], protocol))
    with pytest.raises(InputError, match="a pickled list, and no dict of weights"):
        read_pickled_arrays(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["pkl", "pth", "pyth"])
def test_no_file_of_weights_runs_code(tmp_path, kind):
    """On Detectron2, whose own checkpointer does."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    path = tmp_path / f"code.{kind}"
    content = {"model": Code(tmp_path / "ran"), "model_state": {}}
    if kind == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"code.{kind}: cannot be loaded .*posix.system"):
        checkpointer("detectron2", torch.nn.Linear(2, 2)).load(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.pyth", "a.safetensors", "a"])
def test_zeros(host, name, tmp_path):
    """Those of safetensors raise an error of their own."""
    (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises(InputError, match=f"^{tmp_path}/{name}: cannot be loaded as a checkpoint: "):
        checkpointer(host, torch.nn.Linear(2, 2)).load(str(tmp_path / name))


NAMES = ["x?y", "x?", "x#y", "x#", "x;", "x?matching_heuristics=True", "x%20y", "file:x", "h://x"]
"""Of files, which an address would have another meaning by."""


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_meant_by_its_name(host, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h:").mkdir()
    torch.save({"model": nn.Linear(1, 1).state_dict()}, "x")
    saved = nn.Linear(1, 1)
    torch.save({"model": saved.state_dict()}, name)
    check_files(argparse.Namespace(resume=False, eval_only=True), ("", ""), ("", name))
    for path in (name, str(tmp_path / name)):
        model = nn.Linear(1, 1)
        checkpointer(host, model).load(path)
        assert torch.equal(model.weight, saved.weight)


@pytest.mark.parametrize("path", ["x?y", "x?matching_heuristics=False", "http://127.0.0.1:9/x?a=1"])
def test_options_of_weights(path, tmp_path, monkeypatch):
    """Those that Detectron2 knows are of its files alone; it takes others away from an address."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(1, 1)
    torch.save({"model": model.state_dict()}, "x")
    loads = checkpointer("detectron2", model)
    words = r": what follows the question mark is not accepted; use \?matching_heuristics=True or "
    with pytest.raises(InputError, match=f"^{re.escape(path)}{words}"):
        loads.load(path)
    loads.load("x?matching_heuristics=True")  # the same one, as after any error


ADDRESSES = ["http://", "http://[", "http://127.0.0.1:9/x", "catalog://", "catalog://a", "h://x"]


@pytest.mark.parametrize("path", ADDRESSES)
def test_addresses_that_lead_nowhere(host, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"^{re.escape(path)}: cannot be loaded as a ch") as e:
        checkpointer(host, nn.Linear(1, 1)).load(path)
    assert "\n" not in str(e.value)


def test_a_number(host, tmp_path):
    torch.save(3, tmp_path / "number.pth")
    with pytest.raises(InputError, match="number.pth: .*(has a int|is no state dict)"):
        checkpointer(host, torch.nn.Linear(2, 2)).load(str(tmp_path / "number.pth"))


@pytest.mark.parametrize("of", ["model zoo", "Caffe2", "Detectron", "pycls"])
def test_the_files_that_detectron2_takes(tmp_path, of):
    """As its own checkpointer takes them."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer

    weight, bias = np.full((2, 2), 3.0, np.float32), np.full(2, 4.0, np.float32)
    named = {"weight": weight, "bias": bias}
    path = tmp_path / ("a.pyth" if of == "pycls" else "a.pkl")
    if of == "pycls":
        tensors = {name: torch.from_numpy(v) for name, v in named.items()}
        counter = {"num_batches_tracked": torch.zeros(1)}
        torch.save({"model_state": {**tensors, **counter}}, path)
    else:
        content = {
            "model zoo": {"model": named, "__author__": "me", "matching_heuristics": True},
            "Caffe2": {**named, "weight_momentum": weight},
            "Detectron": {"blobs": {**named, "bias_momentum": bias}},
        }[of]
        path.write_bytes(pickle.dumps(content, 2))
    ours, theirs = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    checkpointer("detectron2", ours).load(str(path))
    DetectionCheckpointer(theirs).load(str(path))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_table_does_not_take_the_checkpoints_name(host, weights, tmp_path):
    args = ("--host", host, "--config-file", BASE, "--weights", str(weights))
    done = run_here("tools/recompute_statistics.py", *args, "--output", str(tmp_path / "new.json"))
    assert done.returncode == 1
    assert done.stderr.strip().endswith("is not accepted; the table gets that name, use .pth")


CHANGES = {
    "integers": (
        lambda name, tensor: tensor.long() if name.endswith("conv1.weight") else tensor,
        "conv1.weight: the checkpoint has torch.int64, the model of this config torch.float32",
    ),
    "complex numbers": (
        lambda name, tensor: tensor.to(torch.complex64) if name.endswith("bias") else tensor,
        "bias: the checkpoint has torch.complex64, the model of this config torch.float32",
    ),
    **{
        kind: (
            lambda name, tensor, make=make: (
                make(tensor) if name.endswith("conv1.weight") else tensor
            ),
            rf"conv1.weight: a {kind} tensor is not accepted; use dense ones of numbers",
        )
        for kind, make in {
            "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "sparse": torch.Tensor.to_sparse,
            "nested": lambda tensor: torch.nested.nested_tensor(list(tensor)),
            "meta": lambda tensor: tensor.to("meta"),
        }.items()
    },
    "a negative variance": (
        lambda name, tensor: -1 - tensor if name.endswith("running_var") else tensor,
        r"running_var: it and \d+ more have a negative variance",
    ),
}


@pytest.mark.parametrize("row", CHANGES)
def test_a_training_does_not_begin_with(host, weights, tmp_path, row):
    change, words = CHANGES[row]
    state = torch.load(weights, weights_only=True)["model"]
    path = tmp_path / "changed.pth"
    torch.save({"model": {name: change(name, tensor) for name, tensor in state.items()}}, path)
    with pytest.raises(InputError, match=f"changed.pth: .*{words}"):
        checkpointer(host, model_of(host)).load(str(path))


def test_a_file_whose_content_has_changed(host, weights, tmp_path):
    """torch.load does not look at its checksums."""
    with zipfile.ZipFile(weights) as file:
        record = max(file.infolist(), key=lambda info: info.file_size)
    content = bytearray(weights.read_bytes())
    content[record.header_offset + record.file_size // 2] ^= 1
    path = tmp_path / "changed.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"changed.pth: .* damaged: {record.filename} in it"):
        checkpointer(host, model_of(host)).load(str(path))


def compressed(whole, path):
    with zipfile.ZipFile(whole) as a, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as b:
        for record in a.infolist():
            b.writestr(record.filename, a.read(record.filename))


def test_a_file_that_says_it_holds_more_than_it_has(host, tmp_path):
    """torch.load would take it: a thousand times its bytes."""
    torch.save({"model": {"a": torch.zeros(10**6)}}, tmp_path / "whole.pth")
    compressed(tmp_path / "whole.pth", tmp_path / "small.pth")
    assert torch.load(tmp_path / "small.pth", weights_only=True)["model"]["a"].numel() == 10**6
    words = r"small.pth: .*it has \d+ bytes, and is said to hold \d+; use a file as torch.save writ"
    with pytest.raises(InputError, match=words):
        checkpointer(host, torch.nn.Linear(2, 2)).load(str(tmp_path / "small.pth"))


@pytest.mark.parametrize("must_match", [True, False])
def test_shapes_of_few_bytes(host, weights, tmp_path, must_match):
    """Views of one value: 4 TB, if anything were made of them."""
    state = torch.load(weights, weights_only=True)["model"]
    name = next(name for name in state if name.endswith("conv1.weight"))
    state[name] = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"model": state}, tmp_path / "view.pth")
    loads = checkpointer(host, model_of(host))
    loads.must_match = must_match
    with pytest.raises(InputError, match=f"view.pth: {name}: the checkpoint has shape .1000000, 1"):
        loads.load(str(tmp_path / "view.pth"))


def test_a_view_in_the_doctor(tmp_path):
    statistics = {
        f"bn.{name}": torch.zeros(1).expand(2**24) for name in ("running_mean", "running_var")
    }
    torch.save(statistics, tmp_path / "view.pth")
    (finding,) = examine_file(tmp_path / "view.pth").findings
    assert finding.rule == "BN113" and "has a running_mean of 16777216 values in 4 b" in finding.why


def test_a_pickle_that_names_a_large_number(tmp_path):
    """For its table of objects, of which the unpickler in C makes one as long."""
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04}r" + (2**26).to_bytes(4, "little") + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_pickled_arrays(path) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**18  # kilobytes


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    path = tmp_path / "out.pth"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nothing")
    with pytest.raises(InputError, match=f"{path}: cannot be written: it is no file"):
        check_output(str(path), {"--weights": []})
    with pytest.raises(InputError, match=f"{path}: cannot be written"), write_aside(path):
        pass
    assert path.is_symlink() or path.is_fifo()


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path):
    """torch's writer then says that its file has no end."""
    path = tmp_path / "model.pth"
    with pytest.raises(KeyboardInterrupt), write_aside(path) as aside:
        try:
            raise KeyboardInterrupt
        finally:
            open(aside, "w").close()
            raise RuntimeError("unexpected pos")
    assert list(tmp_path.iterdir()) == []


def test_pickled_arrays_on_both_hosts(host, weights, tmp_path):
    state = torch.load(weights, weights_only=True)["model"]
    path = tmp_path / "arrays.pkl"
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = model_of(host)
    torch.nn.init.zeros_(next(model.parameters()))
    checkpointer(host, model).load(str(path))
    assert all(torch.equal(v, state[name]) for name, v in model.state_dict().items())


def test_checkpoints_that_nothing_names(tmp_path):
    """Those that are newer than the run are its own; over others it would write."""
    config = tmp_path / "config.yaml"
    config.write_text("VERSION: 2\n")
    files = ("OUTPUT_DIR", str(tmp_path)), ("MODEL.WEIGHTS", "")

    def resumes():
        args = argparse.Namespace(resume=True, eval_only=False)
        check_files(args, *files)
        return args.resume

    last = tmp_path / "last_checkpoint"
    assert not resumes() and not last.exists()  # it was killed before its first one
    for name, seconds in (("model_0000009.pth", 30), ("model_0000004.pth", 20)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    os.utime(config, (25, 25))
    words = r"model_0000004.pth, which is older than the run, and no file last_checkpoint"
    with pytest.raises(InputError, match=words):
        resumes()
    assert not last.exists()
    os.utime(config, (10, 10))
    assert resumes() and last.read_text() == "model_0000009.pth"
    last.unlink()
    last.mkdir()
    with pytest.raises(InputError, match="last_checkpoint is no file; it names the last"):
        resumes()
