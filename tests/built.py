"""What a row of configs/README.md says of a config, and what the model has that a host builds."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_det import BatchNorm2d, L1BatchNorm2d
from bn_det.config.keys import leaves
from bn_det.config.nf import NFBackbone
from bn_det.config.parts import DENSE
from bn_det.config.table import BOTH, COLUMNS, DETECTRON2, OTHER_WEIGHTS
from bn_det.layers.kinds import batch_norms
from bn_det.tv import get_cfg
from hosts import HOSTS, detectron2

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULTS = dict(leaves(get_cfg()))
HOSTS_OF = {BOTH: HOSTS, OTHER_WEIGHTS: HOSTS, DETECTRON2: [detectron2]}
"""From the cell of a row to the hosts, as parameters of tests."""


class Row(NamedTuple):
    """A row of the table, its cells taken apart.

    Attributes:
        path: of the YAML file, in the folder of the configs.
        detector: "name", "net", "convs" and "fcs" (of the box head; None without one), and the
            "begin", from weights or not.
        data: the names of the training sets, without "_train".
        schedule: "iterations", "images", "rate" and "falls": where it falls, or "cosine".
        norms: of each part of the detector, by its node of MODEL; "none" for none.
        levels: what a part's levels share, of those parts that tell them apart.
        choices: KEY VALUE pairs.
    """

    path: str
    reproduces: str
    hosts: str
    detector: dict[str, str]
    data: list[str]
    schedule: dict[str, str]
    norms: dict[str, str]
    freeze_at: int
    levels: dict[str, str]
    choices: dict[str, object]

    def __getitem__(self, key: str) -> object:
        """The value of a key, its default if it is none of the choices."""
        return self.choices.get(key, DEFAULTS[key])


def read_table(path: Path = CONFIGS / "README.md") -> dict[str, Row]:
    """The rows of all tables, by the path of the config."""
    lines = [line.split("|")[1:-1] for line in path.read_text().splitlines() if "([yaml]" in line]
    rows = [_row(dict(zip(COLUMNS, map(str.strip, cells), strict=True))) for cells in lines]
    return {row.path: row for row in rows}


def _row(cells: dict[str, str]) -> Row:
    detector = re.fullmatch(
        r"(?P<name>.+) (?P<net>R-\d+|nf_\w+) FPN( ((?P<convs>\d)conv)?(?P<fcs>\d)fc)?, "
        r"(?P<begin>.+)",
        cells["detector"],
    ).groupdict()
    schedule = re.fullmatch(
        r"(?P<iterations>\d+) x (?P<images>\d+)( \(.*\))?; (?P<rate>[\d.]+), (at )?(?P<falls>.+)",
        cells["schedule"],
    ).groupdict()
    dense = DENSE.get("BN" + detector["name"])
    parts = {"head": dense, "RPN": "RPN", "box": "ROI_BOX_HEAD", "mask": "ROI_MASK_HEAD"}
    backbone, _, freeze_at = cells["backbone"].partition(", FREEZE_AT ")
    pairs = [cell.split(" ") for cell in cells["heads"].split(", ")]
    levels = [cell.split(" ") for cell in cells["levels"].split(", ") if cell]
    return Row(
        re.search(r"\[yaml\]\((.+?)\)", cells["config"])[1],
        cells["reproduces"],
        cells["hosts"],
        detector,
        cells["data"].split(", "),
        schedule,
        {"RESNETS": backbone, "FPN": cells["FPN"], **{parts[head]: norm for head, norm in pairs}},
        int(freeze_at or 0),
        {parts[head]: shared for head, shared in levels},
        {key: _value(text) for key, text in re.findall(r"`(\S+) (.+?)`", cells["choices"])},
    )


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parts_of(host: str, model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a detector by their nodes of MODEL."""
    backbone = model.backbone
    if host == "torchvision":
        parts = {"RESNETS": backbone.body, "FPN": backbone.fpn}
    else:
        pyramid = [m for m in backbone.children() if m is not backbone.bottom_up]
        parts = {"RESNETS": backbone.bottom_up, "FPN": nn.ModuleList(pyramid)}
    if not hasattr(model, "roi_heads"):
        return {**parts, DENSE.get(type(model).__name__, "RETINANET"): model.head}
    rpn = model.rpn.head if host == "torchvision" else model.proposal_generator.rpn_head
    heads = {"RPN": rpn, "ROI_BOX_HEAD": model.roi_heads.box_head}
    mask_head = getattr(model.roi_heads, "mask_head", None)
    return {**parts, **heads, **({} if mask_head is None else {"ROI_MASK_HEAD": mask_head})}


def stages_of(host: str, body: nn.Module) -> list[nn.Module]:
    """The stem, res2, res3, res4 and res5 of a backbone."""
    if isinstance(body, NFBackbone):
        return [body.stem, *body.stages]
    if host == "torchvision":
        stem = nn.ModuleList([body.conv1, body.bn1])
        return [stem, body.layer1, body.layer2, body.layer3, body.layer4]
    return [body.stem, body.res2, body.res3, body.res4, body.res5]


_CLASSES = {
    "FrozenBatchNorm2d": "FrozenBN",
    "GroupNorm": "GN",
    "LayerNorm": "LN",
    "LayerNorm2d": "LN",
    "LocalResponseNorm": "LRN",
}
"""What the classes of either host are called in a config."""


def norms_in(part: nn.Module) -> dict[nn.Module, str]:
    """The layers of a part that normalize activations, and what a config calls each."""
    others = {m: _CLASSES.get(type(m).__name__) for m in part.modules()}
    found = {layer: _name(layer) for layer in batch_norms(part)}
    return {**found, **{layer: name for layer, name in others.items() if name}}


def _name(layer: _BatchNorm) -> str:
    if isinstance(layer, L1BatchNorm2d):
        return "L1BN"
    if not isinstance(layer, BatchNorm2d):
        return f"{type(layer).__name__}, which is not ours"
    named = {"SyncBN": layer.group, "GhostBN": layer.ghost_size, "BRN": layer.renorm}
    return "+".join(name for name, choice in named.items() if choice) or "BN"


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in module.modules())
