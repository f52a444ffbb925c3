"""The doctor's report as SARIF: the parts that the standard requires, and that consumers read."""

import json
import math

import pytest

from bn_det.doctor import RULES, Finding, sarif_log
from bn_det.doctor.findings import make_report

FINDINGS = [
    Finding("BN111", "note", ("a",), 3.0, "seen", "mend it"),
    Finding("BN201", "error", ("b", "c"), 2.0, "seen", "mend it", 0.5, 12.0, "AP"),
    Finding("BN201", "warning", ("d",), math.inf, "seen", "mend it"),
    Finding("BN113", "warning", (), None, "seen", "mend it"),
]


def run_of(findings=FINDINGS, path="models/model.pth"):
    log = sarif_log(make_report(findings, RULES, "all is well"), path, "1.2.3")
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-schema-2.1.0.json")
    assert set(log) == {"$schema", "version", "runs"}
    (run,) = log["runs"]
    return run


def test_rules():
    driver = run_of()["tool"]["driver"]
    assert driver["name"] == "bn_det doctor" and driver["version"] == "1.2.3"
    levels = {of["id"]: of["defaultConfiguration"]["level"] for of in driver["rules"]}
    assert levels == {"BN111": "note", "BN113": "warning", "BN201": "error"}
    for of in driver["rules"]:
        rule = RULES[of["id"]]
        assert of["shortDescription"]["text"] == rule.name
        assert of["fullDescription"]["text"] == rule.finds
        for text in of["help"].values():
            assert all(part in text for part in (rule.finds, rule.why, rule.limits, rule.threads))


def test_results():
    run = run_of()
    results = run["results"]
    rules = [of["id"] for of in run["tool"]["driver"]["rules"]]
    assert [of["ruleId"] for of in results] == ["BN201", "BN113", "BN201", "BN111"]
    assert [of["level"] for of in results] == ["error", "warning", "warning", "note"]
    assert all(rules[of["ruleIndex"]] == of["ruleId"] for of in results)
    assert results[0]["message"]["text"] == "seen. Mend: mend it"
    properties = {"value": 2.0, "standardError": 0.5, "gain": 12.0, "gainMeasure": "AP"}
    assert results[0]["properties"] == properties
    assert results[2]["properties"] == {}  # JSON has no infinity
    places = [[one.get("logicalLocations") for one in of["locations"]] for of in results]
    assert places == [
        [[{"fullyQualifiedName": "b"}], [{"fullyQualifiedName": "c"}]],
        [None],
        [[{"fullyQualifiedName": "d"}]],
        [[{"fullyQualifiedName": "a"}]],
    ]
    for of in results:
        for one in of["locations"]:
            assert one["physicalLocation"] == {
                "artifactLocation": {"uri": "models/model.pth"}, "region": {"startLine": 1}
            }  # fmt: skip


def test_healthy():
    run = run_of([])
    assert run["results"] == run["tool"]["driver"]["rules"] == []
    assert run["properties"] == {"verdict": "all is well", "tried": []}


@pytest.mark.parametrize(
    "path, uri",
    [
        ("../my model#1.pth", "../my%20model%231.pth"),
        ("a:b.pth", "a%3Ab.pth"),
        ("/data/ü.pth", "file:///data/%C3%BC.pth"),
        ("detectron2://a/b.pkl", "detectron2://a/b.pkl"),
    ],
)
def test_addresses(path, uri):
    (result,) = run_of(FINDINGS[:1], path)["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri
