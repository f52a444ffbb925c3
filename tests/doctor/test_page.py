"""The doctor's report as a page: what a reader's browser makes of it."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bn_det.doctor import RULES, Finding, html_page
from bn_det.doctor.findings import Measures, Tried, make_report

HOSTILE = "x<script>alert(1)</script>\"'&\0\ud800\u202e"
VOID = {"meta", "br", "wbr", "rect", "line"}


class Reader(HTMLParser):
    """Elements as (tag, attributes, text), in the order of their beginnings."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def texts(self, tag, kind=None):
        return ["".join(texts) for t, a, texts in self.elements if t == tag and _is(a, kind)]

    def attributes(self, tag, kind=None):
        return [a for t, a, _ in self.elements if t == tag and _is(a, kind)]


def _is(attributes, kind):
    return kind is None or attributes.get("class") == kind


def layer(name="norm", shift=0.1, **more):
    """One whose shift chance explains up to 0.5."""
    usual = {"mean_chance": 0.1, "var_chance": 0.1, "noise": 0.1, "calls": 1, "share": None}
    return Measures(name, shift, bound=5.0, **{"var_shift": 0.1, **usual, **more})


def finding(rule="BN201", severity="error", where=("norm",), treatment="mend it", **more):
    return Finding(rule, severity, where, 2.0, "seen", treatment, **more)


def page_of(findings=(), layers=(), subject="model.pth"):
    return html_page(make_report(findings, RULES, "all is well", layers), subject)


def picture(layers, title="Shift of the mean", findings=()):
    """One of the pictures, by its title."""
    page = page_of(findings, layers)
    (figure,) = re.findall(f"<figure>\n<figcaption><strong>{title}<.*?</figure>", page, re.DOTALL)
    return Reader(figure)


def test_what_comes_from_a_file_stays_text():
    findings = [finding(where=(HOSTILE,) * 5, treatment=HOSTILE)]
    page = page_of(findings, [layer(HOSTILE, 3.0)], HOSTILE)
    assert page.isascii() and "\0" not in page
    reader = Reader(page)
    assert reader.attributes("script") == []
    shown = HOSTILE.replace("\0", "\ufffd")
    # The parser reads half a surrogate pair as a browser does.
    shown = shown.replace("\ud800", "\ufffd")
    assert reader.texts("code").count(shown) == 17  # 5 places, 2 commands, the subject, pictures
    for attributes in reader.attributes("rect") + reader.attributes("line"):
        assert set(attributes) <= {"class", "x", "y", "width", "height", "x1", "x2", "y1", "y2"}


def test_it_stands_alone():
    page = page_of([finding()], [layer()])
    reader = Reader(page)
    assert not any({"src", "href", "style"} & set(a) for _, a, _ in reader.elements)
    assert not any(word in page for word in ("url(", "@import", "<script", "http:", "https:"))
    assert page == page_of([finding()], [layer()])


@pytest.mark.parametrize(
    "severities, worst, said",
    [
        (["note", "error", "error"], "error", "2 errors, 1 note"),
        (["warning"], "warning", "1 warning"),
        (["note"], "note", "1 note"),
        ([], "none", "nothing found"),
    ],
)
def test_the_headline(severities, worst, said):
    reader = Reader(page_of([finding(severity=severity) for severity in severities]))
    assert reader.attributes("header")[0]["class"] == worst
    assert said in reader.texts("header")[0] and "model.pth" in reader.texts("header")[0]
    (headline,) = reader.texts("h1")
    if worst in ("error", "warning"):
        assert headline == "statistics do not fit the weights, in norm (BN201)"
        assert reader.texts("pre")[0] == "mend it"
    else:
        assert headline == "all is well"


def test_the_findings():
    findings = [
        finding(standard_error=0.1, where=tuple("abcde"), gain=12.34, measure="AP"),
        finding("BN111", "note", (), treatment="other", untried="it may harm"),
        finding("BN202", "warning"),
    ]
    reader = Reader(page_of(findings))
    header, first, second, third = reader.texts("tr")
    assert header.replace("\n", "") == "RuleWhereHow muchGainWhy, and what mends it"
    assert first.startswith("error BN201stale statisticsabcand 2 morede2 ± 0.1 standard deviations")
    assert "+12.3 AP" in first and "What it cannot tell" + RULES["BN201"].limits in first
    assert second.startswith("warning BN202") and "Mended as above" in second
    assert third.startswith("note BN111dead channelsthe file") and "Untried: it may harm." in third
    assert reader.texts("pre") == ["mend it", "mend it", "other"]
    assert "Gain" not in Reader(page_of([finding()])).texts("tr")[0]
    of_loss = Reader(page_of([finding(gain=0.5, measure="loss")])).texts("tr")[1]
    assert "-0.5 loss" in of_loss


def test_an_untried_treatment_of_the_headline():
    reader = Reader(page_of([finding(untried="it may harm")]))
    assert reader.texts("h1") == ["statistics do not fit the weights, in norm (BN201)"]
    assert reader.texts("header")[0].endswith("Untried: it may harm.mend it")


def test_the_treatments():
    tried = [
        Tried("recomputed", ("BN201",), "AP", 20.4, 48.58, 28.18, None, True, False, ""),
        Tried("per level", ("BN202",), "AP", 20.4, 50.0, 29.6, None, True, True, HOSTILE),
    ]
    report = make_report([finding(gain=28.18, measure="AP")], RULES, "well", (), tried)
    reader = Reader(html_page(report, "model.pth"))
    *_, first, second = reader.texts("tr")
    assert first == "recomputed20.448.58+28.2 AP"
    assert second == f"per level20.450+29.6 APKept. {HOSTILE}".replace("\0", "\ufffd").replace(
        "\ud800", "\ufffd"
    )
    assert "TreatmentAP beforeAfterGain" in [
        text.replace("\n", "") for text in reader.texts("thead")
    ]
    of_loss = tried[0]._replace(measure="loss", standard_error=0.25, gain=1.5)
    page = html_page(make_report([finding()], RULES, "well", (), [of_loss]), "model.pth")
    assert "-1.5 ± 0.2 loss" in Reader(page).texts("tr")[-1]


def test_bars_are_as_long_as_values_are_large():
    layers = [layer("a", 0.2), layer("b", 4.0), layer("c", 2.0)]
    reader = picture(layers)
    good, bad = reader.attributes("rect", "bar"), reader.attributes("rect", "bad")
    heights = [float(a["height"]) for a in (*good, *bad)]
    assert heights[1:] == pytest.approx([20 * heights[0], 10 * heights[0]], abs=1)
    assert [float(a["height"]) for a in reader.attributes("rect", "chance")] == pytest.approx(
        [heights[0] * 2.5] * 3, abs=1
    )
    assert len({a["y2"] for a in reader.attributes("line", "bound")}) == 1
    # Beyond chance: coloured, with a mark below, a number above, and the name.
    assert len(good) == 1 and len(reader.attributes("line", "mark")) == 2
    assert reader.texts("text", "rank") == ["1", "2"]
    assert reader.texts("li") == ["b 4 (chance: up to 0.5)", "c 2 (chance: up to 0.5)"]
    lefts = [float(a["x"].rstrip("%")) for a in (good[0], *bad)]
    assert lefts == pytest.approx([100 / 24, 100 / 3 + 100 / 24, 200 / 3 + 100 / 24], abs=0.01)


def test_nothing_is_marked_of_a_healthy_model():
    reader = picture([layer("a", 0.2), layer("b", 0.5)])
    assert reader.attributes("rect", "bad") == reader.attributes("line", "mark") == []
    assert reader.texts("li") == [] and "The largest: b 0.5" in reader.texts("p")[0]


def test_one_bar_does_not_flatten_the_others():
    layers = [layer(str(k), 2.0) for k in range(7)]
    layers[3], layers[5] = layer("far", 1e6), layer("nan", math.nan)
    reader = picture(layers)
    heights = [float(a["height"]) for a in reader.attributes("rect", "bad")]
    assert heights[0] > max(heights) / 6 and heights[3] == heights[5] == max(heights)
    assert len(reader.attributes("line", "cut")) == 2
    assert [name.split(" (")[0] for name in reader.texts("li")] == [
        *("nan not finite", "far 1e+06", "0 2", "1 2", "2 2")
    ]
    assert "and 2 more" in reader.texts("p")[0]


def test_ranks_of_neighbours_are_apart():
    layers = [layer(str(k), 1.0 + k if 70 <= k < 75 else 0.1) for k in range(150)]
    ys = [a["y"] for a in picture(layers).attributes("text", "rank")]
    assert len(ys) == 5 and all(len(set(ys[k : k + 3])) == 3 for k in range(3))


def test_levels():
    layers = [layer("a"), layer("head", calls=5, share=0.3), layer("tower", calls=5, share=0.2)]
    title = "Between-level share of the variance"
    reader = picture(layers, title, [finding("BN202", "warning", ("head",))])
    assert len(reader.attributes("rect", "bar")) == len(reader.attributes("rect", "bad")) == 1
    assert reader.texts("li") == ["head 0.3"]
    assert title not in page_of([], layers[:1])


def test_a_file_alone_has_no_pictures():
    assert "<svg" not in page_of([finding()])


numbers = st.floats(min_value=0) | st.just(math.nan)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers, st.none() | numbers), min_size=1, max_size=4))
@example([(1.5e308, 0.1, 5e-324, None)])
def test_any_numbers(values):
    layers = [
        layer(str(k), shift, mean_chance=chance, noise=noise, share=share)
        for k, (shift, chance, noise, share) in enumerate(values)
    ]
    for tag in ("rect", "line"):
        for attributes in Reader(page_of([], layers)).attributes(tag):
            ends = [float(v.rstrip("%")) for key, v in attributes.items() if key != "class"]
            assert all(0 <= v <= 160 for v in ends)
