"""tools/train_net.py in several processes: each way to start them, and what ends them."""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bn_det.cli import train
from here import run_here
from hosts import detectron2, every_host
from reference import BASE, norm_opts
from waiting import wait_for

ROOT = Path(__file__).parents[2]
TRAIN_NET = str(ROOT / "tools" / "train_net.py")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    """Three iterations, without statistics that each process has of its own."""
    return [
        *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out"), *tiny_shapes),
        *("SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.001", *norm_opts("GN")),
    ]


def start(host, *args, before=()):
    command = [sys.executable, *before, TRAIN_NET, "--host", host, "--config-file", BASE, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ONE_THREAD)


def finish(*processes):
    """Exit code, standard output and standard error of each."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def evaluate_here(host, opts):
    """--eval-only in this process, with as many threads as each of several processes has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["--host", host, "--config-file", BASE, "--eval-only", *opts]
    train.main("bn-det train", arguments)
    torch.set_num_threads(threads)


def detections(folder):
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def two_commands(host, opts):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    flags = ["--num-machines", "2", "--dist-url", url, "--machine-rank"]
    return [start(host, *flags, str(k), *opts) for k in range(2)]


def torchrun(host, opts):
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [start(host, *opts, before=before)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "host, way", [("torchvision", two_commands), (*detectron2.values, torchrun)]
)
def test_trains_and_evaluates(host, way, opts, tmp_path):
    """The evaluation that ends the training equals that of one process, to the bit."""
    if host == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    done = finish(*way(host, opts))
    assert [code for code, *_ in done] == [0] * len(done), done
    # Rank 0 alone prints and writes.
    tables = [out.count("Evaluation results for bbox:\n") for _, out, _ in done]
    assert tables == [1, 0][: len(done)]
    out = tmp_path / "out"
    assert (out / "log.txt").stat().st_size and (out / "log.txt.rank1").stat().st_size
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    final = torch.load(out / "model_final.pth", weights_only=True)
    assert final["iteration"] == 2 and not any(k.startswith("module.") for k in final["model"])

    found = detections(out)
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "one")]
    evaluate_here(host, [*opts, *weights])
    assert found == detections(tmp_path / "one") and len(found) > 100


@pytest.mark.slow
@every_host
def test_an_image_that_one_rank_cannot_read(host, opts, tmp_path, capfd):
    (name, annotations, images), *rest = ast.literal_eval(
        opts[opts.index("DATASETS.REGISTER_COCO") + 1]
    )
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "000003.png").write_bytes(b"no image")
    sets = [[name, annotations, str(tmp_path / "images")], *rest]
    long = ["DATASETS.REGISTER_COCO", repr(sets), "SOLVER.MAX_ITER", "1000000"]
    args = ("--host", host, "--config-file", BASE, "--num-gpus", "2", *opts, *long)
    done = run_here("tools/train_net.py", *args)
    error = capfd.readouterr().err + done.stderr  # of the ranks, and of what started them
    assert done.returncode == 1
    line = f"error: {tmp_path}/images/000003.png: is empty, or no image of a known format"
    assert error.strip().splitlines()[-1] == line
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_rank_that_is_killed(opts, tmp_path):
    """It ends the run, which leaves no process behind."""
    out = tmp_path / "out"
    more = ["SOLVER.MAX_ITER", "1000000", "DATALOADER.NUM_WORKERS", "1"]
    process = start("torchvision", "--num-gpus", "2", *opts, *more)
    try:
        wait_for(lambda: (out / "model_0000001.pth").exists() or process.poll() is not None)
        ranks = [pid for pid in children(process.pid) if children(pid)]
        started = [*ranks, *(pid for rank in ranks for pid in children(rank))]
        assert len(ranks) == 2 and len(started) == 4
        os.kill(int(ranks[1]), signal.SIGKILL)
    finally:
        ((code, _, error),) = finish(process)
    assert code == 1
    assert "error: rank 1 was killed by SIGKILL" in error.splitlines()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
