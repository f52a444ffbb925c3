"""Config files on both hosts' configs."""

import sys

import pytest

from bn_det.config.keys import leaves
from bn_det.config.load import load_config
from bn_det.errors import InputError
from hosts import detectron2, every_host, make_cfg
from reference import BASE

# Python 3.10 takes it for a text.
OF_A_DEEP_VALUE = "a value has too many parts" if sys.version_info >= (3, 11) else "use an integer"
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
        ("SOLVER: 3", "a.yaml: SOLVER: 3 is not accepted: use a node, with keys such as '\\w+'$"),
        ("SOLVER: {BASE_LR: abc}", "SOLVER.BASE_LR: 'abc' is not accepted: use a number, more th"),
        ("SOLVER: {MAX_ITER: 1.5}", "SOLVER.MAX_ITER: 1.5 is not accepted: use an integer, 1 to "),
        ("DATASETS: {TRAIN: a}", "DATASETS.TRAIN: 'a' is not accepted: use a list of names, such"),
        ("MODEL: {MASK_ON: b}", "MODEL.MASK_ON: 'b' is not accepted: use True or False$"),
        ("MODEL: {WEIGHTS: 3}", "MODEL.WEIGHTS: 3 is not accepted: use text$"),
        ("1: 2", "a.yaml: 1: a key of type int is not accepted: keys are texts"),
        ('"a\\nb": 1', "Non-existent config key: a b"),
        (f'SEED: "0x{"f" * 6000}"', "a.yaml: SEED: an integer of more than 64 bits is not"),
        (f'SEED: "{"-" * 10**4}1"', "a.yaml is not a config file: a value has too many parts"),
        ("SOLVER: {BN_MOMENTUM: null, GAMMA: 0.2}", "a.yaml: SOLVER.BN_MOMENTUM: None is not"),
        ("SOLVER: {BN_MOMENTUM: None}", "BN_MOMENTUM: None is not accepted; use a .* type float$"),
        ("DATASETS:\n  SOURCES:", "a.yaml: DATASETS.SOURCES: None is not .*; use a .* type list$"),
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


@every_host
def test_no_key_may_become_none(host, write):
    """Whatever its default is, by a file or by the command's end."""
    cfg = make_cfg(host, BASE)
    # Detectron2 gives None a meaning in keys whose default it is.
    values = {key: value for key, value in leaves(cfg) if value is not None}
    assert {"MODEL.DEVICE", "SOLVER.ACCUMULATE", "MODEL.RETINANET.IN_FEATURES"} < set(values)
    for key, value in values.items():
        message = f"^{key}: None is not accepted; use a value of type {type(value).__name__}$"
        for end in ([], [key, "abc"]):  # yacs has lost the type by then
            with pytest.raises(InputError, match=message):
                load_config(cfg, "", [key, "None", *end], host)
    assert dict(leaves(cfg)) == dict(leaves(make_cfg(host, BASE)))


@every_host
def test_an_integer_where_the_default_is_a_float(host, write):
    """Of every such key, as the float; some do not take these, but for what they are."""
    cfg = make_cfg(host, BASE)
    keys = [key for key, value in leaves(cfg) if isinstance(value, float)]
    assert {"SOLVER.SYNC_BN_TIMEOUT", "SOLVER.BASE_LR", "MODEL.BN_FCOS.PRIOR_PROB"} < set(keys)
    for key in keys:
        path = key.split(".")
        for number in (0, 1):
            text = "".join(f"{'  ' * k}{name}:\n" for k, name in enumerate(path)).rstrip()
            file = write(f"{text} {number}\n")
            for config, opts in (("", [key, str(number)]), (file, [])):
                made = cfg.clone()
                try:
                    load_config(made, config, opts, host)
                except InputError as e:
                    assert "use a number" not in str(e)
                else:
                    found = dict(leaves(made))[key]
                    assert type(found) is float and found == number
    for value in ("True", "false", "'a'", "[1]", f"0x{'f' * 6000}"):
        file = write(f"SOLVER: {{BASE_LR: {value}}}")
        for config, opts in (("", ["SOLVER.BASE_LR", value]), (file, [])):
            with pytest.raises(InputError):
                load_config(cfg, config, opts, host)
    with pytest.raises(InputError, match="SOLVER.MAX_ITER: '1.0' is not accepted: use an integer"):
        load_config(cfg, "", ["SOLVER.MAX_ITER", "1.0"], host)


@pytest.mark.parametrize("host", [detectron2])
def test_none_where_it_is_the_default(host):
    cfg = make_cfg(host, BASE, "SOLVER.WEIGHT_DECAY_BIAS", "None")
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None
    load_config(cfg, "", ["SOLVER.WEIGHT_DECAY_BIAS", "0.5"], host)
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.5


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SEED", f"0x{'f' * 6000}"], "SEED: an integer of more than 64 bits is not accepted"),
        (["INPUT.MIN_SIZE_TRAIN", f"(1, 0x{'f' * 17})"], "INPUT.MIN_SIZE_TRAIN: an integer of"),
        (["SEED", "-" * 10**4 + "1"], "SEED: '---.* is not accepted: a value has too many parts"),
        (["SEED", f"a{'.b' * 10**5}"], f"SEED: 'a.b.*is not accepted: {OF_A_DEEP_VALUE}"),
        (["SOLVER\nX", "1"], r"'SOLVER\\nX': '1' is not accepted: Non-existent key: SOLVER X"),
        (["SOLVER\nX=1", "1"], r"'SOLVER\\nX=1': KEY=VALUE is for"),
        (["SOLVER\nX"], r"'SOLVER\\nX': has no value"),
        (
            ["SOLVER.MAX_ITER.X", "1"],
            "SOLVER.MAX_ITER.X: '1' is not accepted: SOLVER.MAX_ITER has no keys",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_at_the_end_of_the_command(opts, message):
    cfg = make_cfg("torchvision", BASE)
    with pytest.raises(InputError, match=f"^{message}") as e:
        load_config(cfg, "", opts, "torchvision")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_path_with_a_line_end(write, tmp_path):
    cfg = make_cfg("torchvision", BASE)
    for path in (write("SOLVER: {GAMA: 1}", "a\nb.yaml"), write("SEED: a", "a\nb.yaml")):
        with pytest.raises(InputError, match=r"a\\nb.yaml") as e:
            load_config(cfg, path, [], "torchvision")
        assert "\n" not in str(e.value)
    for name in ("a\nc.yaml", "a\nc.py"):
        with pytest.raises(InputError, match=r"a\\nc") as e:
            load_config(cfg, str(tmp_path / name), [], "torchvision")
        assert "\n" not in str(e.value)


@every_host
def test_a_misspelt_key_gets_the_nearest_names(host):
    with pytest.raises(InputError, match="does not know it; nearest: .'SOLVER.FREEZE_BN_ITER'"):
        make_cfg(host, BASE, "SOLVER.FREZE_BN_ITER", "3")
