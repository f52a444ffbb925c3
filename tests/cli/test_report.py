"""bn-det report: one page of a run."""

import json
from html.parser import HTMLParser

import pytest

from here import run_here
from hosts import every_host
from reference import BASE


class Page(HTMLParser):
    """What a page shows: its text, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.words, self.pictures = [], []
        self.feed(text)

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            of = dict(attributes)
            assert of["src"].startswith("data:image/png;base64,")
            self.pictures.append(of["alt"])


def report(folder, *args):
    return run_here("tools/report.py", folder, *args)


@every_host
def test_a_run(host, tiny_shapes, tmp_path):
    """Trained and evaluated."""
    options = *tiny_shapes, "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2"
    more = "SOLVER.MAX_ITER", 40, "SOLVER.WARMUP_ITERS", 2, "OUTPUT_DIR", tmp_path / "run"
    train = "--host", host, "--config-file", BASE, *options, *more, "TEST.BN_MONITOR", 10
    done = run_here("tools/train_net.py", *train)
    assert done.returncode == 0, done.stderr
    done = report(tmp_path / "run", "--num-images", 2, "--conf-threshold", 0)
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert {"Losses", "Detections on tiny_val"} <= {*page.pictures}
    assert any(name.startswith("BatchNorm") for name in page.pictures)
    ap = json.loads((tmp_path / "run" / "results.json").read_text())["bbox"]["AP"]
    result = "no AP" if ap is None else f"AP {ap:.1f} on tiny_val"
    assert f"{result} after 40 of 40 iterations" in page.words


@pytest.fixture
def run(tmp_path):
    """A folder with two test sets, in the midst of a training."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"iteration": 19, "total_loss": 2.0, "lr": 0.01},
        {"iteration": 39, "total_loss": float("nan"), "lr": 0.02},
        {"iteration": 39, "a/bbox/AP": 12.34, "a/bbox/AP50": 30.0, "b/bbox/AP": float("nan")},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spike = {"iteration": 30, "loss": 9.0, "median": 2.0, "ratio": 4.5, "layers": {"bn1": 8.0}}
    (folder / "loss_spikes.json").write_text(json.dumps({"largest": spike, "spikes": [spike]}))
    (folder / "config.yaml").write_text(
        "DATASETS:\n  TEST: [a, b]\n  REGISTER_COCO: []\nSOLVER: {MAX_ITER: 100}\n"
    )
    return folder


def test_a_run_in_its_midst(run):
    done = report(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'report.html'}: AP 12.3 on a after 40 of 100 iterations\n"
    page = Page((run / "report.html").read_text())
    words = "\n".join(page.words)
    assert "The loss leapt at iteration 30" in words and "bn1 8 times" in words
    assert "a boxes" in words and "30.0" in words and "b boxes" in words
    assert words.count("it has not been evaluated to its end") == 2
    assert {*page.pictures} == {"Losses", "Learning rate"}


def test_detections_that_cannot_be_drawn(run):
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text("[]")
    assert report(run).returncode == 0
    words = "\n".join(Page((run / "report.html").read_text()).words)
    assert "a is registered in code, and is not known here" in words


@pytest.mark.parametrize("entries", ["5", "null", "[[c, there/is/none.json, there]]"])
def test_data_sets_that_are_not_there(entries, run):
    """The page is made without them."""
    test_detections_that_cannot_be_drawn(run)
    config = run / "config.yaml"
    text = config.read_text().replace("[a, b]", "[c]")
    config.write_text(text.replace("REGISTER_COCO: []", f"REGISTER_COCO: {entries}"))
    done = report(run)
    assert done.returncode == 0, done.stderr
    words = "\n".join(Page((run / "report.html").read_text()).words)
    said = "there is no file there/is/none.json" if "[" in entries else "DATASETS.REGISTER_COCO: "
    assert said in words


def test_shapes_are_not_drawn_for_a_page(run, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    test_detections_that_cannot_be_drawn(run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("[a, b]", "[shapes_val]"))
    assert report(run).returncode == 0
    words = "\n".join(Page((run / "report.html").read_text()).words)
    assert "there is no file" in words and not (tmp_path / "data").exists()


def test_a_line_that_was_cut(run):
    with open(run / "metrics.json", "a") as file:
        file.write('{"iteration": 59, "total_lo')
    done = report(run)
    assert done.returncode == 0 and "after 40 of 100" in done.stdout, done.stderr


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluation_alone(run, several):
    (run / "metrics.json").unlink()
    of_set = {"bbox": {"AP": 33.25, "AP50": 50.0, "AP75": None}}
    results = {"a": of_set, "b": of_set} if several else of_set
    (run / "results.json").write_text(json.dumps(results))
    done = report(run)
    assert done.returncode == 0, done.stderr
    assert f"AP 33.2 on {'a' if several else 'a, b'} after 0 of" in done.stdout
    words = "\n".join(Page((run / "report.html").read_text()).words)
    assert "50.0" in words and ("b boxes" in words) == several


def test_of_metrics_alone(run):
    for name in ("config.yaml", "loss_spikes.json"):
        (run / name).unlink()
    assert report(run).returncode == 0
    words = "\n".join(Page((run / "report.html").read_text()).words)
    assert "names no data sets" in words and "after 40 iterations" in words


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("metrics.json", "{\n", "metrics.json: is not that of a run"),
        ("metrics.json", '{"iteration": NaN, "lr": 1}', "iteration nan is no whole number"),
        ("results.json", '{"bbox": 3}', "results.json: is not that of a run"),
        ("metrics.json", '{"iteration": 1, "lr": "x"}', "a value of iteration 1 is no number"),
        ("metrics.json", "[]", "metrics.json: is not that of a run"),
        ("config.yaml", "DATASETS: !!python/name:os.system", "config.yaml"),
        ("loss_spikes.json", "{", "loss_spikes.json: is not that of a run"),
    ],
)
def test_broken_files(name, text, words, run):
    (run / name).write_text(text)
    done = report(run)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (["nowhere"], "OUTPUT_DIR: there is no folder nowhere"),
        (["."], "is of no run"),
        (["RUN", "--output", "a.txt"], "--output: 'a.txt' is not accepted; use a file in .html"),
        (["RUN", "--num-images", "0"], "--num-images: 0 is not accepted"),
        (["RUN", "--conf-threshold", "2"], "--conf-threshold: "),
    ],
)
def test_what_is_refused(args, words, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = report(*(run if of == "RUN" else of for of in args))
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
