"""benchmarks/launches.py: what a BatchNorm of five levels launches on a GPU."""

import json

import pytest

pytest.importorskip("triton")

from here import run_here


def test_launches():
    """With Triton four and three; by ATen some for each level, and few more."""
    done = run_here("benchmarks/launches.py", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    triton, aten = found["triton"], found["aten"]
    assert len(triton["forward"]) == len(triton["backward"]) == 8
    assert max(triton["forward"].values()) == 4 and set(triton["backward"].values()) == {3}
    for case, number in aten["forward"].items():
        # A tensor for each level of its own takes torch's own function.
        most = (32 if "shared-shared" in case else 39) if case.startswith("shared") else 10
        assert number <= most, case
    for case, number in aten["backward"].items():
        assert number <= (35 if case.startswith("shared") else 13), case
    assert aten["backward"]["shared-shared-shared"] == 25
