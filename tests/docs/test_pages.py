"""README and the pages of docs/: their links, commands, code, and the names in them, are real."""

import argparse
import re
import runpy
import sys
import textwrap

import pytest

import bn_det
from bn_det.config.load import load_config
from bn_det.config.ours import KEYS
from bn_det.data.coco import check_names
from bn_det.doctor import RULES
from bn_det.tv.config import get_cfg
from bn_det.tv.trainer import known_sources
from here import ROOT
from pages import anchors, blocks, commands, links, prose

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

BN_DET = {
    "train": "train_net",
    "recompute": "recompute_statistics",
    "average": "average_checkpoints",
    "leakage": "measure_leakage",
    "loss": "measure_loss",
    "plot": "plot_metrics",
    "visualize": "visualize_json_results",
    "prepare-blood-cells": "prepare_blood_cells",
    **{name: name for name in ("doctor", "report", "reproduce")},
}
"""The subcommands of bn-det, by the files of tools/ that are the same."""


def test_readme_is_a_front_door():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    picture, commands = (
        lines.index(line) for line in lines if "doctor.png" in line or "[tools]" in line
    )
    assert picture < commands


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page):
    """What a link names is there, and so is the heading."""
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            made = {rule.lower() for rule in RULES} if target.name == "rules.md" else set()
            assert anchor in anchors(target) | made, link


def test_every_page_has_a_place():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in nav, page


class Parsed(BaseException):
    """What a command's own parser has made of a command line."""


@pytest.fixture
def parse(monkeypatch):
    """Run a command until its parser has parsed, which is the real one."""
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def stop(parser, *args, real=real):
            raise Parsed(real(parser, *args))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)

    def call(words):
        python, file, *rest = words
        if python == "bn-det":
            assert file in BN_DET, words
            tool = ROOT / "tools" / f"{BN_DET[file]}.py"
        else:
            tool = ROOT / file
        monkeypatch.setattr(sys, "argv", [str(tool), *rest])
        with pytest.raises(Parsed) as found:
            runpy.run_path(str(tool), run_name="__main__")
        return found.value.args[0]

    return call


def complete(words):
    """Whether a command is shown whole, without ``...``, and not by its name in a sentence."""
    return len(words) > 2 and "..." not in words


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands(page, parse, monkeypatch):
    """Each is parsed by its own parser; its config, data sets and keys are accepted."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words == ["bn-det", "--help"]:
            continue
        try:
            if not complete(words):
                file = words[1] if words[0] == "python" else f"tools/{BN_DET[words[1]]}.py"
                assert (ROOT / file).is_file()
            else:
                check_config(parse(words))
        except (Exception, SystemExit, pytest.fail.Exception) as e:
            raise AssertionError(f"{' '.join(words)}: {e}") from e


def check_config(args):
    file, opts = getattr(args, "config_file", None), list(getattr(args, "opts", []))
    if file is None:
        return
    assert (ROOT / file).is_file(), file
    if file.endswith(".py"):
        return
    assert len(opts) % 2 == 0, opts
    cfg = get_cfg_of(file)
    load_config(cfg, str(ROOT / file), opts, "Detectron2")
    named = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    named += [getattr(args, name, None) for name in ("dataset", "target")]
    check_names("data set", [name for name in named if name], known_sources(cfg))


def get_cfg_of(file):
    """With the keys of torchvision's host, or all, where a config is for Detectron2 alone."""
    if not any(part in file for part in ("fcos", "cascade")) and "/shapes/" in f"/{file}":
        return get_cfg()
    config = pytest.importorskip("detectron2.config", reason="a config for Detectron2")
    cfg = config.get_cfg()
    bn_det.add_bn_det_config(cfg)
    return cfg


CODE = [
    pytest.param(block, id=f"{name}-{number}")
    for page, name in zip(PAGES, NAMES, strict=True)
    if page.parent.name != "with"  # whose blocks go on from each other: tests/projects runs them
    for number, block in enumerate(b for b in blocks(page) if b.language == "python")
]


@pytest.mark.parametrize("block", CODE)
def test_code(block, tmp_path, monkeypatch, capsys):
    """It compiles, and runs unless its title, "with ...", says what it needs beside itself."""
    code = compile(textwrap.dedent(block.text), "a page", "exec")
    if block.title.startswith("with "):
        return
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "a page"})


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names(page):
    """Rules, config keys, tests, files and what is of bn_det are there."""
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bBN[1-5]\d\d\b", text)) <= RULES.keys()
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    for file in re.findall(r"`((?:bn_det|benchmarks|tools|configs|examples)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    for name in re.findall(r"(?:`|::: )bn_det\.([A-Za-z_0-9.]+)", text):
        assert_there(name.rstrip("."))
    for key in re.findall(
        r"`((?:MODEL|SOLVER|TEST|DATASETS|DATALOADER)\.[A-Z_0-9.]+[A-Z0-9])", text
    ):
        assert is_key(key) or key in OF_OTHERS, key


def assert_there(name):
    there, path = bn_det, "bn_det"
    for step in name.split("."):
        path = f"{path}.{step}"
        if not hasattr(there, step):
            skip = "Detectron2 is not installed"
            there = pytest.importorskip(path, reason=skip, exc_type=ModuleNotFoundError)
        else:
            there = getattr(there, step)


OF_OTHERS = "MODEL.FCOS", "SOLVER.AGC.CLIPPING"
"""Keys that pages name as those of another project."""


def is_key(key):
    cfg = pytest.importorskip("detectron2.config").get_cfg()
    bn_det.add_bn_det_config(cfg)
    for step in key.split("."):
        if step not in cfg:
            return any(known.startswith(key) for known in KEYS)
        cfg = cfg[step]
    return True


def test_every_public_name_is_in_the_api():
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: bn_det\.(\w+)$", text, re.MULTILINE))
    assert set(bn_det.__all__) <= shown


def test_five_terms_are_explained_where_a_newcomer_meets_them():
    readme = " ".join(prose(ROOT / "README.md").split())
    for said in (
        "population statistics (`running_mean` and `running_var`, which normalize at test time)",
        "another domain, a set of images with statistics of its own",
        "hosts, the libraries that build the detector",
        "a part (a piece of the detector with a norm of its own)",
        "reads its neighbours in the batch (a leak)",
    ):
        assert said in readme
    glossary = anchors(DOCS / "glossary.md")
    assert glossary >= {"population-statistics", "domain", "host", "part", "leak"}
