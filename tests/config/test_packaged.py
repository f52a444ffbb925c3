"""Config files by name, where the current folder has none."""

import pytest

from bn_det.config.packaged import find_config, packaged_configs
from bn_det.errors import InputError
from hosts import make_cfg

QUICK = "quick_start.yaml"


@pytest.mark.parametrize("name", [QUICK, f"configs/{QUICK}"])
def test_a_file_here_goes_first(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == str(packaged_configs() / QUICK)
    (tmp_path / "configs").mkdir()
    (tmp_path / name).write_text("SEED: 123\n")
    assert find_config(name) == name
    assert make_cfg("torchvision", name).SEED == 123


@pytest.mark.parametrize("name", ["", ".", "ways", f"../configs/{QUICK}", f"/{QUICK}"])
def test_what_is_no_name_of_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == name


@pytest.mark.parametrize(
    "name, words",
    [
        ("quick_strat.yaml", r"there is no file quick_strat.yaml, nor .*; nearest: \['quick_start"),
        ("configs/ways/GM.yaml", r"nearest: \['ways/GN.yaml'"),
        ("zzzzzz", "README.md lists these"),
        ("a\nb.yaml", r"there is no file 'a\\nb.yaml', nor a config of bn_det"),
    ],
)
def test_a_name_of_no_file(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        make_cfg("torchvision", name)
