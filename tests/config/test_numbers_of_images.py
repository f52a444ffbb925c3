"""Images of a batch, that processes share."""

import pytest

from bn_det.config.check import check_ims_per_batch
from bn_det.errors import InputError
from hosts import detectron2, every_host, make_cfg
from reference import BASE

IMS, PRECISE = "SOLVER.IMS_PER_BATCH", "TEST.PRECISE_BN.IMS_PER_BATCH"
REFERENCE = "SOLVER.REFERENCE_WORLD_SIZE"


@every_host
@pytest.mark.parametrize("key", [IMS, PRECISE, "SOLVER.VIRTUAL_IMAGES"])
def test_each_process_has_as_many(host, key):
    check_ims_per_batch(make_cfg(host, BASE, key, "4"), 2)
    with pytest.raises(InputError, match=f"{key}: 3 is not accepted with 2 processes"):
        check_ims_per_batch(make_cfg(host, BASE, key, "3"), 2)


@pytest.mark.parametrize("host", [detectron2])
def test_a_batch_for_other_processes(host):
    """Detectron2 scales the training's batch alone."""
    check_ims_per_batch(make_cfg(host, BASE, REFERENCE, "1", IMS, "1", PRECISE, "2"), 2)
    for key in (PRECISE, "SOLVER.VIRTUAL_IMAGES"):
        with pytest.raises(InputError, match=f"{key}: 1 is not accepted with 2 processes"):
            check_ims_per_batch(make_cfg(host, BASE, REFERENCE, "1", IMS, "1", key, "1"), 2)
    with pytest.raises(InputError, match=f"{IMS}: 6 is not accepted with {REFERENCE} 4; use a mul"):
        check_ims_per_batch(make_cfg(host, BASE, REFERENCE, "4", IMS, "6"), 2)
