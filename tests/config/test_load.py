"""Config files on both hosts' configs."""

import pytest

from bn_det.config.load import load_config
from bn_det.errors import InputError
from hosts import every_host, make_cfg
from reference import BASE

EVAL = "!!python/object/apply:eval"


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@every_host
def test_what_files_of_detectron2_have(host, write):
    """A base, arithmetic, and values that yacs takes apart."""
    text = f'_BASE_: "{BASE}"\nMODEL:\n  ANCHOR_GENERATOR:\n    SIZES: {EVAL} '
    text += '["[[x, x * 2**(1.0/3)] for x in [32, 64]]"]\nINPUT:\n  MIN_SIZE_TRAIN: (192, 224)\n'
    cfg = make_cfg(host, write(text))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 32 * 2 ** (1 / 3)], [64, 64 * 2 ** (1 / 3)]]
    assert cfg.INPUT.MIN_SIZE_TRAIN == (192, 224)
    assert cfg.MODEL.META_ARCHITECTURE == "BNRetinaNet"  # of the base


@every_host
@pytest.mark.parametrize(
    "text, message",
    [
        (
            "INPUT: {MIN_SIZE_TRAIN: (1, 2)}",
            "INPUT.MIN_SIZE_TRAIN: '\\(1' is .*\\[1, 2\\] or",
        ),
        (f"SOLVER: {{GAMMA: {EVAL} ['open(1)']}}", f"SOLVER.GAMMA: {EVAL}: 'open\\(1\\)' is not"),
        ("SOLVER: {GAMMA: !!python/name:os }", "SOLVER.GAMMA: the tag !!python/name:os is not"),
        ("SOLVER: {GAMA: 3}", "Non-existent config key: SOLVER.GAMA \\(the .* host does not know"),
        ("SOLVER: 3", "Type mismatch .* \\.\\.\\. .*for config key: SOLVER$"),
        ("1: 2", "is not a config file: sequence item 0: expected str"),
        ("_BASE_: a.yaml", "_BASE_ goes in a circle: .*a.yaml -> .*a.yaml"),
        ("VERSION: 2\nSOLVER: {BASE_LR: 1.0, BN_MOMENTUM: 2.0}", "SOLVER.BN_MOMENTUM: 2.0 is not"),
    ],
)
def test_what_is_refused_leaves_the_config(host, write, text, message):
    cfg = make_cfg(host, BASE)
    before, path = cfg.dump(), write(text)
    with pytest.raises(InputError, match=message) as e:
        load_config(cfg, path, ["SOLVER.BASE_LR", "0.5"], host)
    assert cfg.dump() == before and "\n" not in str(e.value)
    with pytest.raises(InputError, match="SOLVER.GAMA"):
        load_config(cfg, BASE, ["SOLVER.BASE_LR", "0.5", "SOLVER.GAMA", "1"], host)
    assert cfg.dump() == before
