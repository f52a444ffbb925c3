"""benchmarks/doctor.py, on a classifier that is trained for a few seconds."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from bn_det.doctor import RULES
from here import run_here

ROOT = Path(__file__).parents[2]
ITERATIONS = 120


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The model is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def of_benchmarks():
    """Imports a module of the folder."""
    pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def subject(of_benchmarks, runs):
    return of_benchmarks("doctor_models").healthy("timm_resnet", runs, ITERATIONS)


def loaded(subject, plant):
    model = subject.make()
    model.load_state_dict(plant.state, strict=False)
    for change in plant.after:
        change(model)
    return model.eval()


def test_the_command(subject, runs, caplog):
    args = "--json", "--tuned", "--models", "timm_resnet", "--iterations", ITERATIONS
    faults = "--faults", "not_a_number", "counters_doubled"
    done = run_here("benchmarks/doctor.py", *args, *faults, "--runs", runs)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"tuned", "held", "seconds_of_100_mb", "over_forward_passes"}
    tuned, held = result["tuned"], result["held"]
    assert tuned["of_costly_faults"] > 0 and tuned["found"] == 1.0
    # NaN in a channel leaves a guess among four classes, and recomputed statistics all of the rest.
    assert tuned["of_lost_ap"] > 5 and tuned["recovered"] > 0.7
    assert held["of_costly_faults"] == held["examinations_of_healthy_models"] == 0
    assert held["found"] is held["recovered"] is tuned["false_alarms_per_examination"] is None
    assert result["seconds_of_100_mb"] > 0 and result["over_forward_passes"]["timm_resnet"] > 0.3

    # Nothing is examined twice, and a table says the same.
    done = run_here("benchmarks/doctor.py", *args[1:], *faults, "--runs", runs)
    number = sum(1 for _ in next(runs.glob("examined-*.jsonl")).open())
    assert f"{number} cases, of which {number} have been examined" in caplog.text
    assert "| not_a_number     | BN107   |" in done.stdout
    assert f"100.0 % of {tuned['of_costly_faults']} faults" in done.stdout

    done = run_here("benchmarks/doctor.py", "--iterations", "0")
    assert done.returncode == 1 and "--iterations: 0 is not accepted; use 1 or more" in done.stderr


def test_statistics_that_are_folded_or_fused_give_the_same_outputs(subject, of_benchmarks):
    faults = of_benchmarks("doctor_faults")
    images = torch.randn(4, 3, 48, 48)
    expected = loaded(subject, faults.Plant(subject, 0))(images)
    for strength in range(3):
        plant = faults.planted("folded", strength, subject, 0)
        torch.testing.assert_close(loaded(subject, plant)(images), expected, rtol=1e-4, atol=1e-4)

    plant = faults.planted("fused_file", 2, subject, 0)
    conv, norm = "layer1.0.conv1", "layer1.0.bn1"
    assert f"{norm}.running_mean" not in plant.state
    model = loaded(subject, faults.Plant(subject, 0))
    x = torch.randn(2, 16, 8, 8)
    weight, bias = plant.state[f"{conv}.weight"], plant.state[f"{conv}.bias"]
    found = torch.nn.functional.conv2d(x, weight, bias, padding=1)
    modules = dict(model.named_modules())
    torch.testing.assert_close(found, modules[norm](modules[conv](x)), rtol=1e-4, atol=1e-4)


def test_faults_change_what_they_say(subject, of_benchmarks):
    faults = of_benchmarks("doctor_faults")
    layers = faults.Plant(subject, 0).layers
    for name, fault in faults.FAULTS.items():
        assert set(fault.rules) | set(fault.also) <= set(RULES), name
        if name == "levels_mixed":
            with pytest.raises(faults.DoesNotApplyError):
                faults.planted(name, 0, subject, 0)
            continue
        plant = faults.planted(name, 2, subject, 0)
        same = plant.state.keys() == subject.state.keys() and all(
            value.equal(subject.state[key]) for key, value in plant.state.items()
        )
        assert bool(plant.after) >= same, name
    moved = faults.planted("means_moved", 1, subject, 0).state
    off = {
        layer: (moved[f"{layer}.running_mean"] - subject.state[f"{layer}.running_mean"]).abs()
        / subject.state[f"{layer}.running_var"].sqrt()
        for layer in layers
    }
    assert sum(bool(of.any()) for of in off.values()) == round(len(layers) / 3)
    assert all(of.max() < 1e-6 or torch.allclose(of, torch.tensor(0.5)) for of in off.values())


def test_summary(of_benchmarks):
    cases, doctor = of_benchmarks("doctor_cases"), of_benchmarks("doctor")

    def of(fault, planted, after=None, alarms=(), strength=0):
        case = cases.Case("tv_fcos", fault, strength)
        return cases.Examined(case, True, 50.0, planted, after, alarms)

    results = [
        of("means_moved", 40.0, 48.0, ("BN201",)),
        of("clamped", 20.0, 20.0, ("BN201",)),  # not by its rule
        of("other_eps", 48.5),  # not only statistics are wrong
        of("counters_doubled", 50.0, None, ("BN112",)),  # it costs nothing
        of("healthy", 50.0),
        of("healthy", 50.0, None, ("BN303",), 1),
        cases.Examined(cases.Case("tv_fcos", "levels_mixed", 0), False),
    ]
    assert doctor.summary(results) == {
        "found": 1 / 3,
        "of_costly_faults": 3,
        "false_alarms_per_examination": 0.5,
        "examinations_of_healthy_models": 2,
        "recovered": 8 / 40,
        "of_lost_ap": 40.0,
    }
    assert of("clamped", 20.0, None, ("BN107", "BN109", "BN201")).wrong == ("BN107",)
    read = cases.Examined.read(json.dumps(results[0]._asdict()))
    assert read == results[0]


def test_a_third_is_held_apart(of_benchmarks):
    cases = of_benchmarks("doctor_cases")
    faults, kinds = of_benchmarks("doctor_faults").FAULTS, of_benchmarks("doctor_models").KINDS
    found = [cases.Case(m, f, k).is_held for m in kinds for f in faults for k in range(3)]
    # By chance: three standard deviations of a share of a third.
    assert abs(sum(found) / len(found) - 1 / 3) < 3 * (2 / 9 / len(found)) ** 0.5


def test_a_thread(subject, of_benchmarks):
    """Replayed: what the doctor leaves is as good as what was broken."""
    threads = of_benchmarks("threads")
    model = subject.make()
    model.load_state_dict(subject.state)
    before = subject.score(model.eval())
    (thread,) = [of for of in threads.THREADS if of.fault == "averaged_without_buffers"]
    found = threads.replay(thread, subject, before)
    assert "(BN101)" in found.file_line and "broken.pth" in found.file_line
    assert found.line.startswith("statistics, not weights: ") and "(BN101)" in found.line
    # Four classes: what is broken is hardly better than a guess.
    assert found.broken < before - 5 and found.after > before - 5
