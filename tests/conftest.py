"""Shared by all tests. Its presence puts this folder on sys.path, for reference.py."""

import os

import pytest
import torch

from here import same_loggers

# Workers, and the commands that their tests run, share the cores; the models are small.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
_THREADS = max(1, min(2, len(os.sched_getaffinity(0)) // _WORKERS))
os.environ["OMP_NUM_THREADS"] = str(_THREADS)
torch.set_num_threads(_THREADS)
# Of a process that a signal ends, say in a library's threads, the stack is all there is to go by.
os.environ["PYTHONFAULTHANDLER"] = "1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_logger():
    """Undo what the set-up of loggers does, in a command that a test runs."""
    with same_loggers():
        yield


@pytest.fixture
def one_thread():
    """For small models, which are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory):
    """Config options for a small shapes data set of 12 and 6 images."""
    # Not at the top: tests of the layers need torch alone.
    from bn_det.data.shapes import Split, generate_shapes

    root = generate_shapes(
        tmp_path_factory.mktemp("data") / "tiny", {"train": Split(12, 0), "val": Split(6, 1)}
    )
    sets = [
        [f"tiny_{split}", str(root / "annotations" / f"instances_{split}.json"), str(root / split)]
        for split in ("train", "val")
    ]
    return [
        "DATASETS.REGISTER_COCO",
        repr(sets),
        "DATASETS.TRAIN",
        "('tiny_train',)",
        "DATASETS.TEST",
        "('tiny_val',)",
    ]


@pytest.fixture(scope="session")
def tiny_variants(tmp_path_factory):
    """A folder of data sets that are taken for the generated ones, with few images."""
    from bn_det.data.shapes import VARIANTS, Split, generate_shapes

    root = tmp_path_factory.mktemp("datasets")
    for variant in VARIANTS.values():
        splits = {
            name: Split(12 if name == "train" else 4, split.seed)
            for name, split in variant.splits.items()
        }
        generate_shapes(root / variant.name, splits, variant)
    return root
