"""The commands beside tools/train_net.py."""

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from here import run_here
from hosts import every_host
from waiting import takes_ctrl_c, wait_for

ROOT = Path(__file__).parents[2]


def run(script, *args):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="what is imported is looked up in /proc")
@pytest.mark.parametrize("tool", sorted(p.stem for p in (ROOT / "tools").glob("*.py")))
def test_ctrl_c_while_torch_is_imported(tool):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, preexec_fn=takes_ctrl_c
    )
    try:
        wait_for(lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")


def visualize(tiny_shapes, tmp_path, detections, *args, run=run_here):
    _, annotations, images = ast.literal_eval(tiny_shapes[1])[1]
    (tmp_path / "d.json").write_text(json.dumps(detections))
    return run(
        "tools/visualize_json_results.py",
        *("--input", tmp_path / "d.json", "--output", tmp_path / "out" / "a.png"),
        *("--dataset", "mine", "--json", annotations, "--images", images, *args),
    )


def test_visualize(tiny_shapes, tmp_path):
    detection = {"image_id": 2, "category_id": 1, "bbox": [20, 30, 50, 60], "score": 0.9}
    weak = {**detection, "image_id": 1, "score": 0.1}
    done = visualize(tiny_shapes, tmp_path, [detection, weak], "--num-images", "3", run=run)
    assert done.returncode == 0, done.stderr
    picture = cv2.imread(str(tmp_path / "out" / "a.png"))
    assert picture.shape == (2 * 260, 3 * 260, 3)
    lower = picture[260 + 2 : 2 * 260 - 2]
    records = json.loads(Path(ast.literal_eval(tiny_shapes[1])[1][1]).read_text())["images"]
    for k, record in enumerate(records[:3]):
        path = Path(ast.literal_eval(tiny_shapes[1])[1][2]) / record["file_name"]
        plain = cv2.resize(cv2.imread(str(path)), (256, 256))
        changed = (lower[:, k * 260 + 2 : (k + 1) * 260 - 2] != plain).any(2)
        assert changed.any() == (record["id"] == 2)


def test_visualize_bad_input(tiny_shapes, tmp_path):
    whole = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}
    for detections, args, words in [
        ([{"bbox": 1}], [], "is not a file of detections: detection 0 lacks"),
        ([list(whole)], [], "is not a file of detections: detection 0 lacks image_id"),
        ({}, [], "d.json is not a file of detections: it is a dict; use a list"),
        ("", [], "d.json is not a file of detections: it is a str; use a list"),
        (None, [], "d.json is not a file of detections: it is a NoneType; use a list"),
        ([{**whole, "bbox": [1] * 10**6}], [], "1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1"),
        ([{**whole, "bbox": [1, float("nan"), 2, 3]}], [], "bbox of detection 0 is no x, y, wi"),
        ([whole, {**whole, "bbox": [1, 2, 3]}], [], "bbox of detection 1 is no x, y, width and h"),
        ([{**whole, "bbox": [9, 9, -4, 3]}], [], "bbox of detection 0 is no x, y, width and hei"),
        ([{**whole, "score": None}], [], "score of detection 0 is no number from 0 to 1: None"),
        ([{**whole, "score": 5}], [], "score of detection 0 is no number from 0 to 1: 5"),
        ([{**whole, "category_id": True}], [], "category_id of detection 0 is no id: (1, True)"),
        ([], ["--first", "100"], "--first: 100 is not one of the 6 images"),
        ([], ["--size", "0"], "error: --size: 0 is not accepted; use 1 to 4096"),
        ([], ["--size", "1000000"], "error: --size: 1000000 is not accepted; use 1 to 4096"),
        (
            [],
            ["--size", "4096", "--num-images", "16"],
            "--num-images: 6 is not accepted with --size 4096",
        ),
        ([], ["--conf-threshold", "nan"], "--conf-threshold: nan is not accepted; use numbers"),
        ([], ["--conf-threshold", "2"], "--conf-threshold: 2.0 is not accepted; use 0 to 1"),
        ([{**whole, "image_id": 7}], [], "detection 0: image_id: 7 is no image of mine"),
        ([{**whole, "category_id": 9}], [], "detection 0: category_id: 9 is no category of mine"),
        ([{**whole, "image_id": [1]}], [], "image_id or category_id of detection 0 is no id"),
        ([{**whole, "bbox": [1, 1, 1e300, 1]}], [], "detection 0: bbox: [1, 1, 1e+300, 1] is not"),
    ]:
        done = visualize(tiny_shapes, tmp_path, detections, *args)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr) < 500
    done = run_here(
        "tools/visualize_json_results.py",
        *("--input", "none.json", "--output", "a.png", "--dataset", "shapes_vall"),
    )
    assert "shapes_vall" in done.stderr and "shapes_val'" in done.stderr
    done = run_here(
        "tools/visualize_json_results.py",
        *("--input", "none.json", "--output", "a.png", "--json", "gone.json"),
    )
    assert done.stderr == "error: --json: there is no file gone.json\n"
    done = run_here(
        "tools/visualize_json_results.py",
        *("--input", "none.json", "--output", "a.png", "--images", "photos"),
    )
    assert done.stderr.startswith("error: --images: is not accepted without --json")
    _, annotations, images = ast.literal_eval(tiny_shapes[1])[1]
    for twice in ('[{"image_id": 1, "image_id": 2}]', None):
        (tmp_path / "d.json").unlink()
        os.mkfifo(tmp_path / "d.json") if twice is None else (tmp_path / "d.json").write_text(twice)
        done = run_here(
            "tools/visualize_json_results.py",
            *("--input", tmp_path / "d.json", "--output", tmp_path / "a.png"),
            *("--json", annotations, "--images", images),
        )
        words = f"{tmp_path}/d.json: is a pipe" if twice is None else "'image_id' stands twice"
        assert done.returncode == 1 and words in done.stderr


def of_size(tmp_path, width, height, said=None):
    """A data set of one image, of which the annotations may say another height."""
    cv2.imwrite(str(tmp_path / "b.png"), np.full((height, width, 3), 200, np.uint8))
    image = {"id": 2, "file_name": "b.png", "height": said or height, "width": width}
    content = {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    return ["mine", str(tmp_path / "a.json"), str(tmp_path)]


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (1, 1)], ids=str)
def test_visualize_any_shape(tmp_path, size):
    sets = ["", repr(["", of_size(tmp_path, *size)])]
    detection = {"image_id": 2, "category_id": 1, "bbox": [0, 0, *size], "score": 0.9}
    done = visualize(sets, tmp_path, [detection])
    assert done.returncode == 0, done.stderr
    picture = cv2.imread(str(tmp_path / "out" / "a.png"))
    short = [max(1, round(256 * side / max(size))) for side in size]
    upper = picture[2 : 2 + 256, 2 : 2 + 256]
    assert (upper[: short[1], : short[0]] == 200).all()
    assert (upper == 200).sum() == 3 * short[0] * short[1]


def test_visualize_another_size(tmp_path):
    """Boxes would be beside what they are of."""
    sets = ["", repr(["", of_size(tmp_path, 30, 20, said=10)])]
    done = visualize(sets, tmp_path, [])
    assert done.stderr.endswith("b.png: is 30x20 pixels, its annotation says 30x10\n")


@pytest.mark.parametrize("name", ["b.png", "B.PNG", "a.json", "d.json", "c.pbm", "c", "c.png.txt"])
def test_visualize_output(tmp_path, name):
    """Nothing that is read is written over, and what the suffix says is what is written."""
    sets = ["", repr(["", of_size(tmp_path, 30, 20)])]
    before = (tmp_path / "b.png").read_bytes()
    done = visualize(sets, tmp_path, [], "--output", tmp_path / name)
    words = "another file than --input and the files of mine"
    if name == "B.PNG":
        assert done.returncode == 0 and cv2.imread(str(tmp_path / name)).shape == (520, 260, 3)
    else:
        accepted = words if name == "b.png" else ".png, .jpg, .jpeg"
        assert done.stderr.endswith(f"/{name}' is not accepted; use {accepted}\n")
    assert (tmp_path / "b.png").read_bytes() == before
    link = tmp_path / "link.png"
    link.symlink_to("a.json")
    assert words in visualize(sets, tmp_path, [], "--output", link).stderr


def test_benchmark_of_joint_batch_norm():
    done = run(
        "benchmarks/joint_batch_norm.py",
        *("--json", "--channels", "16", "--batch", "1", "--rounds", "2"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    names = "concat_ms joint_ms per_level_ms speedup_over_concat ratio_to_per_level max_abs_error"
    assert set(result) == {*names.split(), "extra_memory_ratio"}
    assert result["max_abs_error"] < 1e-4  # float32, ten thousand values
    assert result["extra_memory_ratio"] > 1.5  # bytes, not time: nothing is concatenated


@pytest.mark.slow
def test_benchmark_of_shuffle():
    sizes = ("--rois", "30", "--channels", "4", "--rounds", "1", "--warm-up", "0")
    done = run("benchmarks/shuffle.py", "--json", "--world-size", "2", *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    names = "gather_ms shuffle_ms speedup bytes_received_gather bytes_received_shuffle"
    assert set(result) == {*names.split(), "world_size", "max_abs_error"}
    assert result["max_abs_error"] == 0
    held = 30 * 4 * 7 * 7 * 4
    # Two gathers and their all-reduced gradients; a random half of the samples, four times.
    small = 8 * 1024  # the permutation, headers
    assert 6 * held <= result["bytes_received_gather"] <= 6 * held + small
    assert held < result["bytes_received_shuffle"] < 3 * held
    done = run_here("benchmarks/shuffle.py", "--world-size", "1")
    assert done.returncode == 2 and "--world-size: 1 is not accepted" in done.stderr


def test_benchmark_of_agc():
    done = run_here("benchmarks/agc.py", "--json", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"timm_ms", "ours_ms", "speedup"} and min(result.values()) > 0


def test_benchmark_of_held_memory():
    sizes = ["--size", "64", "64", "--step-size", "32", "32"]
    done = run_here("benchmarks/held_memory.py", "--json", "--rounds", "1", "--batch", "1", *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = "frozen_bn_mib freeze_mib tune_mib bn_mib tune_derived_weights_mib tune_step"
    assert set(result) == {*names.split()} and min(result.values()) > 0
    assert max(result["tune_mib"], result["freeze_mib"]) <= result["frozen_bn_mib"]
    assert result["bn_mib"] > 1.9 * result["frozen_bn_mib"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rounds", "0"], "--rounds: 0 is not accepted"),
        (["--batch", "-1"], "--batch: -1 is not accepted"),
        (["--step-size", "0", "8"], "--step-size: 0 is not accepted"),
        (["--device", "cuda"], "torch sees no GPU here"),
    ],
)
def test_benchmark_of_held_memory_refuses(flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_here("benchmarks/held_memory.py", *flags)
    assert done.returncode and words in done.stderr


def test_benchmark_of_inference():
    small = ["--rounds", "1", "--channels", "16", "--size", "64", "80"]
    done = run_here("benchmarks/inference.py", "--json", *small)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = "bn_ms fused_ms none_ms fused_over_none bn_over_none max_rel_error fused_mb none_mb"
    assert set(result) == {*names.split()} and min(result.values()) > 0
    assert result["max_rel_error"] < 1e-5
    tower = 4 * 4 * (16 * 16 * 9 + 16) / 1e6
    assert abs(result["fused_mb"] - result["none_mb"] - 2 * 4 * tower) < 1e-9, "four copies more"


@every_host
def test_benchmark_of_train_step(host, tiny_shapes, tmp_path):
    """With gradients of several batches, gradient clipping and extra images."""
    ways = {
        "accumulated": "SOLVER: {ACCUMULATE: 2, AGC: {ENABLED: True}}",
        "virtual": "SOLVER: {VIRTUAL_IMAGES: 2}",
        "Base-of-others": "",
    }
    for name, lines in ways.items():
        text = f"_BASE_: {ROOT}/configs/quick_start.yaml\n{lines}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = [tmp_path / f"{name}.yaml" for name in ways]
    small = ["--rounds", "1", "--warm-up", "0", "--num-batches", "1", "--configs", *paths]
    opts = ["--opts", *tiny_shapes, "SOLVER.IMS_PER_BATCH", "2", "MODEL.DEVICE", "cpu"]
    done = run_here("benchmarks/train_step.py", "--json", "--host", host, *small, *opts)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"host", "stock_ms", "ways"} and result["host"] == host
    assert set(result["ways"]) == {"accumulated", "virtual"} and result["stock_ms"] > 0
    for way in result["ways"].values():
        assert set(way) == {"ms", "ratio"} and min(way.values()) > 0


@every_host
def test_benchmark_of_the_monitor(host, tiny_shapes):
    levels = ["MODEL.RETINANET.BN.POPULATION", "shared", "MODEL.DEVICE", "cpu"]
    opts = ["--opts", *tiny_shapes, "SOLVER.IMS_PER_BATCH", "2", *levels]
    done = run_here("benchmarks/monitor.py", "--json", "--rounds", "2", "--host", host, *opts)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    names = "host step_ms more_in_window_ms look_ms share standard_error"
    assert set(result) == {*names.split()} and result["host"] == host
    assert min(result["step_ms"], result["look_ms"], result["standard_error"]) > 0
    done = run_here("benchmarks/monitor.py", "--rounds", "1")
    assert done.returncode == 1 and "--rounds: 1 is not accepted; use 2 or more" in done.stderr


def test_benchmark_of_train_step_names_what_it_does_not_take(tiny_shapes):
    config = ROOT / "configs" / "leakage" / "shapes" / "head_BN.yaml"
    args = ("--host", "torchvision", "--configs", config, "--opts", *tiny_shapes)
    done = run_here("benchmarks/train_step.py", *args)
    assert done.returncode == 1
    assert "head_BN.yaml is not accepted: its MODEL.META_ARCHITECTURE is 'Gen" in done.stderr


def write_metrics(folder, values, metric="bbox/AP"):
    folder.mkdir()
    lines = [{"iteration": k, "lr": 0.1} for k in range(3)]
    lines += [{"iteration": k, metric: value} for k, value in values]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    "values, words",
    [
        ([(9, 1.0), (19, "x")], "metrics.json: bbox/AP: 'x' of iteration 19 is not accepted; use"),
        ([(9, True)], "metrics.json: bbox/AP: True of iteration 9 is not accepted; use"),
        ([(9, None)], "metrics.json: bbox/AP: None of iteration 9 is not accepted; use"),
        ([(9, float("inf"))], "metrics.json: bbox/AP: inf of iteration 9 is not accepted; use"),
        ([(9.5, 1.0)], "metrics.json: bbox/AP: 1.0 of iteration 9.5 is not accepted; use"),
        ([(9, float("nan"))], "metrics.json: bbox/AP is NaN throughout"),
    ],
)
def test_plot_metrics_refuses(values, words, tmp_path):
    write_metrics(tmp_path / "a", values)
    done = run_here("tools/plot_metrics.py", f"a={tmp_path}/a", "--output", tmp_path / "a.png")
    assert done.returncode == 1 and words in done.stderr
    assert not (tmp_path / "a.png").exists()


def test_plot_metrics_of_a_label_that_is_no_text(tmp_path):
    done = run_here("tools/plot_metrics.py", "\udcff=a", "--output", tmp_path / "a.png")
    assert done.stderr == "error: '\\udcff=a': is not accepted; use text of UTF-8\n"


def test_plot_metrics(tmp_path):
    write_metrics(tmp_path / "a", [(99, 10.0), (199, 20.0), (99, 11.0)])
    write_metrics(tmp_path / "b", [(99, float("nan")), (199, 25.0)])
    output = tmp_path / "made" / "ap.png"
    runs = [f"small/EMA={tmp_path}/a", f"small/PreciseBN={tmp_path}/b", f"large/EMA={tmp_path}/b"]
    runs[1] = f"small/_$\\x{{$={tmp_path}/b"
    done = run("tools/plot_metrics.py", *runs, "--output", output)
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(output)).shape[1] == 9 * 120, "two panels"
    assert f"{tmp_path}/b/metrics.json: bbox/AP is NaN 1 times, which is left out" in done.stdout
    assert "Warning" not in done.stderr, "every run is in the legend"
    metric = "bbox/AP-$x{$b_$"
    write_metrics(tmp_path / "d", [(99, 1.0)], metric)
    done = run("tools/plot_metrics.py", f"a={tmp_path}/d", "--metric", metric, "--output", output)
    assert done.returncode == 0, done.stderr
    for args, words in (
        (
            [f"a={tmp_path}/a", "--metric", "bbox/AQ", "--output", output],
            "nearest names: ['bbox/AP'",
        ),
        ([f"a={tmp_path}/c", "--output", output], "is not the metrics.json of a run"),
        ([str(tmp_path / "a"), "--output", output], "use LABEL=OUTPUT_DIR"),
        ([f"a={tmp_path}/a", "--output", tmp_path / "a.jpg"], "use .png, .svg, .pdf"),
    ):
        done = run_here("tools/plot_metrics.py", *args)
        assert done.returncode == 1 and words in done.stderr


@pytest.mark.slow
def test_population_statistics_benchmark(tiny_variants, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_variants))
    small = ["--rounds", "1", "--num-iters", "2", "--reference-samples", "16", "--size", "64"]
    done = run_here("benchmarks/population_statistics.py", "--json", *small, "--tolerance", "100")
    assert done.returncode == 0, done.stderr
    for result in json.loads(done.stdout).values():
        assert result["speedup"] > 0 and result["fixed_samples"] == 16
        assert 0 < result["adaptive_samples"] <= 16 and result["adaptive_error"] > 0
        # Float32's rounding, in the smallest level's sixteen values.
        assert 0 < result["error_ours"] < 1e-4 and 0 < result["error_fvcore"] < 1e-4
