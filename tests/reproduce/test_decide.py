"""Seeds that are added until claims are decided."""

import argparse
import json
import math
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest

from bn_det.errors import InputError
from bn_det.reproduce.claims import Claim
from bn_det.reproduce.looks import looks_of, undecided
from bn_det.reproduce.main import plan
from bn_det.reproduce.power import seeds_needed
from bn_det.reproduce.runner import settings_of
from bn_det.reproduce.steps import Setting
from bn_det.reproduce.verdicts import judge
from here import run_here


def looks(seeds=None, decide=True):
    return looks_of(argparse.Namespace(seeds=seeds, decide=decide))


def test_looks_are_fixed_beforehand():
    assert looks(decide=False).seeds == (3,) and looks(7, decide=False).seeds == (7,)
    assert looks().seeds == (3, 5, 8, 12) and looks().confidence == 0.9875
    assert looks(10).seeds == (3, 5, 8, 10) and looks(5).seeds == (3, 5)
    assert looks(20).seeds == (3, 5, 8, 12, 20) and looks(20).confidence == 0.99
    for few in (1, 3):
        with pytest.raises(InputError, match=f"--seeds: {few} is not accepted with --decide"):
            looks(few)


def test_intervals_hold_together():
    """Of 2000 sequences of looks at most 5 % have one that misses; of 95 % each, far more."""
    claim = Claim("x", "population", "A sentence.", "a source", "a metric", 1.0, "AP")
    rng = np.random.default_rng(0)
    sequences = rng.normal(0.7, 2.0, (2000, 12)).tolist()

    def missed(confidence):
        found = 0
        for effects in sequences:
            verdicts = [judge(claim, effects[:n], confidence) for n in looks().seeds]
            found += not all(of.low <= 0.7 <= of.high for of in verdicts)
        return found / len(sequences)

    assert missed(looks().confidence) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert missed(0.95) > 0.1


@pytest.mark.parametrize("at_most", [False, True])
def test_seeds_needed(at_most):
    """Against simulation: with as many the smallest effect is told in 90 %, with one less not."""
    claim = Claim("x", "population", "", "", "", 1.0, "AP", at_most)
    effects = [2.0, 3.0, 2.4, 3.2]  # a standard deviation of 0.55
    number = seeds_needed(claim, judge(claim, effects))
    rng, truth = np.random.default_rng(1), 0.0 if at_most else 1.0

    def told(n):
        found = rng.normal(truth, stdev(effects), (1500, n)).tolist()
        verdicts = [judge(claim, of) for of in found]
        return sum(of.high <= 1.0 if at_most else of.low > 0 for of in verdicts) / len(verdicts)

    error = 3 * math.sqrt(0.9 * 0.1 / 1500)
    assert 3 < number < 12 and told(number) >= 0.9 - error and told(number - 1) < 0.9 + error
    assert seeds_needed(claim, judge(claim, [0.0, 1000.0])) is None
    assert seeds_needed(claim, judge(claim, [2.0])) is None


def test_experiments_whose_claims_are_decided_get_no_more_seeds():
    claims = [
        Claim(name, experiment, "", "", "", 1.0, "AP")
        for name, experiment in (("a", "leakage"), ("b", "leakage"), ("c", "frozen"))
    ]
    names = ["frozen", "leakage"]
    assert undecided(names, claims, {}) == names
    seen = judge(claims[0], [2.0, 2.1, 2.2])
    assert undecided(names, claims, {"a": seen, "c": seen}) == ["leakage"]
    assert undecided(names, claims, dict.fromkeys("abc", seen)) == []


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Twelve seeds of an experiment with one claim; their effects on AP are as given."""
    monkeypatch.chdir(tmp_path)
    setting = Setting("shapes", "torchvision", tmp_path / "runs")

    def write(gains):
        for seed, gain in enumerate(gains, 1):
            for step in plan(["domain-shift"], setting, [seed]):
                folder = setting.runs / step.name
                folder.mkdir(parents=True)
                noted = {**settings_of(step), "seconds": 60.0, "diverged_at": None}
                (folder / "done.json").write_text(json.dumps(noted))
                after = {"before": {"bbox": {"AP": 20.0}}, "after": {"bbox": {"AP": 20.0 + gain}}}
                content = {"bbox": {"AP": 30.0}} if step.is_training else {"results": after}
                file = "results.json" if step.is_training else "precise.json"
                (folder / file).write_text(json.dumps(content))
                if step.is_training:
                    (folder / "loss_spikes.json").write_text('{"largest": null, "spikes": []}')
        return setting.runs

    return write


def decide(runs, *more):
    args = ["domain-shift", "--decide", "--host", "torchvision", "--runs", runs]
    return run_here("tools/reproduce.py", *args, "--output", "report", *more)


@pytest.mark.parametrize(
    "gains, number, word",
    [
        # An interval of 97.5 % at most of three is 6.2 standard deviations to each side.
        ([5.0, 5.1, 5.2], 3, "seen"),
        ([2.0, 8.0, 5.0, 5.0, 5.0], 5, "seen"),
        ([0.3, -0.3, 0.0, 0.1, -0.1], 5, "absent"),
        ([-9.0, 9.0, 0.5, -7.0, 8.0], 5, "not seen"),
    ],
)
def test_seeds_are_added_until_all_is_decided(runs, gains, number, word):
    folder = runs(gains)
    done = decide(folder, "--seeds", 5)
    assert done.returncode == 0, done.stderr
    content = json.loads(Path("report", "results.json").read_text())
    (claim,) = content["claims"]
    assert len(content["seeds"]) == len(claim["effects"]) == number and claim["verdict"] == word
    assert content["looks"] == [3, 5] and content["confidence"] == 0.975
    assert "97.5 % interval" in Path("report", "claims.md").read_text()
    looks = [line.split()[0] for line in done.stdout.splitlines() if "seeds; looked at" in line]
    assert looks == [str(n) for n in (3, 5) if n <= number]
    # What has been looked at stays: another limit would have other intervals.
    other = decide(folder, "--seeds", 8)
    assert other.returncode == 1 and "looks [3, 5], and this is one with [3, 5, 8]" in other.stderr


def test_what_it_will_cost(runs):
    done = decide(runs([1.0]), "--dry-run")
    assert "3 seeds; looked at with 3, 5, 8, 12, until all claims are decided" in done.stdout
    assert "at most 44 steps, " in done.stdout and "8 of 12 steps are to be run" in done.stdout
