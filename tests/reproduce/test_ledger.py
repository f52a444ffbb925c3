"""tools/list_claims.py: docs/claims.json, and the table of docs/claims.md that is made of it."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from bn_det.errors import InputError
from bn_det.reproduce.claims import CLAIMS
from bn_det.reproduce.verdicts import judge

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools" / "list_claims.py"
CLAIM = next(claim for claim in CLAIMS if claim.name == "precise early")


@pytest.fixture
def list_claims(monkeypatch):
    main = runpy.run_path(str(COMMAND))["main"]

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["list_claims.py", *map(str, args)])
        main()

    return call


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "docs" / "claims.md", tmp_path)
    (tmp_path / "claims.json").write_text("[]")
    return tmp_path


def report(path, effects, host="torchvision", opts=(), seeds=None, of=None, **settings):
    """As bn-det reproduce writes it, of one claim with these effects."""
    seeds = seeds or range(1, len(effects) + 1)
    verdict = judge(CLAIM, effects)._replace(seeds=tuple(seeds))
    of_claim = {**CLAIM._asdict(), **verdict._asdict(), "verdict": verdict.word, **(of or {})}
    content = {
        **{"data": "shapes", "host": host, "opts": list(opts), "confidence": 0.95, "num_gpus": 8},
        **{"seeds": list(seeds), "versions": {"torch": "2.14.1"}, **settings},
        "claims": [of_claim, {**of_claim, "name": "leak", "verdict": ""}],
    }
    path.write_text(json.dumps(content))
    return path


def test_up_to_date(list_claims):
    """That of this repository, whose entries say what their own numbers do."""
    list_claims("--check")
    claims = {claim.name: claim for claim in CLAIMS}
    for of in json.loads((ROOT / "docs" / "claims.json").read_text()):
        claim = claims[of["claim"]]
        verdict = judge(claim, of["effects"], of["confidence"])
        assert of["data"] in claim.data and len(of["seeds"]) == len(of["effects"])
        assert (verdict.word, verdict.mean) == (of["verdict"], pytest.approx(of["mean"]))


def test_a_report_is_added(list_claims, folder):
    """Once for each data and host; what is not measured is not."""
    for host, effects in (("torchvision", [1.5, 1.6, 1.7]), ("detectron2", [0.5, 0.6, 0.7])):
        list_claims("--folder", folder, "--add", report(folder / f"{host}.json", effects, host))
    first, second = json.loads((folder / "claims.json").read_text())
    assert (first["host"], first["verdict"]) == ("detectron2", "absent")
    assert (second["effects"], second["verdict"]) == ([1.5, 1.6, 1.7], "seen")
    page = (folder / "claims.md").read_text()
    assert "| shapes, torchvision | +1.60 [1.35, 1.85] (3) " in page and "| absent " in page
    list_claims("--folder", folder, "--check")
    other = report(folder / "again.json", [2.0, 2.1, 2.2, 2.3])
    list_claims("--folder", folder, "--add", other)
    assert json.loads((folder / "claims.json").read_text())[1]["seeds"] == [1, 2, 3, 4]


def test_seeds_are_those_of_the_effects(list_claims, folder):
    path = report(folder / "r.json", [1.5, 1.6, 1.7], seeds=[1, 3, 4])
    list_claims("--folder", folder, "--add", path)
    assert json.loads((folder / "claims.json").read_text())[0]["seeds"] == [1, 3, 4]


def test_seeds_whose_effect_is_not_known(list_claims, folder):
    path = report(folder / "r.json", [1.5, 1.6], of={"unknown": [3]})
    list_claims("--folder", folder, "--add", path)
    assert "(2; none of seed 3) " in (folder / "claims.md").read_text()


def test_fewer_seeds_take_no_place(list_claims, folder):
    list_claims("--folder", folder, "--add", report(folder / "r.json", [1.5, 1.6, 1.7]))
    before = (folder / "claims.json").read_text()
    words = "precise early shapes torchvision: 1 seeds are not accepted in place of the 3 that are"
    with pytest.raises(InputError, match=words):
        list_claims("--folder", folder, "--add", report(folder / "r.json", [9.0]))
    assert (folder / "claims.json").read_text() == before


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data": "moon"}, "there is no claim 'precise early' on data 'moon'"),
        ({"of": {"name": "a guess"}}, "there is no claim 'a guess' on data 'shapes'"),
        ({"of": {"verdict": "splendid"}}, "is 'splendid' there, and its effects 'seen'"),
        ({"of": {"seeds": [1, 2]}}, "has not an effect for each seed"),
        ({"of": {"effects": [1.0, None, 2.0]}}, "cannot be read as results.json"),
        ({"failed": {"train/x": "no"}}, "of which 1 steps have failed; give its command again"),
        ({"data": "coco", "num_gpus": 2}, "with the options --num-gpus 2, which are not"),
    ],
)
def test_reports_that_do_not_fit(list_claims, folder, settings, words):
    path = report(folder / "r.json", [1.5, 1.6, 1.7], **settings)
    with pytest.raises(InputError, match=words):
        list_claims("--folder", folder, "--add", path)
    assert (folder / "claims.json").read_text() == "[]"


@pytest.mark.parametrize("name, text", [("claims.json", "{"), ("claims.json", "[1]"),
                                        ("claims.md", "no table")])  # fmt: skip
def test_files_that_others_have_written(list_claims, folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=r"^--folder: .*: not as this command leaves its files"):
        list_claims("--folder", folder)
    assert (folder / name).read_text() == text


def test_a_stale_page_is_noticed(list_claims, folder):
    list_claims("--folder", folder, "--add", report(folder / "r.json", [1.5, 1.6, 1.7]))
    shutil.copy(ROOT / "docs" / "claims.md", folder)
    with pytest.raises(InputError, match=r"claims.md: is out of date; run python tools/list_cl"):
        list_claims("--folder", folder, "--check")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"claims": [1], "opts": []}'])
def test_what_is_no_report(list_claims, folder, text):
    (folder / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r.json: cannot be read as results.json of bn-det rep"):
        list_claims("--folder", folder, "--add", folder / "r.json")
    assert (folder / "claims.json").read_text() == "[]"


def test_a_report_of_other_settings(list_claims, folder):
    path = report(folder / "r.json", [1.5, 1.6, 1.7], opts=["SOLVER.MAX_ITER", "9"])
    with pytest.raises(InputError, match=r"with the options SOLVER.MAX_ITER 9, which are not"):
        list_claims("--folder", folder, "--add", path)
    with pytest.raises(InputError, match=r"there is no file .*claims.json"):
        list_claims("--folder", folder / "none")
