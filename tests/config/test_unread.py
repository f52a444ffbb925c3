"""Keys that are set and that nothing reads."""

import pytest

from bn_det.errors import InputError
from hosts import INSTALLED, every_host, make_cfg
from reference import BASE, RCNN_BASE


@every_host
@pytest.mark.parametrize(
    "base, opts, words",
    [
        (BASE, ["MODEL.RETINANET.NORM", "GN", "MODEL.RETINANET.BN.POPULATION", "shared"],
         "MODEL.RETINANET.BN.POPULATION: 'shared' does nothing with MODEL.RETINANET.NORM 'GN'"),
        (BASE, ["MODEL.FPN.GHOST_SIZE", "2"],
         "MODEL.FPN.GHOST_SIZE: 2 does nothing with MODEL.FPN.NORM 'BN'; it is for 'GhostBN'"),
        (BASE, ["SOLVER.BRN.R_MAX", "2.0"],
         "SOLVER.BRN.R_MAX: 2.0 does nothing with a model that has NORM"),
        (BASE, ["SOLVER.AGC.CLIP_FACTOR", "0.1"],
         "SOLVER.AGC.CLIP_FACTOR: 0.1 does nothing with SOLVER.AGC.ENABLED False"),
        (RCNN_BASE, ["MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "",
                     "SOLVER.BN_MOMENTUM", "0.2"],
         "SOLVER.BN_MOMENTUM: 0.2 does nothing with no part of the model that has BatchNorm"),
        (BASE, ["MODEL.ROI_BOX_HEAD.BN.STATISTICS", "per_domain"],
         "MODEL.ROI_BOX_HEAD.BN.STATISTICS: 'per_domain' does nothing with "
         "MODEL.META_ARCHITECTURE 'BNRetinaNet', which does not have this part"),
        (BASE, ["MODEL.ROI_BOX_HEAD.SHUFFLE", "True"],
         "MODEL.ROI_BOX_HEAD.SHUFFLE: True does nothing with MODEL.META_ARCHITECTURE 'BNRetina"),
        (BASE, ["MODEL.ROI_BOX_HEAD.NORM", "BN"],
         "MODEL.ROI_BOX_HEAD.NORM: 'BN' does nothing with MODEL.META_ARCHITECTURE 'BNRetinaNet'"),
        (BASE, ["MODEL.RPN.NORM", "BN"],
         "MODEL.RPN.NORM: 'BN' does nothing with MODEL.META_ARCHITECTURE 'BNRetinaNet'"),
        (RCNN_BASE, ["MODEL.RETINANET.NORM", "GN"],
         "MODEL.RETINANET.NORM: 'GN' does nothing with MODEL.META_ARCHITECTURE 'Gen"),
        (BASE, ["MODEL.BN_FCOS.NUM_CLASSES", "4"],
         "MODEL.BN_FCOS.NUM_CLASSES: 4 does nothing with MODEL.META_ARCHITECTURE 'BNRetinaNet'"),
        (RCNN_BASE, ["MODEL.RETINANET.BN.AFFINE", "per_domain"],
         "MODEL.RETINANET.BN.AFFINE: 'per_domain' does nothing with MODEL.META_ARCHITECTURE 'Gen"),
        (BASE, ["SOLVER.FREEZE_BN_AFFINE", "True"],
         "SOLVER.FREEZE_BN_AFFINE: True does nothing with SOLVER.FREEZE_BN_ITER 0 and FREEZE_BN_M"),
        (BASE, ["SOLVER.FREEZE_BN_PRECISE", "False", "SOLVER.FREEZE_BN_MODULES", "('backbone',)"],
         "SOLVER.FREEZE_BN_PRECISE: False does nothing with SOLVER.FREEZE_BN_ITER 0"),
        (BASE, ["TEST.BN_STATISTICS_PARTS", "['FPN']"],
         "TEST.BN_STATISTICS_PARTS: ['FPN'] does nothing with TEST.BN_STATISTICS 'population'"),
        (BASE, ["MODEL.NF.DROP_PATH_RATE", "0.1"],
         "MODEL.NF.DROP_PATH_RATE: 0.1 does nothing with MODEL.BACKBONE.NAME 'build_bn_"),
    ],
)  # fmt: skip
def test_warnings(host, base, opts, words, caplog):
    """Where a norm is not what a key is for, as a config may inherit it."""
    make_cfg(host, base, *opts)
    assert words in caplog.text
    caplog.clear()
    make_cfg(host, base)
    assert not caplog.text


@pytest.mark.skipif(not INSTALLED, reason="Detectron2 is not installed")
@pytest.mark.parametrize(
    "base, opts, key",
    [
        (BASE, ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.BN.AFFINE", "per_domain"],
         "MODEL.RETINANET.BN.AFFINE: 'per_domain'"),
        (BASE, ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NORM", "GhostBN",
                "MODEL.RETINANET.GHOST_SIZE", "2"], "MODEL.RETINANET.NORM: 'GhostBN'"),
        (BASE, ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
                "MODEL.RESNETS.NORM", "BRN"], "MODEL.RESNETS.NORM: 'BRN'"),
        (RCNN_BASE, ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead",
                     "MODEL.ROI_BOX_HEAD.SHUFFLE", "True"], "MODEL.ROI_BOX_HEAD.SHUFFLE: True"),
    ],
)  # fmt: skip
def test_errors(base, opts, key):
    """Where Detectron2's component is built, which does not know it."""
    with pytest.raises(InputError, match=f"{key} is not accepted with MODEL.*use one of"):
        make_cfg("detectron2", base, *opts)
