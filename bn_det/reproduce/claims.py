"""The claims that the experiments test, as they were written down before the first run.

What decides a claim is here: its metric, its direction, and the smallest effect that counts. The
number that is found for it is computed by the experiment of its name (``EFFECTS`` there).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .steps import DATA

WU_JOHNSON = 'Wu & Johnson, *Rethinking "Batch" in BatchNorm*, arXiv 2105.07576'
BROCK = "Brock et al., *High-Performance Large-Scale Image Recognition Without Normalization*, 2021"


class Claim(NamedTuple):
    """A claim, in one sentence.

    Attributes:
        name: a short one, by which tables and code refer to it.
        experiment: the one that tests it.
        sentence: the claim.
        source: where it is made.
        metric: what is computed for each seed; the claim says that it is positive.
        smallest: the smallest effect that counts.
        unit: of the metric.
        at_most: the claim says instead that the metric is no larger than ``smallest``.
        data: on which the experiment tests it. AP on cells is the mean over the laboratories that
            were trained on.
        with_spikes: it is about how much a training bears, so that those with loss spikes count.
    """

    name: str
    experiment: str
    sentence: str
    source: str
    metric: str
    smallest: float
    unit: str
    at_most: bool = False
    data: tuple[str, ...] = ("shapes", "coco")
    with_spikes: bool = False


CLAIMS = (
    Claim(
        "precise early",
        "population",
        "Early in a training PreciseBN gives a better model than the EMA does.",
        f"{WU_JOHNSON}, Sec. 3",
        "box AP of the same weights, PreciseBN - EMA, mean over the checkpoints of the first third "
        "of the base training",
        1.0,
        "AP",
        data=DATA,
    ),
    Claim(
        "precise steady",
        "population",
        "Over a training at a large learning rate, AP with PreciseBN is steadier than with the "
        "EMA.",
        f"{WU_JOHNSON}, Sec. 3",
        "unsteadiness, the mean absolute second difference of box AP over the checkpoints at "
        "four times the learning rate: EMA - PreciseBN",
        0.5,
        "AP",
        data=DATA,
    ),
    Claim(
        "precise large rate",
        "population",
        "At a large learning rate PreciseBN gives a better model than the EMA does.",
        f"{WU_JOHNSON}, Sec. 3",
        "box AP of the same weights, PreciseBN - EMA, mean over all checkpoints at four times the "
        "learning rate",
        1.0,
        "AP",
        data=DATA,
    ),
    Claim(
        "EMA at the end",
        "population",
        "At the end of a usual training the EMA is as good as PreciseBN.",
        f"{WU_JOHNSON}, Sec. 3",
        "box AP of the final weights of the base training, |PreciseBN - EMA|",
        0.5,
        "AP",
        at_most=True,
        data=DATA,
    ),
    Claim(
        "EMA error, rate",
        "population",
        "The error of the EMA's statistics grows with the learning rate.",
        f"{WU_JOHNSON}, Sec. 3",
        "error of an EMA: the shift of means (in standard deviations) and of variances (relative) "
        "from PreciseBN's, mean of both over all layers and checkpoints; at four times the "
        "learning rate over that of the base training, - 1",
        0.25,
        "ratio",
        data=DATA,
    ),
    Claim(
        "EMA error, batch",
        "population",
        "The error of the EMA's statistics grows with the SGD batch, where the learning rate is "
        "scaled with it.",
        f"{WU_JOHNSON}, Sec. 3",
        "error as above, at four times the SGD batch and learning rate, over that of the base "
        "training at the checkpoints nearest in epochs, - 1",
        0.25,
        "ratio",
        data=DATA,
    ),
    Claim(
        "a thousand samples",
        "population",
        "10^3 to 10^4 samples are enough for PreciseBN.",
        f"{WU_JOHNSON}, Sec. 3",
        "box AP of the final weights of the base training, from 2048 samples - from 1024",
        0.5,
        "AP",
        at_most=True,
    ),
    Claim(
        "small batch, population",
        "batch-size",
        "A small normalization batch costs more with population statistics than with batch "
        "statistics.",
        f"{WU_JOHNSON}, Sec. 4",
        "validation loss with PreciseBN's statistics - with batch statistics of the training's "
        "size: that of NBS 2 - that of NBS 16, relative to the loss of NBS 16 with population "
        "statistics",
        0.02,
        "relative loss",
    ),
    Claim(
        "small batch, depth",
        "batch-size",
        "The statistics of small batches vary more, about those of the population, in deeper "
        "layers.",
        f"{WU_JOHNSON}, Sec. 4",
        "at NBS 2, the standard deviation of batch means (in standard deviations of the layer) "
        "and of batch variances (relative), mean of both: mean over the last third of the "
        "backbone's layers over that of the first third, - 1",
        0.25,
        "ratio",
        data=("shapes",),  # BN is frozen in the backbone of the configs for COCO
    ),
    Claim(
        "batch at test",
        "batch-size",
        "Where the normalization batch of the training was tiny, batch statistics of that size "
        "are better at test time than population statistics.",
        f"{WU_JOHNSON}, Sec. 4",
        "validation loss at NBS 2: with PreciseBN's statistics - with those of batches of 2, "
        "relative to the former",
        0.02,
        "relative loss",
    ),
    Claim(
        "large batch",
        "batch-size",
        "A large normalization batch loses regularization.",
        f"{WU_JOHNSON}, Sec. 4",
        "generalization gap, validation loss - training loss, both with PreciseBN's statistics: of "
        "NBS 16 - of NBS 4, relative to the validation loss of NBS 4",
        0.02,
        "relative loss",
        data=("shapes",),  # on COCO there is no NBS between that of a GPU and that of all
    ),
    Claim(
        "frozen at the end",
        "frozen",
        "FrozenBN in the last fifth of a training with small normalization batches closes the gap "
        "between training and test time.",
        f"{WU_JOHNSON}, Sec. 4",
        "validation loss with population statistics at NBS 2: of the usual training (PreciseBN) - "
        "of the one that was frozen, relative to the former",
        0.02,
        "relative loss",
    ),
    Claim(
        "AdaBN",
        "domain-shift",
        "Under a domain shift, population statistics of the new domain help.",
        f"{WU_JOHNSON}, Sec. 5",
        "box AP with AdaBN - without, mean over night, fog and sensor",
        1.0,
        "AP",
        data=("shapes",),
    ),
    Claim(
        "consistent, shared affine",
        "multi-domain",
        "In a multi-level head with a shared affine the consistent choices of training and "
        "population statistics beat the inconsistent ones, whichever they are.",
        f"{WU_JOHNSON}, Sec. 5, Table 5",
        "box AP, PreciseBN: the worse of both consistent choices - the better of both inconsistent "
        "ones",
        1.0,
        "AP",
    ),
    Claim(
        "consistent, affine per level",
        "multi-domain",
        "The same with an affine for each level.",
        f"{WU_JOHNSON}, Sec. 5, Table 5",
        "as above, of the trainings with an affine per level",
        1.0,
        "AP",
    ),
    Claim(
        "leak",
        "leakage",
        "A BN in a RoI head leaks: it uses the other RoIs of its batch.",
        f"{WU_JOHNSON}, Sec. 6, Table 3",
        "foreground accuracy of the box head on held-out RoIs, sampled as in training, at the end: "
        "with batch statistics - with population statistics",
        0.5,
        "% accuracy",
        data=DATA,
    ),
    Claim(
        "leak, mask AP",
        "leakage",
        "The leak costs AP: with population statistics the hint is missing.",
        f"{WU_JOHNSON}, Sec. 6, Table 3",
        "mask AP at the end with a BN head: with the statistics of a test image's RoIs - with "
        "population statistics",
        1.0,
        "AP",
    ),
    Claim(
        "shuffling",
        "leakage",
        "Shuffling RoIs across processes closes the gap.",
        f"{WU_JOHNSON}, Sec. 6, Table 6",
        "the difference of 'leak': BN's - that after training with shuffling",
        0.5,
        "% accuracy",
        data=DATA,
    ),
    Claim(
        "SyncBN",
        "leakage",
        "SyncBN closes the gap.",
        f"{WU_JOHNSON}, Sec. 6, Table 6",
        "the difference of 'leak': BN's - that after training with SyncBN",
        0.5,
        "% accuracy",
        data=DATA,
    ),
    Claim(
        "pairs leak",
        "correlated",
        "With two samples of each category in a batch, the model learns to use the batch.",
        f"{WU_JOHNSON}, Sec. 6.3, and the talk",
        "validation loss with population statistics - with those of batches as in training: "
        "trained on pairs - trained on any images, relative to the loss of the latter",
        0.02,
        "relative loss",
        data=("shapes",),
    ),
    Claim(
        "groups across categories",
        "correlated",
        "Normalization batches across categories, with one sample of each, close that gap.",
        f"{WU_JOHNSON}, Sec. 6.3, and the talk",
        "the gap of 'pairs leak' - the same of ghost batches of two, across categories of pairs "
        "against of any images",
        0.02,
        "relative loss",
        data=("shapes",),
    ),
    Claim(
        "AGC, large batch",
        "normalizer-free",
        "Without normalization, adaptive gradient clipping allows larger batches.",
        f"{BROCK}, Sec. 4",
        "training loss at the end (mean of the last tenth; of a training that diverges, its first) "
        "at four times batch and learning rate for the same epochs - at the usual ones: without "
        "clipping - with the default factor 0.01, relative to the loss without at the usual batch",
        0.05,
        "relative loss",
        with_spikes=True,
    ),
    Claim(
        "AGC, clip factor",
        "normalizer-free",
        "Larger batches need smaller clipping factors.",
        f"{BROCK}, Sec. 4.1",
        "log2 of the factor of 0.16, 0.04 and 0.01 with the lowest training loss at the usual "
        "batch - the same at four times the batch",
        1.0,
        "powers of two",
        with_spikes=True,
    ),
    Claim(
        "consistent, laboratories",
        "multi-domain",
        "A model that was trained by one set of statistics for all laboratories is better with one "
        "set at test time than with each laboratory's own.",
        f"{WU_JOHNSON}, Sec. 5",
        "box AP, PreciseBN: with statistics of all laboratories - with each laboratory's own",
        1.0,
        "AP",
        data=("cells",),
    ),
    Claim(
        "statistics for each laboratory",
        "multi-domain",
        "Statistics for each laboratory, in training and at test time, are better than one set.",
        "Chang et al., *Domain-Specific Batch Normalization for Unsupervised Domain Adaptation*, "
        "2019",
        "box AP, PreciseBN: one set for each - one set for all",
        1.0,
        "AP",
        data=("cells",),
    ),
    Claim(
        "levels of the head, laboratories",
        "multi-domain",
        "A head is as good with statistics of all levels as with those of each, where training and "
        "test are consistent.",
        f"{WU_JOHNSON}, Sec. 5, Table 5",
        "box AP, PreciseBN, |for each level - for all levels|",
        1.0,
        "AP",
        at_most=True,
        data=("cells",),
    ),
    Claim(
        "AdaBN, laboratories",
        "domain-shift",
        "In a laboratory that was not trained on, its own population statistics help.",
        f"{WU_JOHNSON}, Sec. 5",
        "box AP there with AdaBN - without, mean over four laboratories, by models of the three "
        "others",
        1.0,
        "AP",
        data=("cells",),
    ),
    Claim(
        "AdaBN, red and white cells",
        "domain-shift",
        "There they help red cells, which are many and alike, more than white ones.",
        "docs/blood_cells.md",
        "the same difference, of red cells' AP - of white cells' AP",
        2.0,
        "AP",
        data=("cells",),
    ),
    Claim(
        "leak, box AP",
        "leakage",
        "The leak costs AP: with population statistics the hint is missing.",
        f"{WU_JOHNSON}, Sec. 6, Table 3",
        "box AP at the end with a BN head: with the statistics of a test image's RoIs - with "
        "population statistics",
        1.0,
        "AP",
        data=("cells",),
    ),
    Claim(
        "loss spike, shared statistics",
        "loss-spike",
        "A rate at which the loss leaps after the warm-up costs more where a head's levels are "
        "normalized together.",
        "docs/claims.md, on loss spikes",
        "box AP, PreciseBN, at the usual rate and warm-up - at eight times the rate after a "
        "warm-up of 50 (0 where that diverged): with statistics of all levels - with those of each "
        "level; of seeds in which the former leapt, and no usual training did",
        1.0,
        "AP",
        data=("shapes",),
        with_spikes=True,
    ),
    Claim(
        "expected gain",
        "doctor",
        "The gain that the doctor expects of recomputed statistics is the one that comes.",
        "docs/doctor.md",
        "box AP, |that of PreciseBN - EMA - what bn-det doctor --evaluate says|, mean over the "
        "checkpoints of the first third of the base training and its last",
        0.5,
        "AP",
        at_most=True,
        data=("shapes", "cells"),
    ),
)


def claims_of(experiments: Sequence[str], data: str) -> list[Claim]:
    """Those that the experiments test on some data."""
    return [claim for claim in CLAIMS if claim.experiment in experiments and data in claim.data]
