"""examples/pointdet: a Detectron2 project that is not ours, without and with bn_det."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import ast
import copy
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from bn_det.layers.kinds import unwrapped
from ranks import run_ranks
from reference import values

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "pointdet"
PATCH = EXAMPLE / "bn_det.patch"
NUM_ITERS = 6
"""The batches of PreciseBN."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """A folder with the project as it is in "before", and with the patch in "after"."""
    folder = tmp_path_factory.mktemp("versions")
    for name in ("before", "after"):
        shutil.copytree(EXAMPLE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Git would leave out what is not in the repository that it may find above.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)}
    subprocess.run(["git", "apply", PATCH], cwd=folder / "after", env=env, check=True)
    return folder


def make_opts(tiny_shapes, out):
    (_, annotations, _), _ = ast.literal_eval(tiny_shapes[1])
    return [
        *("DATASETS.ROOT", str(Path(annotations).parents[1]), "OUTPUT_DIR", str(out)),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2"),
        *("TEST.PRECISE_BN.NUM_ITER", str(NUM_ITERS), "MODEL.POINTDET.SCORE_THRESH", "0.0"),
    ]


@pytest.fixture
def opts(tiny_shapes, tmp_path):
    return make_opts(tiny_shapes, tmp_path)


def run(folder, *args, path=()):
    """What the project's command prints, on the CPU."""
    command = [sys.executable, folder / "train_net.py", "--dist-url", "auto", *args]
    command[2:2] = ["--config-file", folder / "configs" / "shapes.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(map(str, [*path, ROOT]))
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **both)
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        # After a time-out the processes that it has started would go on.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def old(versions, tiny_shapes, tmp_path_factory):
    """A folder with all that a run without bn_det leaves, which cannot be imported there."""
    folder = tmp_path_factory.mktemp("old")
    (folder / "bn_det.py").write_text("raise ImportError('this is the project as it was')")
    out = run(versions / "before", *make_opts(tiny_shapes, folder), path=[folder])
    (folder / "out.txt").write_text(out)
    return folder


def test_the_change_is_small_and_is_shown():
    patch = PATCH.read_text()
    lines = [x for x in patch.splitlines() if x[:1] in ("+", "-") and x[:3] not in ("+++", "---")]
    assert len(lines) < 10
    assert f"```diff\n{patch}```\n" in (EXAMPLE / "README.md").read_text()
    for readme in (EXAMPLE / "README.md", ROOT / "README.md"):
        assert f"{len(lines)} changed lines" in " ".join(readme.read_text().split()), readme


def test_without_bn_det(old):
    assert (old / "out.txt").read_text().count("Evaluation results for bbox") == 2
    assert {path.name for path in old.glob("*.pth")} == {"model_000002.pth", "model_000003.pth"}


def test_with_bn_det_in_two_processes(versions, opts, tmp_path):
    out = run(versions / "after", "--num-gpus", "2", *opts, "SOLVER.MAX_ITER", "1")
    assert out.count("Evaluation results for bbox") == 1
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert {"precise_bn/error", "AP"} <= {name for line in lines for name in json.loads(line)}


def import_project(folder, name):
    """One of its modules, in a process that has no other version."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def parse(train_net, folder, *args):
    config = str(folder / "configs" / "shapes.yaml")
    args = ["--config-file", config, *args, "MODEL.DEVICE", "cpu"]
    return train_net.default_argument_parser().parse_args(args)


def use_few_batches(train_net):
    """Have all loaders repeat the same batches: the list of these, filled by the first loader."""
    real, batches = train_net.train_loader, []

    class Loader:
        def __iter__(self):
            return itertools.cycle(batches)

    def train_loader(cfg):
        with torch.random.fork_rng(devices=[]):
            batches[:] = batches or itertools.islice(real(cfg), 4)
        return Loader()

    train_net.train_loader = train_loader
    return batches


def statistics_by_definition(model, batches):
    """Mean and variance of all values that each BatchNorm gets, on all ranks, in float64."""
    sums = {}

    def see(key, x):
        v = values([x.double()])
        new = torch.stack([torch.full_like(v[0], len(v)), v.sum(0), (v**2).sum(0)])
        sums[key] = sums.get(key, 0) + new

    def watch(name, xs):
        for key, x in enumerate(xs) if isinstance(xs, list) else [(None, xs)]:
            see(name if key is None else f"{name}.{key}", x)

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: watch(name, *args))
    with torch.no_grad(), EventStorage():
        for batch in itertools.islice(itertools.cycle(batches), NUM_ITERS):
            model(batch)
    found = {}
    for key, of_layer in sums.items():
        dist.all_reduce(of_layer)
        mean, square = of_layer[1] / of_layer[0], of_layer[2] / of_layer[0]
        found |= {f"{key}.running_mean": mean, f"{key}.running_var": square - mean**2}
    return found


def check_statistics(state, expected):
    found = {name: x.double() for name, x in state.items() if "running_" in name}
    assert {f"point_head.tower.1.{k}.running_var" for k in range(3)} <= set(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Witness(HookBase):
    """Keeps the model and the random numbers that the other hooks find after a step."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        model = copy.deepcopy(unwrapped(self.trainer.model))
        self.seen.append((model, torch.get_rng_state()))


def train(rank, num_ranks, folder, opts):
    """The states that are evaluated, and the statistics that they should have."""
    train_net = import_project(folder, "train_net")
    comm.create_local_process_group(num_ranks)
    batches, evaluated = use_few_batches(train_net), []

    def evaluate(cfg, model):
        evaluated.append(copy.deepcopy(unwrapped(model).state_dict()))
        return {}

    train_net.evaluate = evaluate
    cfg = train_net.setup(parse(train_net, folder, *opts))
    trainer = train_net.Trainer(cfg, train_net.build_model(cfg), cfg.TEST.EVAL_PERIOD)
    trainer.register_hooks([witness := Witness()])
    trainer._hooks.insert(0, trainer._hooks.pop())
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    expected = []
    for model, random_state in witness.seen[1:]:
        torch.set_rng_state(random_state)
        expected.append(statistics_by_definition(model, batches))
    return evaluated, expected


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_hook_in_the_trainer_of_the_project(num_ranks, versions, opts, tmp_path):
    """Every evaluation and checkpoint has the statistics of its weights, on all ranks' data."""
    args = num_ranks, versions / "after", opts
    (evaluated, expected), *others = run_ranks(train, num_ranks, *args, timeout=120)
    for evaluated_there, _ in others:
        torch.testing.assert_close(evaluated, evaluated_there, rtol=0, atol=0)
    for number, state, statistics in zip((2, 3), evaluated, expected, strict=True):
        saved = torch.load(tmp_path / f"model_{number:06d}.pth", weights_only=True)["model"]
        assert all(torch.equal(x, saved[name]) for name, x in state.items())
        check_statistics(state, statistics)


def evaluate_old(rank, folder, opts):
    """The state that --eval-only evaluates, and the statistics that it should have."""
    train_net = import_project(folder, "train_net")
    batches, loaded, evaluated = use_few_batches(train_net), [], []

    class Checkpointer(train_net.DetectionCheckpointer):
        def load(self, *args):
            super().load(*args)
            loaded.append((copy.deepcopy(self.model), torch.get_rng_state()))

    train_net.DetectionCheckpointer = Checkpointer
    train_net.evaluate = lambda cfg, model: evaluated.append(model.state_dict())
    train_net.main(parse(train_net, folder, "--eval-only", *opts))
    ((model, random_state),) = loaded
    torch.set_rng_state(random_state)
    return evaluated[0], statistics_by_definition(model, batches)


def test_evaluation_of_a_checkpoint_from_before(versions, old, opts):
    """Its affine is used, and statistics for each level are made."""
    weights = old / "model_000003.pth"
    ((state, expected),) = run_ranks(
        evaluate_old, 1, versions / "after", [*opts, "MODEL.WEIGHTS", str(weights)], timeout=120
    )
    saved = torch.load(weights, weights_only=True)["model"]
    assert torch.equal(saved["point_head.tower.1.weight"], state["point_head.tower.1.weight"])
    check_statistics(state, expected)


def jacobian(rank, ys, xs, counts):
    """Whether a derivative by each of this rank's samples is nonzero, for each sample's output.

    Args:
        ys, xs: outputs and inputs of this rank, of each level.
        counts: how many samples each rank has.

    Returns:
        booleans (outputs by level, rank and sample; levels, samples of this rank).
    """
    rows = []
    for level, other in itertools.product(range(len(ys)), range(len(counts))):
        for sample in range(counts[other]):
            grads = [torch.zeros_like(y) for y in ys]
            if rank == other:
                grads[level][sample] = torch.randn_like(grads[level][sample])
            dxs = torch.autograd.grad(ys, xs, grads, retain_graph=True)
            rows.append(torch.stack([dx.flatten(1).abs().amax(1) > 1e-12 for dx in dxs]))
    return torch.stack(rows)


def pyramid(num_images):
    return [torch.randn(num_images, 8, size, size).double() for size in (8, 4, 2)]


def point_head(rank, folder, counts):
    """The Jacobian of the head's logits, and the logits."""
    head = import_project(folder / "pointdet", "head").PointHead(8, 3, 4, num_convs=2).double()
    features = [x.split(counts)[rank].requires_grad_() for x in pyramid(sum(counts))]
    logits, _ = head(features)
    return jacobian(rank, logits, features, counts), [x.detach() for x in logits]


def test_head_normalizes_each_level_over_the_processes(versions):
    counts = [1, 2]
    ranks = run_ranks(point_head, 2, versions / "after", counts)
    found = torch.cat([depends for depends, _ in ranks], 2).flatten(1)
    assert torch.equal(found, torch.block_diag(*[torch.ones(3, 3)] * 3).bool())
    # That is what the head without bn_det computes in one process of all images.
    ((_, expected),) = run_ranks(point_head, 1, versions / "before", [3])
    together = [torch.cat(x) for x in zip(*(logits for _, logits in ranks), strict=True)]
    torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-12)


def refine_head(rank, folder, counts):
    """The Jacobian of the head's logits, in training and in evaluation."""
    head = import_project(folder / "pointdet", "head").RefineHead(8, 7, 4).double()
    x = torch.randn(sum(counts), 8, 7, 7).double().split(counts)[rank].requires_grad_()
    return [jacobian(rank, [head.train(mode)(x)[0]], [x], counts) for mode in (True, False)]


@pytest.mark.parametrize("version, sizes", [("before", {3, 5}), ("after", {4})])
def test_training_mixes_the_rois_of_the_processes(version, sizes, versions):
    counts = [3, 5]
    ranks = run_ranks(refine_head, 2, versions / version, counts)
    training, evaluation = (torch.cat(x, 2)[:, 0].float() for x in zip(*ranks, strict=True))
    assert torch.equal(evaluation, torch.eye(8))
    assert set(training.sum(1).tolist()) == sizes
    # RoIs are in one normalization batch or in another, whatever their process.
    assert torch.equal(training, (training @ training).sign())
    assert training[:3, 3:].any() == (version == "after")
