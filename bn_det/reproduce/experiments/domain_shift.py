"""Section 5: population statistics of the domain that the model is used on (AdaBN)."""

from __future__ import annotations

from ..results import Line, Panel, Picture, Results, Row, Table, average, difference, draw
from ..steps import Setting, Step, Training
from .common import adabn_of, base_training

DOMAINS = ("night", "fog", "sensor")


def adabn_step(of: Training, domain: str) -> Step:
    return adabn_of(of, domain, f"shapes_{domain}_val")


def plan(setting: Setting, seed: int) -> list[Step]:
    of = base_training(setting, seed)
    return [of.step, *(adabn_step(of, domain) for domain in DOMAINS)]


def ap(results: Results, seed: int, domain: str, when: str) -> float | None:
    """Box AP on a domain, "before" AdaBN or "after"."""
    step = adabn_step(base_training(results.setting, seed), domain)
    return results.ap(step, "precise.json", "results", when, "bbox")


def own_ap(results: Results, seed: int) -> float | None:
    """Box AP where the model was trained."""
    return results.ap(base_training(results.setting, seed).step, "results.json", "bbox")


def adabn(results: Results, seed: int) -> float | None:
    gains = [
        difference(ap(results, seed, d, "after"), ap(results, seed, d, "before")) for d in DOMAINS
    ]
    return average(gains)


EFFECTS = {"AdaBN": adabn}


def show(results: Results) -> list[Table | Picture]:
    of = base_training(results.setting, results.seeds[0])
    rows = [Row(("as in training",), (results.over_seeds(own_ap), []), (of.step,))]
    for domain in DOMAINS:
        cells = tuple(results.over_seeds(ap, domain, when) for when in ("before", "after"))
        rows.append(Row((domain,), cells, (of.step, adabn_step(of, domain))))
    columns = ("box AP, its own statistics", "box AP, AdaBN")
    title = "The same model on validation images in other appearances"
    xs = list(range(len(DOMAINS)))
    lines = [
        Line(name, xs, [results.over_seeds(ap, domain, when) for domain in DOMAINS])
        for name, when in (("its own statistics", "before"), ("AdaBN", "after"))
    ]
    panel = Panel("Domain shift", "images", "box AP", lines, groups=DOMAINS)
    caption = "Box AP by night, in fog and by another sensor."
    return [
        Table("adabn", title, ("images",), columns, (1, 1), rows),
        Picture("domain_shift", caption, draw([panel])),
    ]
