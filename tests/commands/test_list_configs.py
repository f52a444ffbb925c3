"""The table of all configs, and the command that writes it."""

import runpy
import shutil
import sys

import pytest

from bn_det.config.table import PAPER, head_comment, reference_of
from bn_det.errors import InputError
from built import CONFIGS, read_table

COMMAND = CONFIGS.parent / "tools" / "list_configs.py"


@pytest.fixture
def list_configs(monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", [str(COMMAND), *map(str, args)])
        runpy.run_path(str(COMMAND), run_name="__main__")

    return call


@pytest.fixture
def folder(tmp_path):
    """A folder of two configs and their bases."""
    for name in ("Base-RetinaNet-Shapes.yaml", "quick_start.yaml"):
        shutil.copy(CONFIGS / name, tmp_path)
    shutil.copytree(CONFIGS / "multi_domain" / "shapes", tmp_path / "multi_domain" / "shapes")
    return tmp_path


def test_up_to_date(list_configs):
    list_configs("--check")
    files = {p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml")}
    assert set(read_table()) == {f for f in files if "Base-" not in f}


def test_a_stale_table_is_noticed(list_configs, folder, capsys):
    with pytest.raises(SystemExit, match=r"README.md: is out of date: it lacks '# The configs'"):
        list_configs("--check", "--folder", folder)
    list_configs("--folder", folder)
    assert "9 configs" in capsys.readouterr().out
    list_configs("--check", "--folder", folder)
    path = folder / "quick_start.yaml"
    before = path.read_text()
    path.write_text(f"{before}SOLVER: {{ACCUMULATE: 3}}\n")
    message = r"lacks '\| quick_start .*`SOLVER.ACCUMULATE 3` \|'; run python tools/list_configs.py"
    with pytest.raises(SystemExit, match=message):
        list_configs("--check", "--folder", folder)
    path.unlink()
    with pytest.raises(SystemExit, match="it has lines that are not in the table"):
        list_configs("--check", "--folder", folder)


def test_a_config_that_cannot_be_loaded(list_configs, folder):
    (folder / "bad.yaml").write_text("# Bad.\nMODEL: {RETINANET: {NORN: BN}}\n")
    with pytest.raises(SystemExit, match="bad.yaml: Non-existent config key: .*NORN"):
        list_configs("--folder", folder)
    assert not (folder / "README.md").exists()
    with pytest.raises(SystemExit, match="^error: --folder: there is no folder .*none$"):
        list_configs("--folder", folder / "none")


def test_a_twin_in_python(list_configs, folder):
    list_configs("--folder", folder)
    table = (folder / "README.md").read_text()
    (folder / "quick_start.py").touch()
    list_configs("--folder", folder)
    twin = "quick_start ([yaml](quick_start.yaml), [py](quick_start.py))"
    found = (folder / "README.md").read_text()
    assert found == table.replace("quick_start ([yaml](quick_start.yaml))", twin) != table


@pytest.mark.parametrize(
    "comment, reference",
    [
        ("GroupNorm (Wu & He 2018).", "ours"),
        (f"Wu & Johnson, {PAPER}, Table 5, row 3, on COCO:", "Table 5, row 3"),
        (f"Ours: Wu & Johnson, {PAPER}, Table 5, row 3, but", "ours, after Table 5, row 3"),
        (f"Shuffled ({PAPER}, Table 6 and Figure 9).", "Table 6 and Figure 9"),
        (f"BN: {PAPER}, Tables 3 and 6, in the latter", "Tables 3 and 6"),
        (f"PreciseBN ({PAPER}, Sec. 3), to", "Sec. 3"),
        (f"Ours (after {PAPER}, Sec. 6.3).", "ours, after Sec. 6.3"),
    ],
)
def test_reference(comment, reference):
    assert reference_of(comment) == reference


def test_the_paper_without_a_place(list_configs, folder):
    path = folder / "quick_start.yaml"
    path.write_text(path.read_text().replace("The main job", f"Row 1 of {PAPER}", 1))
    with pytest.raises(InputError, match="names Rethinking"):
        reference_of(head_comment(path.read_text()))
    with pytest.raises(SystemExit, match="quick_start.yaml: the comment at the head names Reth"):
        list_configs("--folder", folder)
