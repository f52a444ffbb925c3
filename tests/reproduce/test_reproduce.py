"""The experiments: what is run, that it resumes, and what is made of the results."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from scipy.stats import ttest_1samp

from bn_det.cli.main import COMMANDS
from bn_det.config.packaged import find_config
from bn_det.data.coco import builtin_sources
from bn_det.errors import InputError
from bn_det.reproduce.checks import check_folder
from bn_det.reproduce.claims import CLAIMS, Claim, claims_of
from bn_det.reproduce.data_used import data_used
from bn_det.reproduce.experiments import (
    batch_size,
    doctor,
    leakage,
    loss_spike,
    multi_domain,
    new_laboratory,
    normalizer_free,
    population,
)
from bn_det.reproduce.experiments.common import LABORATORIES, cells
from bn_det.reproduce.experiments.new_laboratory import LEFT_OUT, METRICS
from bn_det.reproduce.looks import Looks
from bn_det.reproduce.main import _write_all, default_jobs, plan
from bn_det.reproduce.published import scaled, scaled_iterations, what_changes
from bn_det.reproduce.registry import EXPERIMENTS, experiments_on
from bn_det.reproduce.report import make_report, verdict_of
from bn_det.reproduce.results import Picture, Results, Table, average
from bn_det.reproduce.runner import Failure, Outcome, Runner, settings_of
from bn_det.reproduce.save import write_report
from bn_det.reproduce.steps import DATA, Setting, Step, estimate
from bn_det.reproduce.verdicts import judge
from bn_det.reproduce.words import cell, effect_text, spikes_text, warnings_of, word_text
from here import run_here
from waiting import wait_for

ROOT = Path(__file__).parents[2]
NAMES = list(EXPERIMENTS)
EFFECTS = {name: f for experiment in EXPERIMENTS.values() for name, f in experiment.EFFECTS.items()}


def claim(smallest=1.0, at_most=False):
    return Claim("x", "population", "A sentence.", "a source", "a metric", smallest, "AP", at_most)


# the ledger


@pytest.mark.parametrize(
    "effects, word",
    [
        ([], ""),
        ([1.2], "hint"),
        ([-1.2], "hint"),
        ([1.5, 1.6, 1.7], "seen"),
        ([0.2, 3.0, 1.9], "not seen"),  # the interval holds zero
        ([0.5, 0.6, 0.7], "absent"),  # all of the interval is too small
        ([0.5, 0.6, 0.9], "not seen"),  # not all of it
        ([-1.5, -1.6, -1.7], "opposite"),
        ([2.0, 2.0, 2.0], "not seen"),  # of a spread that is not known
        ([0.0, 0.0], "not seen"),
    ],
)
def test_verdict(effects, word):
    assert judge(claim(), effects).word == word


@pytest.mark.parametrize(
    "effects, word",
    [([0.9], "hint"), ([1.1], "hint"), ([0.1, 0.2, 0.3], "seen"), ([0.1, 0.9, 0.5], "not seen"),
     ([3.0, 3.1, 3.2], "opposite"), ([-3.0, -3.1, -3.2], "seen")],
)  # fmt: skip
def test_verdict_of_at_most(effects, word):
    assert judge(claim(at_most=True), effects).word == word


@pytest.mark.parametrize("number", [2, 3, 5, 12, 30, 100])
def test_interval_is_that_of_a_t_test(number):
    effects = np.random.default_rng(number).normal(2.0, 3.0, number)
    verdict, test = judge(claim(), effects.tolist()), ttest_1samp(effects, 0)
    assert (verdict.low, verdict.high) == pytest.approx(test.confidence_interval(0.95), rel=1e-12)


def test_ledger_is_in_the_docs():
    text = (ROOT / "docs" / "claims.md").read_text()
    for c in CLAIMS:
        sign = "at most" if c.at_most else "at least"
        section = text.partition(f"### {c.name}\n")[2].partition("\n### ")[0]
        for words in (c.sentence, c.source, c.metric, f"{sign} {c.smallest:g} {c.unit}"):
            assert words in section, c.name


def test_every_claim_has_an_effect():
    names = [c.name for c in CLAIMS]
    assert len(set(names)) == len(names)
    claimed = defaultdict(set)
    for data in DATA:
        for name, experiment in experiments_on(data).items():
            found = {c.name for c in claims_of([name], data)}
            assert found and found <= set(experiment.EFFECTS)
            if data == "shapes":
                without = {"leak, box AP"} if name == "leakage" else set()
                assert found == set(experiment.EFFECTS) - without
            claimed[experiment] |= found
    assert all(found == set(experiment.EFFECTS) for experiment, found in claimed.items())
    assert {data for c in CLAIMS for data in c.data} == set(DATA)


# what is run


@pytest.fixture
def setting(tmp_path):
    return Setting("shapes", "torchvision", tmp_path / "runs")


@pytest.mark.parametrize("data", DATA)
def test_plans(tmp_path, monkeypatch, data):
    """Names stand for one command each, and what a step needs or reads comes before it."""
    monkeypatch.chdir(tmp_path)  # where the configs are the packaged ones
    setting = Setting(data, "torchvision", tmp_path / "runs")
    experiments, steps = experiments_on(data), {}
    for experiment in experiments.values():
        for step in experiment.plan(setting, 1):
            assert steps.setdefault(step.name, step) == step
            assert all(needed in steps for needed in step.needs)
            config = step.command[step.command.index("--config-file") + 1]
            assert find_config(config) == str(ROOT / config) and Path(ROOT / config).is_file()
            assert step.command[:2] == ("-m", "bn_det") and step.command[2] in COMMANDS
            read = [a for a in step.command if a.endswith(".pth") and "precise.pth" in a]
            if step.command[2] == "loss" and read:
                assert Path(read[0]).parent.name == "precise"
                assert Path(step.name).with_name("precise").as_posix() in step.needs
    merged = plan(list(experiments), setting, [1, 2])
    assert len({s.name for s in merged}) == len(merged) == 2 * len(steps)
    separately = sum(len(of.plan(setting, 1)) for of in experiments.values())
    assert len(steps) < separately, "experiments share trainings"


@pytest.mark.parametrize(
    "data, num_gpus", [("shapes", 8), ("cells", 8), *(("coco", n) for n in range(2, 17))]
)
def test_trainings_keep_the_checkpoints_that_are_looked_at(tmp_path, data, num_gpus):
    """By the period and the length that their commands and configs say."""
    setting = Setting(data, "torchvision", tmp_path / "runs", num_gpus)
    steps = {s.name: s for s in plan(list(experiments_on(data)), setting, [1])}
    looked_at = 0
    for step in steps.values():
        files = [a for a in step.command if "/model_0" in a]
        if files:
            of = steps[step.needs[0]].command
            opts = dict(pairwise(of))  # the last value of a key counts
            file = of[of.index("--config-file") + 1]
            solver = CfgNode.load_yaml_with_base(find_config(file))["SOLVER"]
            end = int(opts.get("SOLVER.MAX_ITER", solver["MAX_ITER"]))
            iteration = int(Path(files[0]).stem.removeprefix("model_")) + 1
            period = int(opts.get("SOLVER.CHECKPOINT_PERIOD") or _period(find_config(file)))
            assert iteration % period == 0 and iteration <= end
            looked_at += 1
    assert looked_at > 14


def _period(file):
    return CfgNode.load_yaml_with_base(file)["SOLVER"]["CHECKPOINT_PERIOD"]


def test_fewer_gpus():
    file = str(ROOT / "configs" / "leakage" / "head_BN.yaml")
    assert scaled(file, (), 8) == ()
    found = dict(
        zip(*[iter(scaled(file, ("SOLVER.CHECKPOINT_PERIOD", "90000"), 2))] * 2, strict=True)
    )
    assert found == {
        "SOLVER.IMS_PER_BATCH": "4",
        "SOLVER.BASE_LR": "0.005",
        "SOLVER.STEPS": "(840000, 1000000)",
        "SOLVER.MAX_ITER": "1080000",
        "SOLVER.WARMUP_ITERS": "4000",
        "SOLVER.CHECKPOINT_PERIOD": "360000",
        "TEST.EVAL_PERIOD": "0",
        "SOLVER.FREEZE_BN_ITER": "0",
    }
    assert "4 images a step instead of 16; the learning rate is scaled by 0.25" in what_changes(2)


@pytest.mark.parametrize("num_gpus", range(1, 17))
def test_iterations_on_other_numbers_of_gpus(num_gpus):
    """Within 1 % of the same epochs; multiples of a period are of its scaled one."""
    for published in (1, 1000, 5000, 60000, 67500, 210000, 270000):
        exact = published * 8 / num_gpus
        assert scaled_iterations(published, num_gpus) == pytest.approx(exact, rel=0.01, abs=1)
    for period in (4500, 9000, 22500, 27000, 90000):
        once = scaled_iterations(period, num_gpus)
        assert all(scaled_iterations(k * period, num_gpus) == k * once for k in range(11))


@pytest.mark.parametrize("data, num_gpus", [("shapes", 8), ("coco", 8), ("coco", 2)])
def test_precise_bn_has_as_many_images_in_all_that_is_compared(tmp_path, data, num_gpus):
    setting, found = Setting(data, "torchvision", tmp_path, num_gpus), {}
    for name in ("multi-domain", "population", "batch-size"):
        for step in EXPERIMENTS[name].plan(setting, 1):
            if step.command[2] == "recompute" and "--num-iters" not in step.command:
                opts = dict(pairwise(step.command))
                keys = (f"TEST.PRECISE_BN.{key}" for key in ("IMS_PER_BATCH", "NUM_ITER"))
                found.setdefault(name, set()).add(math.prod(int(opts[key]) for key in keys))
    images = {640 if data == "shapes" else 3200}
    if data == "coco":  # a frozen training's are estimated in it
        steps = EXPERIMENTS["frozen"].plan(setting, 1)
        (frozen_,) = (step for step in steps if step.name.endswith("frozen-seed1"))
        opts = dict(pairwise(frozen_.command))
        assert 2 * num_gpus * int(opts["TEST.PRECISE_BN.NUM_ITER"]) == 3200
    assert found == {"multi-domain": images, "population": images, "batch-size": images}
    training = population.training(setting, 1, "base")
    for n in (32, 1024, 2048):
        opts = dict(pairwise(population.samples_step(training, n).command))
        assert int(opts["--num-iters"]) * int(opts["TEST.PRECISE_BN.IMS_PER_BATCH"]) == n


@pytest.mark.parametrize("num_gpus, sizes", [(8, (2, 16)), (4, (2, 8))])
def test_batch_sizes_on_coco_are_those_of_a_gpu_and_of_all(tmp_path, num_gpus, sizes):
    setting = Setting("coco", "detectron2", tmp_path, num_gpus)
    assert batch_size.sizes(setting) == sizes
    configs = [batch_size.training(setting, 1, size).config for size in sizes]
    assert [Path(config).name for config in configs] == ["BN.yaml", "SyncBN.yaml"]
    names = {claim.name for claim in claims_of(["batch-size"], "coco")}
    assert names == {"small batch, population", "batch at test"}


@pytest.mark.parametrize("here, on_cpu", [(0, False), (1, True), (2, False)])
def test_two_processes_where_there_is_one_gpu(setting, monkeypatch, here, on_cpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    for step in plan(["leakage"], setting, [1]):
        assert (("MODEL.DEVICE", "cpu") in pairwise(step.command)) == on_cpu
    assert not any("cpu" in step.command for step in plan(["multi-domain"], setting, [1]))


# the runner


def script(folder, text):
    """A command that a step can be: it gets the folder and what follows."""
    path = folder / "tool.py"
    path.write_text(f"import sys, time, pathlib\n{text}\n")
    return str(path)


def test_runner_runs_each_step_once_and_in_order(tmp_path):
    log = tmp_path / "log"
    tool = script(tmp_path, f"open({str(log)!r}, 'a').write(sys.argv[1])")
    a, b, c = (
        Step("a", (tool, "a"), 1),
        Step("a/b", (tool, "b"), 1, ("a",)),
        Step("c", (tool, "c"), 1),
    )
    for _ in range(2):
        runner = Runner([b._replace(name="a/b"), a, c][::-1], tmp_path / "runs", jobs=1)
        assert runner.run() == [] and set(runner.outcomes) == {"a", "a/b", "c"}
        ran_with = [(of.versions["torch"], of.threads) for of in runner.outcomes.values()]
        threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        assert set(ran_with) == {(metadata.version("torch"), threads)}
    assert sorted(log.read_text()) == ["a", "b", "c"]
    assert log.read_text().index("a") < log.read_text().index("b")


def test_runner_fills_its_jobs(tmp_path):
    """Two steps of one process meet; one of two processes is alone."""
    meet = "import os; me, other = sys.argv[1:3]; pathlib.Path(me).touch()\n"
    meet += "end = time.time() + 30\nwhile other and not os.path.exists(other):\n"
    meet += "    assert time.time() < end; time.sleep(0.05)"
    tool = script(tmp_path, meet)
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    steps = [Step("x", (tool, x, y), 1), Step("y", (tool, y, x), 1)]
    assert Runner(steps, tmp_path / "runs", jobs=2).run() == []
    alone = script(
        tmp_path,
        "import os; open(sys.argv[1], 'x'); time.sleep(0.5); os.remove(sys.argv[1])",
    )
    steps = [Step(n, (alone, str(tmp_path / "z")), 1, processes=2) for n in ("p", "q")]
    assert Runner(steps, tmp_path / "runs", jobs=2).run() == []


def test_time_left_is_told_by_steps_of_its_kind(tmp_path, capsys):
    """A training of ten times its estimate says nothing of measurements, once one has ended."""
    step = Step("a", ("-c", "", "train"), 100)
    runner = Runner([step._replace(name=n) for n in "ab"], tmp_path / "runs", jobs=2)
    other = [Step(f"c{k}", ("-c", ""), 50) for k in range(100)]
    runner.steps += other
    runner.done = [(step, 1000.0)]
    runner.outcomes["a"] = Outcome(1000.0, None)
    assert runner._left() == "about 7:05:00 left"  # (1000 + 100 * 500) / 2
    runner.done.append((other[0], 25.0))
    runner.outcomes["c0"] = Outcome(25.0, None)
    assert runner._left() == "about 0:28:58 left"  # (1000 + 99 * 25) / 2
    runner.done = [(step._replace(seconds=0), 1000.0)]
    assert runner._left() == "100 steps left"  # as on COCO, where times are not known


def test_steps_that_wait_for_nobody_take_as_long_as_the_longest():
    one = Step("a", ("tool",), 100)
    for steps, seconds in (([one], 100), ([one, one, one], 150), ([], 0)):
        assert estimate(steps, 2).total_seconds() == seconds
    assert estimate([one._replace(processes=2)] * 2, 2).total_seconds() == 200


def test_a_failure_leaves_out_what_needs_it(tmp_path, capsys):
    tool = script(tmp_path, "sys.exit('error: no luck' if sys.argv[1] == 'a' else 0)")
    a, b, c = (
        Step("a", (tool, "a"), 1),
        Step("b", (tool, "b"), 1, ("a",)),
        Step("c", (tool, "c"), 1),
    )
    runner = Runner([a, b, c], tmp_path / "runs", jobs=1)
    failures = runner.run()
    assert [(f.step, f.reason) for f in failures] == [(a, "exit code 1: error: no luck")]
    assert set(runner.outcomes) == {"c"}
    assert "FAILED a" in capsys.readouterr().out
    # Again only what is missing is tried.
    assert [s.name for s in Runner([a, b, c], tmp_path / "runs", jobs=1).pending()] == ["a", "b"]


def test_a_step_that_nothing_can_start(tmp_path):
    with pytest.raises(ValueError, match=r"no step makes what these need: \['other'\]"):
        Runner([Step("a", ("tool",), 1, ("other",))], tmp_path / "runs", jobs=1).run()


@pytest.mark.parametrize(
    "words, iteration",
    [
        ("FloatingPointError: Loss became infinite or NaN at iteration=124!", 124),
        ("FloatingPointError: loss not finite at iteration 65: {'total_loss': nan}", 65),
    ],
)
def test_a_training_that_diverges(tmp_path, words, iteration):
    command = ("-c", f"import sys; sys.exit({words!r})", "train")
    a, b = Step("a", command, 1), Step("b", command, 1, ("a",))
    runner = Runner([a, b], tmp_path / "runs", jobs=1)
    assert runner.run() == [] and runner.outcomes["a"].diverged_at == iteration
    assert set(runner.outcomes) == {"a"} and runner.pending() == []
    assert Runner([a, b], tmp_path / "runs", jobs=1).pending() == [], "it is known"


def test_an_interrupted_training_is_resumed(tmp_path):
    # The first time it leaves a checkpoint and is killed.
    code = (
        "import os, sys, pathlib, signal\n"
        "folder = pathlib.Path(sys.argv[-1])\n"
        "if '--resume' in sys.argv: sys.exit(0)\n"
        "(folder / 'last_checkpoint').touch()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    runs = tmp_path / "runs"
    step = Step("a", ("-c", code, "train", "OUTPUT_DIR", str(runs / "a")), 1)
    (runs / "a").mkdir(parents=True)
    (runs / "a" / "metrics.json").write_text("of a run without a checkpoint")
    (failure,) = Runner([step], runs, jobs=1).run()
    assert failure.reason == "killed by SIGKILL: no output"
    assert not (runs / "a" / "metrics.json").exists()
    (runs / "a" / "metrics.json").touch()
    other = step._replace(command=(*step.command, "SEED", "2"))
    with pytest.raises(InputError, match="has another command"):
        Runner([other], runs, jobs=1).run()
    begun = json.loads((runs / "a" / "command.json").read_text())
    now = begun["versions"]["torch"]
    begun |= {"versions": {**begun["versions"], "torch": "1.0"}, "threads": "7"}
    (runs / "a" / "command.json").write_text(json.dumps(begun))
    assert Runner([step], runs, jobs=1).run() == []
    assert (runs / "a" / "metrics.json").exists(), "lines are appended to it"
    outcome = Runner([step], runs, jobs=1).outcomes["a"]
    assert outcome.resumed and outcome.versions["torch"] == f"1.0, {now}"
    assert outcome.threads.startswith("7, ")
    with pytest.raises(InputError, match="has another command"):
        Runner([other], runs, jobs=1)


def test_runs_of_other_settings_are_not_mixed_in(tmp_path):
    """What a config file, or a base of it, said when a step was run."""
    base, config, tool = tmp_path / "base.yaml", tmp_path / "config.yaml", script(tmp_path, "")
    base.write_text("SOLVER: {BASE_LR: 0.02}\n")
    config.write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\n")
    step, runs = Step("a", (tool, "--config-file", str(config)), 1), tmp_path / "runs"
    assert Runner([step], runs, jobs=1).run() == []
    config.write_text("_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 9  # the same\n")
    assert Runner([step], runs, jobs=1).pending() == []
    base.write_text("SOLVER: {BASE_LR: 0.01}\n")
    with pytest.raises(InputError, match=r"SOLVER.BASE_LR was 0.02 in its config, and is 0.01"):
        Runner([step], runs, jobs=1)
    base.write_text("SOLVER: {BASE_LR: 0.02}\nSEED: 3\n")
    with pytest.raises(InputError, match=r"SEED was 'not there' in its config, and is 3"):
        Runner([step], runs, jobs=1)
    done = runs / "a" / "done.json"
    done.write_text(json.dumps({"command": step.command, "seconds": 1.0, "diverged_at": None}))
    with pytest.raises(InputError, match="does not say with which settings it was run"):
        Runner([step], runs, jobs=1)
    ended = {"command": [], "config": {}, "diverged_at": None, "seconds": 1.0}
    spoilt = [
        {**ended, key: value}
        for key, values in {
            "seconds": (None, "1.0", math.nan),
            "diverged_at": ("x", 1.5),
            "versions": (3, {"torch": 3}),
            "threads": (3,),
            "data": ([], None),
        }.items()
        for value in values
    ]
    for text in ("", "{", "[]", "{}", '{"command": []}', '{"command": null}', *spoilt):
        done.write_text(text if isinstance(text, str) else json.dumps(text))
        words = r"--runs: .*a/done.json cannot be read \(.*\); remove its folder"
        with pytest.raises(InputError, match=words):
            Runner([step], runs, jobs=1)


def test_runs_on_other_data_are_not_mixed_in(tmp_path, monkeypatch):
    """Annotations that are others under the same name; as they are drawn while a step runs, too."""
    names = "shapes_val", "shapes_train"
    for folder, text in (("one", "[1]"), ("two", "[2]"), ("copy", "[1]")):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / folder))
        for name in names:
            path = Path(builtin_sources()[name].json_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    val = Path(builtin_sources()["shapes_val"].json_file)
    path = tmp_path / "one" / val.relative_to(tmp_path / "copy")
    path.unlink()
    draw = script(tmp_path, "pathlib.Path(sys.argv[1]).write_text('[1]')")
    config = tmp_path / "config.yaml"
    config.write_text("DATASETS: {TRAIN: ['shapes_train'], TEST: ['shapes_val']}\n")
    step = Step("a", (draw, str(path), "--config-file", str(config)), 1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "one"))
    runs = tmp_path / "runs"
    assert Runner([step], runs, jobs=1).run() == []
    noted = json.loads((runs / "a" / "done.json").read_text())["data"]
    assert noted.keys() == set(names) and len(set(noted.values())) == 1
    for folder in ("copy", "none"):  # what is not there is not used here
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / folder))
        assert Runner([step], runs, jobs=1).pending() == []
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "two"))
    words = rf"--runs: {runs}/a was run on other data: the annotations of shapes_train are not"
    with pytest.raises(InputError, match=words):
        Runner([step], runs, jobs=1)


def test_data_that_changes_while_a_training_is_interrupted(tmp_path, monkeypatch):
    """Also where the data is drawn anew, so that nothing is there when it is resumed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = Path(builtin_sources()["shapes_train"].json_file)
    path.parent.mkdir(parents=True)
    code = (
        "import os, sys, pathlib, signal\n"
        "words = [word for word in sys.argv if word != '--resume']\n"
        "folder, path = map(pathlib.Path, words[-2:])\n"
        "if '--resume' in sys.argv: path.write_text('[2]'); sys.exit(0)\n"
        "(folder / 'last_checkpoint').touch()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text("DATASETS: {TRAIN: ['shapes_train']}\n")
    runs = tmp_path / "runs"
    own = ("--config-file", str(config), "OUTPUT_DIR", str(runs / "a"), str(path))
    step = Step("a", ("-c", code, "train", *own), 1)
    path.write_text("[1]")
    (failure,) = Runner([step], runs, jobs=1).run()
    assert failure.reason.startswith("killed by SIGKILL")
    path.write_text("[2]")
    with pytest.raises(InputError, match="was run on other data: the annotations of shapes_train"):
        Runner([step], runs, jobs=1).run()
    path.unlink()
    (failure,) = Runner([step], runs, jobs=1).run()
    assert "was run on other data" in failure.reason and not (runs / "a" / "done.json").exists()


def test_data_is_what_a_step_names(tmp_path, monkeypatch):
    """By its options rather than by its config, and data sets of the user's."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in ("shapes_train", "shapes_val", "shapes_night_val"):
        path = Path(builtin_sources()[name].json_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "own.json").write_text("own")
    config = {"DATASETS.TRAIN": ["shapes_train"], "DATASETS.TEST": "('shapes_val',)"}
    command = ["-m", "bn_det", "recompute", "--dataset", "shapes_night_val"]
    found = data_used({"command": command, "config": config})
    assert found.keys() == {"shapes_train", "shapes_val", "shapes_night_val"}
    own = ["DATASETS.REGISTER_COCO", f"[['own', '{tmp_path}/own.json', 'images']]"]
    command = ["-m", "bn_det", "train", *own, "DATASETS.TRAIN", "('own',)", "SOLVER.MAX_ITER", "3"]
    found = data_used({"command": command, "config": config})
    assert found == {
        "own": hashlib.sha256(b"own").hexdigest(),
        "shapes_val": hashlib.sha256(b"shapes_val").hexdigest(),
    }


def test_an_interruption_ends_what_runs(tmp_path):
    tool = script(tmp_path, "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)")
    mark = tmp_path / "mark"
    code = (
        "import signal, sys; from pathlib import Path\n"
        # Where the tests run in the background, it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bn_det.reproduce.runner import Runner; from bn_det.reproduce.steps import Step\n"
        f"step = Step('a', ({tool!r}, {str(mark)!r}), 1)\n"
        f"Runner([step], Path({str(tmp_path / 'runs')!r}), 1).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(mark.exists, 60)
    finally:
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt" in error
    left = subprocess.run(["pgrep", "-f", tool], capture_output=True, text=True).stdout
    assert not left and not (tmp_path / "runs" / "a" / "done.json").exists()


# what is made of results


def note_spikes(runs, name, spikes=(), ratio=1.5):
    most = {"iteration": 59, "loss": ratio, "median": 1.0, "ratio": ratio}
    noted = {"largest": most, "spikes": [{**most, "layers": {"head": 13.0}} for _ in spikes]}
    (runs / name / "loss_spikes.json").write_text(json.dumps(noted))


def note_nothing(runs, name):
    """As a training does that has fewer iterations than a median needs."""
    (runs / name / "loss_spikes.json").write_text('{"largest": null, "spikes": []}')


def write_results(setting, steps, rng, iterations=range(14, 1500, 15)):
    """Files as the commands write them, with numbers at random."""
    for step in steps:
        folder = setting.runs / step.name
        folder.mkdir(parents=True, exist_ok=True)

        def ap(step=step):
            if setting.data == "cells" and "--adabn" not in step.command:
                return {name: of_cells() for name in cells(LEFT_OUT, "val")}
            if setting.data == "cells":
                return of_cells()
            return {"bbox": {"AP": rng.uniform(10, 50)}, "segm": {"AP": rng.uniform(10, 50)}}

        def of_cells():
            return {"bbox": {key: rng.uniform(10, 50) for key in METRICS.values()}}

        def estimates(names):
            return {n: {"value": rng.uniform(0.2, 1), "low": 0.0, "high": 1.0} for n in names}

        names = ("population", "batch", "batch - population")
        layers = [
            {
                "name": f"{part}.{k}.norm",
                "num_batches": 16,
                **{key: rng.uniform(0.01, 0.1) for key in
                   ("mean_error", "var_error", "mean_shift", "var_shift")},
            }
            for part in ("backbone.bottom_up", "backbone.fpn_lateral", "head")
            for k in range(9)
        ]  # fmt: skip
        metrics = ("foreground accuracy", "accuracy", "loss")
        files = {
            "train": ("results.json", ap()),
            "recompute": (
                "precise.json",
                {"layers": layers, "results": {"before": ap(), "after": ap()}},
            ),
            "loss": ("loss.json", estimates(names)),
            "leakage": ("leakage.json", {n: estimates(metrics) for n in names}),
            "doctor": (
                "doctor.json",
                {"tried": [{"before": rng.uniform(10, 50), "after": rng.uniform(10, 50)}]},
            ),
        }
        file, content = files[step.command[2]]
        (folder / file).write_text(json.dumps(content))
        if not step.is_training:
            continue
        of_sets = [f"{name}/" for name in cells(LABORATORIES, "val")]
        keys = [f"{of}{task}/AP" for of in (of_sets if setting.data == "cells" else [""])
                for task in ("bbox", "segm")]  # fmt: skip
        lines = []
        for iteration in iterations:
            line = {"iteration": iteration, "total_loss": rng.uniform(0.5, 2), "time": 0.25}
            lines.append({**line, **{key: rng.uniform(10, 50) for key in keys}})
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
        note_nothing(setting.runs, step.name)
        if "-steep-" in step.name:
            note_spikes(setting.runs, step.name, [1], ratio=4.0)


@pytest.fixture
def results(setting):
    steps = plan(NAMES, setting, [1, 2, 3])
    write_results(setting, steps, random.Random(5))
    return Results(setting, {s.name: Outcome(60.0, None) for s in steps}, [1, 2, 3])


def read(results, name, *keys):
    value = json.loads((results.setting.runs / "train" / name).read_text())
    for key in keys:
        value = value[key]
    return value


def test_effects_against_the_files(results):
    """Some effects once more, from the files."""

    def ap(statistics, affine, population):
        name = f"retinanet-{statistics}-affine_{affine}-seed2/precise-{population}/precise.json"
        return read(results, name, "results", "after", "bbox", "AP")

    found = {
        (s, p): ap(s, "shared", p)
        for s in ("shared", "per_domain")
        for p in ("shared", "per_domain")
    }
    expected = min(found["shared", "shared"], found["per_domain", "per_domain"]) - max(
        found["shared", "per_domain"], found["per_domain", "shared"]
    )
    assert EFFECTS["consistent, shared affine"](results, 2) == pytest.approx(expected)

    base = "retinanet-per_domain-affine_shared-seed2"
    gains = []
    for k in (90, 180, 270):
        ap = read(results, f"{base}/precise-{k}/precise.json", "results")
        gains.append(ap["after"]["bbox"]["AP"] - ap["before"]["bbox"]["AP"])
    assert EFFECTS["precise early"](results, 2) == pytest.approx(sum(gains) / 3)

    def error(name, points):
        layers = [
            of for k in points for of in read(results, f"{name}/precise-{k}/precise.json", "layers")
        ]
        return np.mean([[of["mean_shift"], of["var_shift"]] for of in layers])

    points = range(90, 901, 90)
    ratio = error("retinanet-lr_x4-seed2", points) / error(base, points) - 1
    assert EFFECTS["EMA error, rate"](results, 2) == pytest.approx(ratio)
    ratio = error("retinanet-batch_x4-seed2", (75, 150, 225)) / error(base, (270, 630, 900)) - 1
    assert EFFECTS["EMA error, batch"](results, 2) == pytest.approx(ratio)

    def loss(size, data, statistics):
        return read(
            results, f"retinanet-nbs_{size}-seed2/loss-{data}/loss.json", statistics, "value"
        )

    gap = {n: loss(n, "validation", "population") - loss(n, "validation", "batch") for n in (2, 16)}
    expected = (gap[2] - gap[16]) / loss(16, "validation", "population")
    assert EFFECTS["small batch, population"](results, 2) == pytest.approx(expected)
    gap = {n: loss(n, "validation", "population") - loss(n, "train", "population") for n in (4, 16)}
    expected = (gap[16] - gap[4]) / loss(4, "validation", "population")
    assert EFFECTS["large batch"](results, 2) == pytest.approx(expected)

    layers = read(results, "retinanet-nbs_2-seed2/precise/precise.json", "layers")[:9]
    spread = [4 * (of["mean_error"] + of["var_error"]) / 2 for of in layers]
    expected = sum(spread[6:]) / sum(spread[:3]) - 1
    assert EFFECTS["small batch, depth"](results, 2) == pytest.approx(expected)


def test_more_effects_against_the_files(results):
    train = results.setting.runs / "train"

    def leak(head):
        found = read(results, f"mask_rcnn-{head}-seed2/leakage-1500/leakage.json")
        return found["batch - population"]["foreground accuracy"]["value"]

    assert EFFECTS["leak"](results, 2) == leak("BN")
    assert EFFECTS["shuffling"](results, 2) == pytest.approx(leak("BN") - leak("BN_shuffle"))
    assert EFFECTS["SyncBN"](results, 2) == pytest.approx(leak("BN") - leak("SyncBN"))
    lines = (train / "mask_rcnn-BN-seed2" / "metrics.json").read_text().splitlines()
    (end,) = [x["segm/AP"] for x in map(json.loads, lines) if x["iteration"] == 1499]
    batch = read(results, "mask_rcnn-BN-seed2/batch-1500/results.json", "segm", "AP")
    assert EFFECTS["leak, mask AP"](results, 2) == pytest.approx(batch - end)

    def loss(name, statistics):
        return read(results, f"{name}/loss.json", statistics, "value")

    usual = loss("retinanet-nbs_2-seed2/loss-validation", "population")
    frozen_ = loss("retinanet-nbs_2-frozen-seed2/loss-validation", "population")
    expected = (usual - frozen_) / usual
    assert EFFECTS["frozen at the end"](results, 2) == pytest.approx(expected)

    def gap(batches):
        name = f"correlated-{batches}-seed2/loss"
        return loss(name, "population") - loss(name, "batch")

    pairs = (gap("pairs") - gap("random")) / loss("correlated-random-seed2/loss", "population")
    assert EFFECTS["pairs leak"](results, 2) == pytest.approx(pairs)
    twos = loss("correlated-random_ghost-seed2/loss", "population")
    twos = (gap("pairs_across") - gap("random_ghost")) / twos
    found = EFFECTS["groups across categories"](results, 2)
    assert found == pytest.approx(pairs - twos)

    gains = []
    for domain in ("night", "fog", "sensor"):
        name = f"retinanet-per_domain-affine_shared-seed2/adabn-{domain}/precise.json"
        ap = read(results, name, "results")
        gains.append(ap["after"]["bbox"]["AP"] - ap["before"]["bbox"]["AP"])
    assert EFFECTS["AdaBN"](results, 2) == pytest.approx(sum(gains) / 3)

    def end_of(images, clip):
        lines = (train / f"nf-batch_{images}-{clip}-seed2" / "metrics.json").read_text()
        lines = [json.loads(line) for line in lines.splitlines()]
        return np.mean([x["total_loss"] for x in lines if x["iteration"] >= 0.9 * 1500])

    factors = {0.16: "agc_0.16", 0.04: "agc_0.04", 0.01: "agc_0.01"}
    gap = end_of(32, "no_agc") - end_of(8, "no_agc")
    gap -= end_of(32, "agc_0.01") - end_of(8, "agc_0.01")
    assert EFFECTS["AGC, large batch"](results, 2) == pytest.approx(gap / end_of(8, "no_agc"))
    best = {n: min(factors, key=lambda f: end_of(n, factors[f])) for n in (8, 32)}
    expected = math.log2(best[8] / best[32])
    assert EFFECTS["AGC, clip factor"](results, 2) == pytest.approx(expected, abs=1e-9)


def test_a_training_that_diverged_counts_with_its_first_loss(results):
    of = normalizer_free.training(results.setting, 1, 32, None)
    results.outcomes[of.name] = Outcome(5.0, 40)
    lines = [json.loads(x) for x in (results.setting.runs / of.name / "metrics.json").open()]
    assert normalizer_free.final_loss(results, 1, 32, None) == lines[0]["total_loss"]
    assert normalizer_free.ap(results, 1, 32, None) is None
    usual = normalizer_free.training(results.setting, 1, 8, None)
    lines = [json.loads(x) for x in (results.setting.runs / usual.name / "metrics.json").open()]
    last = [line["total_loss"] for line in lines if line["iteration"] >= 0.9 * 1500]
    assert normalizer_free.final_loss(results, 1, 8, None) == pytest.approx(average(last))


def test_a_model_that_detects_nothing_has_ap_0(results):
    of = multi_domain.population_step(
        multi_domain.training(results.setting, 1, "shared", "shared"), "shared"
    )
    path = results.setting.runs / of.name / "precise.json"
    content = json.loads(path.read_text())
    content["results"]["after"]["bbox"]["AP"] = None
    path.write_text(json.dumps(content))
    assert multi_domain.ap(results, 1, "shared", "shared", "shared") == 0.0
    del results.outcomes[of.name]
    assert multi_domain.ap(results, 1, "shared", "shared", "shared") is None

    # Detectron2 has no masks of a model that detects nothing.
    of = leakage.batch_step(leakage.training(results.setting, 1, "BN"), 1500)
    (results.setting.runs / of.name / "results.json").write_text('{"bbox": {"AP": null}}')
    assert leakage.batch_ap(results, 1, "BN", 1500, "segm") == 0.0
    of = leakage.training(results.setting, 1, "BN")
    lines = '{"iteration": 499, "bbox/AP": NaN}\n'
    (results.setting.runs / of.name / "metrics.json").write_text(lines)
    assert leakage.population_ap(results, 1, "BN", 500, "segm") == 0.0


def test_ap_over_a_training(results):
    """At the end Detectron2 evaluates after the last iteration, torchvision in it."""
    of = population.slow_training(results.setting, 1)
    path = results.setting.runs / of.name / "metrics.json"
    lines = [{"iteration": 89, "bbox/AP": 12.5, "time": 1.0}, {"iteration": 899, "time": 1.0}]
    for last in (899, 900):
        end = {"iteration": last, "bbox/AP": math.nan if last == 899 else 30.5}
        path.write_text("".join(json.dumps(line) + "\n" for line in (*lines, end)))
        assert results.ap_at(of, "bbox", 90) == 12.5
        assert results.ap_at(of, "bbox", 180) is None
        assert results.ap_at(of, "bbox", 900) == (0.0 if last == 899 else 30.5)


def test_report(results, tmp_path):
    steps = plan(NAMES, results.setting, results.seeds)
    report = make_report("all", NAMES, results, steps, [])
    assert all(verdict.word for _, verdict in report.ledger)
    write_report(report, tmp_path / "report")
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {c["name"] for c in content["claims"]} == {c.name for c in claims_of(NAMES, "shapes")}
    assert all(
        len(c["effects"]) == 3 and c["low"] < c["mean"] < c["high"] for c in content["claims"]
    )
    assert set(content["steps"]) == {s.name for s in steps}
    page = (tmp_path / "report" / "report.html").read_text()
    pictures = [i for show in report.shows.values() for i in show if isinstance(i, Picture)]
    assert report.picture is not None
    pictures.append(report.picture)  # of the ledger
    assert page.count("data:image/png;base64,") == len(pictures) > 5
    assert "the published setting is 8" not in page and "of arXiv 2105.07576. They" not in page
    assert "src='http" not in page and "href=" not in page, "self-contained"
    for show in report.shows.values():
        for table in show:
            if isinstance(table, Table):
                for row in table.rows:
                    assert len(row.cells) == len(table.columns) == len(table.digits)
                    assert len(row.label) == len(table.labels)
                    assert row.steps[0].command[3:] and row.steps[0].name in content["steps"]
                    # What its commands read is made by commands that are shown.
                    folders = {str(results.setting.runs / s.name) for s in row.steps}
                    read = {a for s in row.steps for a in s.command if a.endswith(".pth")}
                    assert {str(Path(a).parent) for a in read} <= folders
    for c in claims_of(NAMES, "shapes"):
        assert c.sentence in page.replace("&#x27;", "'")
    for picture in pictures:
        assert (tmp_path / "report" / f"{picture.name}.png").stat().st_size > 5000


def test_seeds_with_loss_spikes_do_not_count(results, tmp_path):
    """For claims whose effects are of that training, unless they are on what a training bears."""
    before = {c.name: verdict_of(c, results) for c in claims_of(NAMES, "shapes")}
    leapt = multi_domain.training(results.setting, 2, "shared", "shared")
    note_spikes(results.setting.runs, leapt.name, [1], ratio=4.5)
    for step in normalizer_free.plan(results.setting, 1):
        note_spikes(results.setting.runs, step.name, [1])
    note_spikes(
        results.setting.runs, multi_domain.training(results.setting, 1, "shared", "shared").name
    )
    for c in claims_of(NAMES, "shapes"):
        verdict = verdict_of(c, results)
        if c.name == "consistent, shared affine":
            first, _, third = before[c.name].effects
            assert verdict.effects == (first, third) and verdict.left_out == (2,)
            assert effect_text(verdict).endswith("(2; the loss leapt in seed 2)")
        elif c.name == "loss spike, shared statistics":  # what is leapt from is of that training
            assert verdict.seeds == (1, 3) and verdict.unknown == (2,)
        else:
            assert verdict == before[c.name], c.name
    report = make_report("all", NAMES, results, plan(NAMES, results.setting, results.seeds), [])
    first, *lines = spikes_text(report)
    assert first.startswith("Loss spikes in 15 of 16 trainings; ") and len(lines) == 15
    assert f"median: 4.50, {leapt.name} at iteration 59" in first
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"<p class='warning'>{lines[0]}" in page and "head 13 times" in page
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["loss_spikes"][leapt.name]["largest"]["ratio"] == 4.5


@pytest.mark.parametrize("spikes", [False, True])
def test_a_training_that_diverged(results, tmp_path, spikes):
    """Whichever it is, there is a report; its seed is named, and does not count."""
    steps, reads = plan(NAMES, results.setting, results.seeds), defaultdict(set)
    for claim in claims_of(NAMES, "shapes"):
        for name in results.with_trainings(EFFECTS[claim.name], 2)[1]:
            if not claim.with_spikes:
                reads[name].add(claim.name)
    assert len(reads) > 10
    for training in [step for step in steps if step.is_training and "seed2" in step.name]:
        outcomes = {s.name: results.outcomes[s.name] for s in steps if training.name not in s.needs}
        outcomes[training.name] = Outcome(60.0, 55)
        folder = results.setting.runs / training.name
        kept = shutil.copytree(folder, tmp_path / training.name)
        (folder / "results.json").unlink()
        if spikes:
            note_spikes(results.setting.runs, training.name, [1])
        of = Results(results.setting, outcomes, results.seeds)
        report = make_report("all", NAMES, of, steps, [])
        found = {claim.name: verdict for claim, verdict in report.ledger}
        out = {name for name, verdict in found.items() if verdict.left_out}
        assert all(found[name].left_out == (2,) and found[name].seeds == (1, 3) for name in out)
        assert out == reads[training.name]
        if "-steep-" in training.name:  # a training that diverged costs all of its AP
            assert found["loss spike, shared statistics"].seeds == (1, 2, 3)
        shutil.rmtree(folder)
        kept.rename(folder)
    write_report(report, tmp_path / "report")
    json.loads((tmp_path / "report" / "results.json").read_text(), parse_constant=pytest.fail)


def test_trainings_that_diverged_are_told(results, tmp_path):
    """And that steps are missing because of them; also where no loss was looked at."""
    steps = plan(["multi-domain"], results.setting, [1])
    of = multi_domain.training(results.setting, 1, "shared", "shared")
    outcomes = {s.name: results.outcomes[s.name] for s in steps if of.name not in s.needs}
    outcomes[of.name] = Outcome(60.0, 12)
    found = Results(results.setting, outcomes, [1])
    report = make_report("x", ["multi-domain"], found, steps, [])
    told = f"{of.name}: diverged: its loss was not finite at iteration 12"
    none = "Loss spikes: no training has more than 50 iterations to look at, and 1 diverged"
    assert spikes_text(report) == [none, told]
    missing = sum(of.name in s.needs for s in steps)
    assert f"{missing} of 12 steps are missing, {missing} of them as their trainings diverged." in (
        warnings_of(report)
    )
    note_spikes(
        results.setting.runs,
        next(s.name for s in steps if "per_domain" in s.name and s.is_training),
    )
    report = make_report("x", ["multi-domain"], found, steps, [])
    first, line = spikes_text(report)
    assert first.startswith("Loss spikes in 0 of 1 trainings, and 1 diverged; the largest")
    write_report(report, tmp_path)
    assert line == told and told in (tmp_path / "report.html").read_text()


def test_a_training_whose_losses_are_not_noted(results):
    """It may have leapt: its seed would count, or not, by a file that is gone."""
    of = multi_domain.training(results.setting, 1, "shared", "shared")
    path = results.setting.runs / of.name / "loss_spikes.json"
    path.unlink()
    with pytest.raises(InputError, match=f"^--runs: {path} is not there; remove {path.parent}, "):
        make_report("x", ["multi-domain"], results, [of.step], [])


@pytest.mark.parametrize("ap", [3, {"AP": "x"}, {"AP": [1]}])
def test_ap_that_is_no_number(results, ap):
    of = multi_domain.training(results.setting, 1, "shared", "shared")
    step = multi_domain.population_step(of, "shared")
    path = results.setting.runs / step.name / "precise.json"
    path.write_text(json.dumps({"results": {"before": {"bbox": ap}, "after": {"bbox": ap}}}))
    with pytest.raises(InputError, match=f"^--runs: {path} has no AP under results.*; remove"):
        make_report("x", ["multi-domain"], results, [of.step], [])


def test_the_versions_are_those_of_the_runs(results, tmp_path):
    steps = plan(["domain-shift"], results.setting, results.seeds)
    report = make_report("domain-shift", ["domain-shift"], results, steps, [])
    write_report(report, tmp_path)
    assert "What it ran with was not noted" in (tmp_path / "report.html").read_text()
    for step, version in zip(steps, ("2.13.0", "2.14.1"), strict=False):
        results.outcomes[step.name] = Outcome(1.0, None, {"torch": version}, "1")
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["versions"] == {
        "torch": "2.13.0, 2.14.1"
    }
    assert "torch 2.13.0, 2.14.1" in (tmp_path / "report.html").read_text()


def test_a_training_that_was_resumed_is_told(results):
    steps = plan(["domain-shift"], results.setting, results.seeds)
    name = steps[0].name
    results.outcomes[name] = results.outcomes[name]._replace(resumed=True)
    (told,) = warnings_of(make_report("domain-shift", ["domain-shift"], results, steps, []))
    assert told.startswith(f"Interrupted and resumed: `{name}`. On Detectron2 the images come")


def test_seeds_whose_effect_is_not_known_are_named(results):
    """A step that has failed in the first seed leaves the others their numbers."""
    step = multi_domain.population_step(
        multi_domain.training(results.setting, 1, "shared", "shared"), "shared"
    )
    outcomes = {name: of for name, of in results.outcomes.items() if name != step.name}
    (claim,) = (c for c in CLAIMS if c.name == "consistent, shared affine")
    verdict = verdict_of(claim, Results(results.setting, outcomes, results.seeds))
    assert verdict.seeds == (2, 3) and verdict.unknown == (1,)
    assert effect_text(verdict).endswith("(2; none of seed 1)")
    nothing = verdict_of(claim, Results(results.setting, {}, results.seeds))
    assert effect_text(nothing) == "not measured"


def test_tables_have_the_seeds_of_their_experiment(results):
    """With --decide others may go on, which share some of its trainings."""
    report = make_report("all", NAMES, results, [], [], numbers={"multi-domain": 2})
    rows = {name: show[0].rows[0].cells[0] for name, show in report.shows.items()}
    assert len(rows["multi-domain"]) == 2 and len(rows["loss-spike"]) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", "{"])
@pytest.mark.parametrize("file", ["results.json", "precise.json", "loss_spikes.json"])
def test_damaged_results(results, file, text):
    of = multi_domain.training(results.setting, 1, "shared", "shared")
    step = multi_domain.population_step(of, "shared") if file == "precise.json" else of.step
    folder = results.setting.runs / step.name
    (folder / file).write_text(text)
    if file == "results.json" and text == "{}":  # nothing was detected
        assert multi_domain.ema_ap(results, 1, "shared", "shared") == 0.0
        return
    with pytest.raises(InputError, match=f"^--runs: {folder}/{file} .*; remove {folder}, and the"):
        make_report("x", ["multi-domain"], results, [of.step], [])


def test_what_a_single_batch_and_an_infinite_ema_leave_open(results):
    for step in plan(["population", "batch-size"], results.setting, [1]):
        path = results.setting.runs / step.name / "precise.json"
        if path.is_file():
            content = json.loads(path.read_text())
            content["layers"][0].update(mean_error=None, var_shift=None)
            path.write_text(json.dumps(content))
    names = ["population", "batch-size"]
    report = make_report("x", names, results, plan(names, results.setting, results.seeds), [])
    unknown = {claim.name for claim, of in report.ledger if of.unknown == (1,)}
    assert unknown == {"EMA error, rate", "EMA error, batch", "small batch, depth"}


def test_the_command_reports_what_has_been_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = Setting("shapes", "torchvision", tmp_path / "runs")
    steps = plan(["domain-shift"], setting, [1])
    write_results(setting, steps, random.Random(5))
    for step in steps:
        noted = {**settings_of(step), "seconds": 60.0, "diverged_at": None}
        (setting.runs / step.name / "done.json").write_text(json.dumps(noted))
    args = ["domain-shift", "--host", "torchvision", "--runs", setting.runs, "--output", "report"]
    args += ["--seeds", 1]
    assert "0 of 4 steps are to be run" in run_here("tools/reproduce.py", *args, "--dry-run").stdout
    done = run_here("tools/reproduce.py", *args)
    assert done.returncode == 0, done.stderr
    content = json.loads(Path("report", "results.json").read_text())
    assert [c["name"] for c in content["claims"]] == ["AdaBN"] and not content["failed"]
    assert Path("report", "domain_shift.png").is_file()
    assert (
        "| hint, " in done.stdout and "td class='hint'" in Path("report", "report.html").read_text()
    )


@pytest.mark.parametrize(
    "effect, at_most, text",
    [
        (1.2, False, "hint, for"), (-1.2, False, "hint, against"), (0.9, False, "hint, of neither"),
        (-0.9, False, "hint, of neither"), (0.9, True, "hint, for"), (1.1, True, "hint, against"),
    ],
)  # fmt: skip
def test_which_side_a_hint_is_on(effect, at_most, text):
    claim = Claim("x", "population", "", "", "", 1.0, "AP", at_most)
    assert word_text(claim, judge(claim, [effect])) == text
    assert word_text(claim, judge(claim, [])) == "-"
    assert word_text(claim, judge(claim, [2.0, 2.1])) in ("seen", "opposite", "not seen")


def test_the_ledger_says_what_it_is_of(results, tmp_path):
    setting = results.setting._replace(opts=("SOLVER.MAX_ITER", "12"))
    steps = plan(["domain-shift"], results.setting, results.seeds)
    of = Results(setting, results.outcomes, results.seeds)
    report = make_report("domain-shift", ["domain-shift"], of, steps, [])
    write_report(report, tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert text.startswith("# domain-shift: data shapes, host torchvision, seeds 1, 2, 3\n\nAll")
    assert "the options `SOLVER.MAX_ITER 12`: these are not the settings" in text
    assert "Loss spikes: no training has more than 50 iterations to look at" in text


def test_commands_on_coco_run_one_after_the_other(setting, tmp_path):
    assert default_jobs(Setting("coco", "detectron2", tmp_path)) == 1
    assert default_jobs(setting) == min(2, len(os.sched_getaffinity(0)))


def test_a_report_with_nothing_done_says_so(setting, tmp_path):
    results = Results(setting, {}, [1])
    steps = plan(NAMES, setting, [1])
    report = make_report("all", NAMES, results, steps, [])
    assert all(verdict.word == "" for _, verdict in report.ledger)
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"{len(steps)} of {len(steps)} steps are missing" in page


def test_report_on_coco(tmp_path):
    """Each experiment on COCO, too, and its claims."""
    setting = Setting("coco", "detectron2", tmp_path / "runs", 4)
    names = list(experiments_on("coco"))
    steps = plan(names, setting, [1])
    every, end = 9000, 600000  # all that is looked at is among these
    write_results(setting, steps, random.Random(3), range(every - 1, end, every))
    results = Results(setting, {s.name: Outcome(60.0, None) for s in steps}, [1])
    report = make_report("all", names, results, steps, [])
    assert all(verdict.word for _, verdict in report.ledger)
    write_report(report, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "4 GPUs: the published setting is 8" in page
    assert all(f"those of {of} of arXiv" in page for of in ("Table 5", "Tables 3 and 6"))


def test_report_on_cells(tmp_path):
    """AP is the mean over the laboratories that were trained on, but in the one left out."""
    setting = Setting("cells", "torchvision", tmp_path / "runs")
    names = list(experiments_on("cells"))
    steps = plan(names, setting, [1, 2])
    write_results(setting, steps, random.Random(3))
    results = Results(setting, {s.name: Outcome(60.0, None) for s in steps}, [1, 2])
    report = make_report("all", names, results, steps, [])
    assert all(len(verdict.effects) == 2 for _, verdict in report.ledger)
    write_report(report, tmp_path / "report")

    def read(name, when):
        path = setting.runs / "train" / name / "precise.json"
        return json.loads(path.read_text())["results"][when]

    def mean_ap(name):
        found = read(name, "after")
        return average([found[f"blood_cells_{of}_val"]["bbox"]["AP"] for of in LABORATORIES])

    one, each = (mean_ap(f"retinanet_joint-seed2/precise-{of}") for of in ("one", "each"))
    found = {claim.name: verdict.effects[1] for claim, verdict in report.ledger}
    assert found["consistent, laboratories"] == pytest.approx(one - each)
    own = mean_ap("retinanet_per_laboratory-seed2/precise-each")
    assert found["statistics for each laboratory"] == pytest.approx(own - one)
    gains = []
    for name in LEFT_OUT:
        of = "" if name == "raabin" else f"-without_{name}"
        after, before = (
            read(f"retinanet_joint{of}-seed2/adabn-{name}", k) for k in ("after", "before")
        )
        gains.append(after["bbox"]["AP"] - before["bbox"]["AP"])
    assert found["AdaBN, laboratories"] == pytest.approx(sum(gains) / 4)


def test_leakage_on_cells(tmp_path):
    """A Faster R-CNN of each head; AP is the mean over the laboratories that are trained on."""
    setting = Setting("cells", "torchvision", tmp_path / "runs")
    steps = leakage.plan(setting, 1)
    write_results(setting, steps, random.Random(4))
    results = Results(setting, {s.name: Outcome(60.0, None) for s in steps}, [1])
    keys = [f"blood_cells_{name}_val" for name in LABORATORIES]
    batch = read(results, "faster_rcnn-BN-seed1/batch-1500/results.json")
    (line,) = [
        line
        for line in results.metrics(leakage.training(setting, 1, "BN"))
        if line["iteration"] == 1499
    ]
    found = average([batch[key]["bbox"]["AP"] - line[f"{key}/bbox/AP"] for key in keys])
    assert leakage.EFFECTS["leak, box AP"](results, 1) == pytest.approx(found)
    table, _ = leakage.show(results)
    assert not any("mask" in name for name in table.columns)
    for head, norm, is_shuffled in (("BN", "BN", "False"), ("BN_shuffle", "BN", "True")):
        opts = dict(pairwise(leakage.training(setting, 1, head).step.command))
        found = tuple(opts[f"MODEL.ROI_BOX_HEAD.{key}"] for key in ("NORM", "SHUFFLE"))
        assert found == (norm, is_shuffled)


def test_what_a_loss_spike_costs(results):
    """Of the seeds in which levels that are normalized together had one."""
    effect = loss_spike.EFFECTS["loss spike, shared statistics"]

    def ap(name):
        return read(results, f"{name}/precise.json", "results", "after", "bbox", "AP")

    shared = ap("retinanet-shared-affine_shared-seed2/precise-shared")
    shared -= ap("retinanet-shared-steep-seed2/precise-shared")
    own = ap("retinanet-per_domain-affine_shared-seed2/precise-per_domain")
    own -= ap("retinanet-per_domain-steep-seed2/precise-per_domain")
    assert effect(results, 2) == pytest.approx(shared - own)
    for statistics in ("per_domain", "shared"):
        assert effect(results, 2) is not None
        of = loss_spike.training(results.setting, 2, statistics, True)
        note_spikes(results.setting.runs, of.name, ratio=2.9)
    assert effect(results, 2) is None and effect(results, 1) is not None


def test_the_gain_that_the_doctor_expects(results):
    """Against the one that came, at the checkpoints of the first third and at the end."""
    differences = []
    for iteration in (90, 180, 270, 900):
        base = "retinanet-per_domain-affine_shared-seed3"
        (tried,) = read(results, f"{base}/doctor-{iteration}/doctor.json", "tried")
        of = read(results, f"{base}/precise-{iteration}/precise.json", "results")
        came = of["after"]["bbox"]["AP"] - of["before"]["bbox"]["AP"]
        differences.append(abs(came - tried["after"] + tried["before"]))
    assert doctor.EFFECTS["expected gain"](results, 3) == pytest.approx(average(differences))


def test_a_laboratory_in_which_nothing_is_detected(tmp_path):
    """As elsewhere, its AP is 0, of each kind of cell."""
    setting = Setting("cells", "torchvision", tmp_path / "runs")
    step = new_laboratory.adabn_step(new_laboratory.training(setting, 1, "bcd"), "bcd")
    path = setting.runs / step.name / "precise.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"results": {"before": {}, "after": {"bbox": {"AP-RBC": 9.5}}}}))
    results = Results(setting, {step.name: Outcome(60.0, None)}, [1])
    assert new_laboratory.ap(results, 1, "bcd", "before", "AP-RBC") == 0.0
    assert new_laboratory.ap(results, 1, "bcd", "after", "AP-RBC") == 9.5


def test_a_laboratory_that_is_left_out_is_not_trained_on(tmp_path):
    setting = Setting("cells", "torchvision", tmp_path / "runs")
    for name in LABORATORIES:
        of = new_laboratory.training(setting, 1, name)
        (trained_on,) = [v for k, v in pairwise(of.step.command) if k == "DATASETS.TRAIN"]
        assert name not in trained_on and trained_on.count("_train") == 3
    config = find_config(new_laboratory.training(setting, 1, "raabin").config)
    assert "raabin" not in str(CfgNode.load_yaml_with_base(config)["DATASETS"]["TRAIN"])


def test_a_report_is_not_written_over_what_is_none(setting, tmp_path):
    check_folder(tmp_path, "all", setting, Looks((1,), 0.95))
    steps = plan(["frozen"], setting, [1, 2])
    report = make_report("frozen", ["frozen"], Results(setting, {}, [1, 2]), steps, [])
    write_report(report, tmp_path)
    check_folder(tmp_path, "frozen", setting, Looks((3,), 0.95))
    with pytest.raises(InputError, match="has a report of 2 seeds, and this is one of 1"):
        check_folder(tmp_path, "frozen", setting, Looks((1,), 0.95))
    for content in ("{", "[]", '{"bbox": {"AP": 30.0}}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=r"results.json is not of a report"):
            check_folder(tmp_path, "all", setting, Looks((1,), 0.95))


def test_a_look_that_fails_leaves_a_report_of_more_seeds(results, tmp_path):
    """As where runs of earlier looks are gone; the last look is written whatever was there."""
    steps = plan(["domain-shift"], results.setting, results.seeds)
    of = "domain-shift", ["domain-shift"]
    write_report(make_report(*of, results, steps, []), tmp_path)

    def seeds():
        return json.loads((tmp_path / "results.json").read_text())["seeds"]

    fewer = Results(results.setting, results.outcomes, [1, 2])
    failed = make_report(*of, fewer, steps, [Failure(steps[0], "it has failed")])
    with pytest.raises(SystemExit, match="1 steps have failed"):
        _write_all([failed], tmp_path)
    assert seeds() == [1, 2, 3]
    _write_all([make_report(*of, fewer, steps, [])], tmp_path)
    assert seeds() == [1, 2]


def test_a_report_without_failures_is_not_replaced_by_one_with_some(results, tmp_path, capsys):
    steps = plan(["domain-shift"], results.setting, results.seeds)
    of = "domain-shift", ["domain-shift"]

    def failed():
        with pytest.raises(SystemExit, match="1 steps have failed"):
            _write_all([make_report(*of, results, steps, [Failure(steps[0], "why")])], tmp_path)
        return json.loads((tmp_path / "results.json").read_text())["failed"]

    assert failed() == {steps[0].name: "why"}, "where there was none"
    _write_all([make_report(*of, results, steps, [])], tmp_path)
    assert failed() == {}
    assert f"Not saved: {tmp_path} has a report without failures, which stays" in (
        capsys.readouterr().out
    )


def test_cells():
    assert cell([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert cell([1.25], 2) == "1.25" and cell([1.25, None], 2) == "1.25 (1 of 2)"
    assert cell([1.0, None, 2.0], 1) == "1.5 ± 0.7 (2 of 3)"
    assert cell([None], 2) == cell([], 2) == "-"
    assert average([]) is None and average([1.0, None]) is None
    assert math.isclose(average([1.0, 2.0]), 1.5)
