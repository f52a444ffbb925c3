"""The doctor's rules: what each finds and why that matters. Their ids stay.

BN1xx are known from a file alone, BN2xx from passes over images or from steps of a training, BN3xx
from losses, BN4xx from the modules of a model that is about to be trained, BN5xx from how it is
trained: its optimizer, the batches of a step, and some steps.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """Attributes:
    name: in few words.
    says: the beginning of a verdict.
    unit: of a finding's value.
    finds: what is looked at, and what is found.
    why: why it matters, with a source.
    limits: what cannot be told apart, and when a finding is wrong.
    threads: of users who met it, as repository and number.
    """

    name: str
    says: str
    unit: str
    finds: str
    why: str
    limits: str
    threads: str

    @property
    def parts(self) -> dict[str, str]:
        """What is told of it, by headings."""
        parts = {
            "What it finds": self.finds,
            "Why it matters": self.why,
            "What it cannot tell": self.limits,
            "Who met it": self.threads,
        }
        return {head: text for head, text in parts.items() if text}

    def explain(self, rule: str) -> str:
        """A page about it."""
        body = "\n\n".join(f"{head}\n  {text}" for head, text in self.parts.items())
        return f"{rule}: {self.name}\n\n{body}"


_IOFFE = "Ioffe & Szegedy, Batch Normalization, 2015, Sec. 3.1"

RULES = {
    "BN101": Rule(
        "statistics that never saw data",
        "the weights are trained and the statistics are not",
        "layers",
        "Mean 0 and variance 1 in every channel and no batch counted, where weight and bias are "
        "not those of a new layer.",
        "Test time normalizes by the population statistics "
        f"({_IOFFE}); those of a new layer fit no trained weights.",
        "Whether buffers were left out of an average of weights, or of the file, or the layers "
        "were in evaluation mode: all three leave the same.",
        "PyTorch-Classification/U2PL 64, pytorch/ignite 2590, facebookresearch/moco 70, "
        "lucidrains/byol-pytorch 73, open-mmlab/mmdetection 5774",
    ),
    "BN102": Rule(
        "frozen from scratch",
        "frozen layers hold the values of new ones and normalize nothing",
        "layers",
        "Mean 0, variance 1, weight 1, bias 0, and no counter of batches, which FrozenBatchNorm2d "
        "does not have.",
        "Such a layer is the identity: a detector that is trained from scratch with FrozenBN has "
        "no normalization at all.",
        "A file of a new model that nobody has trained looks the same.",
        "pytorch/vision 5443, 2164, 3394, facebookresearch/detectron2 914",
    ),
    "BN103": Rule(
        "statistics folded into the affine",
        "statistics are folded into weight and bias",
        "layers",
        "Mean 0, variance 1 and no counter, where weight and bias are trained.",
        "As in the ResNets that Caffe published. It is right as long as the layers are frozen; a "
        "BatchNorm that trains in their place begins with wrong statistics, and its weight means "
        "something else (maskrcnn-benchmark 561).",
        "FrozenBN whose affine has been trained from scratch looks the same.",
        "facebookresearch/maskrcnn-benchmark 561, 267, 675, facebookresearch/detectron2 1159",
    ),
    "BN104": Rule(
        "statistics that never moved",
        "batches were counted and the statistics have not moved",
        "layers",
        "Mean 0 and variance 1 in every channel, and a counter above 0.",
        f"Test time normalizes by them ({_IOFFE}). A momentum of 0 counts batches and moves "
        "nothing; so does code that sets the buffers back.",
        "Which of the two it was.",
        "Cadene/pretrained-models 5, pytorch/pytorch 20967, 37823",
    ),
    "BN105": Rule(
        "layers that nothing has trained",
        "layers are as new ones",
        "layers",
        "Mean 0, variance 1, weight 1, bias 0 and a counter of 0.",
        "Where other layers are trained, these were not called in training, were in evaluation "
        "mode, or are new in this file.",
        "A layer that is never used is harmless.",
        "open-mmlab/mmcv 2199, open-mmlab/mmaction2 1781",
    ),
    "BN106": Rule(
        "values of the start left in the EMA",
        "the statistics have seen too few batches",
        "of the start's values",
        "(1 - m)^n for n batches counted, with torch's default m of 0.1, from 0.01 up.",
        "An EMA begins at mean 0 and variance 1 and forgets that by the momentum m of each batch.",
        "The momentum is in no file (a model has it): with m 0.01 as much is left after ten times "
        "as many batches. Statistics that were recomputed may have no counter of theirs.",
        "tensorflow/models 4367, uber/ludwig 328",
    ),
    "BN107": Rule(
        "values that are not finite",
        "statistics, weight or bias are NaN or infinite",
        "channels",
        "NaN or infinity in a mean, a variance, a weight or a bias.",
        "Every output of such a channel is NaN in evaluation, while training, which normalizes by "
        "the batch, may look fine.",
        "What made them so.",
        "ultralytics/ultralytics 24615, 24871, open-edge-platform/anomalib 2965, "
        "pytorch/pytorch 10008",
    ),
    "BN108": Rule(
        "negative variances",
        "variances are negative",
        "channels",
        "A variance below 0.",
        "Its root is NaN, or of what eps leaves of it: nothing that a batch can have.",
        "What made them so; averages of checkpoints with negative weights can.",
        "timgaripov/swa 12",
    ),
    "BN109": Rule(
        "statistics clamped in half precision",
        "statistics are at the largest number of float16",
        "channels",
        "A mean or variance of 65504, the largest number of float16, or more in a file of float16.",
        "The real value was larger: the channel is scaled wrongly in evaluation.",
        "",
        "ultralytics/ultralytics 24615, pytorch/pytorch 10008",
    ),
    "BN110": Rule(
        "variances that eps decides",
        "variances are near eps",
        "channels",
        "Channels that another usual eps, 1e-3 in place of 1e-5, would scale otherwise by more "
        "than a tenth of what is usual in the layer; in a model with a larger eps than "
        "these, by that one: it is a warning.",
        "eps is in no state dict: who rebuilds the model in another framework gets its default.",
        "The eps that the model was trained with: of images with labels that is the usual one "
        "which is better, and then it is an error.",
        "pytorch/vision 2599, 2169, pytorch/pytorch 43614",
    ),
    "BN111": Rule(
        "dead channels",
        "channels are constant",
        "channels",
        "A weight of exactly 0, or a variance of exactly 0.",
        "They give a constant, whatever the image.",
        "Zero weights are how the last BatchNorm of a residual block begins: in a file of a new "
        "model all of those are.",
        "",
    ),
    "BN112": Rule(
        "counters that disagree",
        "layers have counted other numbers of batches",
        "times the usual count",
        "A counter that is a multiple of that of most layers, or one more.",
        "Twice: activation checkpointing has updated the EMA in each recomputation, too. As often "
        "as there are levels: a layer that levels share, each of which has moved its EMA. One "
        "more: a forward pass in training mode that no step belongs to.",
        "Layers that were loaded from another training have counted that one, too. On images it is "
        "a note where a pass calls a layer as often.",
        "pytorch/pytorch 96136, 62471, jakc4103/DFQ 19, ultralytics/ultralytics 17469",
    ),
    "BN113": Rule(
        "keys that are missing",
        "statistics are incomplete",
        "keys",
        "A mean without a variance or the reverse, a counter without statistics, or numbers of "
        "channels that differ.",
        "A loader that is not strict leaves the model's own value there, that of a new layer.",
        "",
        "Cadene/pretrained-models 5, pytorch/pytorch 37823",
    ),
    "BN114": Rule(
        "a fused file",
        "the file is a fused one",
        "convolutions with a bias",
        "At most one BatchNorm to ten convolutions, of which nine in ten have a bias; or some with "
        "a bias where those of the same name in other blocks have BatchNorm, in half of such "
        "places.",
        "If the model has BatchNorm, this is its fused file: loaded without being strict, the "
        "model keeps new BatchNorms and gives wrong boxes.",
        "A network that never had any, or few, looks the same.",
        "open-mmlab/mmdetection 2924, ultralytics/yolov5 4034",
    ),
    "BN115": Rule(
        "statistics in half precision",
        "statistics are in half precision",
        "channels of small variance",
        "Statistics of float16 or bfloat16, and channels whose variance is too small for it.",
        "A variance below 6e-5 loses digits in float16, and below 6e-8 is 0; an average of "
        "checkpoints that is made in half is rounded at each step, and infinite beyond 65504.",
        "Whether it was averaged so.",
        "ultralytics/ultralytics 24615, open-edge-platform/anomalib 2965",
    ),
    "BN201": Rule(
        "stale statistics",
        "statistics do not fit the weights",
        "standard deviations",
        "Population statistics against those of batches of the model as it is (PreciseBN), where "
        "the difference is more than an EMA's own noise and that of the estimate explain, at one "
        "false alarm in a hundred examinations.",
        "Test time normalizes by them. They lag behind weights that moved fast, were averaged "
        "apart from them, are of another domain, or of one process alone (Wu & Johnson, "
        "Rethinking Batch in BatchNorm, Sec. 3).",
        "The noise of an EMA is taken from the batches of the examination, and is larger by as "
        "much as the training's are said to be smaller (--num-gpus, step). With much smaller ones "
        "than those of training less is found; with much larger ones, of which nothing is said, "
        "healthy statistics may be. Values of a map are not independent; batches are "
        "taken to be. Channels that are constant in all batches are not looked at. That a "
        "difference costs AP is certain only once it was tried.",
        "facebookresearch/maskrcnn-benchmark 686, open-mmlab/mmdetection 726, tensorflow/models "
        "4367, open-mmlab/mmengine 1536, pytorch/pytorch 48929",
    ),
    "BN202": Rule(
        "levels or sources that share statistics",
        "levels or sources that differ share one set of statistics",
        "of the variance between them",
        "The share of a layer's variance that lies between sets of values and not in them: between "
        "the levels that it is called for in a pass, such as those of a head that levels share, or "
        "RoIs of several levels; and between sources of images (DATASETS.SOURCES, "
        "bn_det.image_sources).",
        "Where each set is normalized by its own batch in training, and at test time all by one "
        "EMA, that fits none (Wu & Johnson, Sec. 5.2). Levels that are no further apart than that "
        "EMA is off by chance are a note. So are sources that batches mix, which are normalized "
        "alike in both: each might do better with its own.",
        "A layer that normalizes all levels together has one batch a pass, and is not meant. "
        "Sources are known where they are named.",
        "open-mmlab/mmdetection 6991, 1468, 6515, rwightman/efficientdet-pytorch 53",
    ),
    "BN203": Rule(
        "noise of a normalization batch",
        "a normalization batch has few independent values",
        "independent values",
        "1 + 1 / noise^2, where noise is the standard deviation of the mean of a normalization "
        "batch from batch to batch, in standard deviations of the values in one: the number of "
        "independent values whose mean would vary as much. Those of a map are not independent, so "
        "that it is less than there are values. Fewer than 16 are a note, where chance does not "
        "explain it.",
        "Training sees its values through that noise, and test time does not. Images that are "
        "independent count as one value each at least, so fewer than 16 values are of fewer than "
        "16 images; down to these BatchNorm is as good as with more, and worse below (Wu & He, "
        "Group Normalization, 2018, Table 2).",
        "What it costs: the 16 are images of a classifier on ImageNet, and no bound on values is "
        "known. Batches that differ on purpose (of one class, of one source) are noisy, too.",
        "rwightman/efficientdet-pytorch 675, dbolya/yolact 325, open-mmlab/mmdetection 3621",
    ),
    "BN204": Rule(
        "ranks that differ",
        "each rank has statistics of its own",
        "standard deviations",
        "Running statistics of the ranks of a training against each other, where they differ by "
        "more than EMAs of batches that vary as these do, at one false alarm in a hundred "
        "trainings. Only the monitor of a training sees more than one rank.",
        "Each rank evaluates another model, and rank 0's statistics are in the file. Ranks that "
        "draw from the same data differ little; what is seen here has data, weights or modes of "
        "its own.",
        "Which rank is right. Right after ranks were averaged they are equal.",
        "open-mmlab/mmengine 1536, open-mmlab/mmdetection 11131, 3573, pytorch/pytorch 13711, "
        "ultralytics/ultralytics 24410",
    ),
    "BN205": Rule(
        "domain shift",
        "the target's images are of another domain",
        "standard deviations",
        "Statistics of each layer on images of the target (--target, target=) against those on "
        "training images, frozen layers among them, where the difference is more than the standard "
        "errors of both explain, at one false alarm in a hundred examinations.",
        "Statistics of one domain normalize the images of another wrongly; which layers differ "
        "says whether it is brightness and contrast, in the first ones, or what is in the images. "
        "Statistics of the target (AdaBN: Li et al., 2016) or of each source may help.",
        "Whether it costs AP, and whether AdaBN helps: what differs may be what tells the classes "
        "apart, and on another laboratory's photographs red blood cells gained AP and white ones "
        "lost it. In RoI heads also boxes differ. Batches are taken to be independent.",
        "pytorch/pytorch 48929, qinenergy/cotta 17",
    ),
    "BN206": Rule(
        "estimation shift over depth",
        "in evaluation layers see other statistics than their own",
        "standard deviations",
        "The statistics of what each layer sees where all layers normalize by their population "
        "statistics, against its own, where the difference is more than the noise of EMAs in all "
        "layers explains (four draws of it, on the same batches).",
        "A layer's statistics may be right for what training shows it, and be wrong for what "
        "layers before it hand on in evaluation: their errors accumulate over depth (Huang et al., "
        "Delving into the Estimation Shift of Batch Normalization in a Network, CVPR 2022). Small "
        "normalization batches do that with precise statistics, too.",
        "A layer whose own statistics are off from one that those before it shift: beside an alarm "
        "on statistics themselves (such as BN201) it is a note. The first layer that is off is "
        "where it begins. RoIs are those that training samples.",
        "facebookresearch/maskrcnn-benchmark 686, tensorflow/models 4367",
    ),
    "BN207": Rule(
        "proposals of test time against sampled RoIs",
        "a head sees other samples at test time than in training",
        "standard deviations",
        "Of layers that see another number of samples in evaluation mode than in training mode: "
        "statistics of the ones against those of the others, on the same images, from batch to "
        "batch, by the same population statistics.",
        "A head that is trained on RoIs of which a quarter is sampled to be objects sees hundreds "
        "of proposals of the background at test time, and its population statistics are of the "
        "former.",
        "Whether it costs AP: proposals differ from sampled RoIs in every detector, so that less "
        "than a standard deviation is a note. Images are those of training.",
        "facebookresearch/maskrcnn-benchmark 1006, open-mmlab/mmdetection 3674",
    ),
    "BN301": Rule(
        "statistics that cost loss",
        "the population statistics cost loss",
        "of loss",
        "The loss by the population statistics less the loss by those of the passes with the noise "
        "that an EMA has (four draws), on the same batches, which are apart from those of the "
        "passes; the rest of the model is as in evaluation, and what is sampled is the same.",
        "It tells weights from statistics: a model whose weights are the fault loses the same by "
        "any statistics (Wu & Johnson, Rethinking Batch in BatchNorm, Sec. 3).",
        "A lower loss is not always a higher AP; that is measured where there are test images. "
        "Batches are taken to be independent.",
        "facebookresearch/maskrcnn-benchmark 686, tensorflow/models 4367, "
        "PyTorch-Classification/U2PL 64",
    ),
    "BN302": Rule(
        "the part that is to blame",
        "the population statistics of a part cost loss",
        "of loss",
        "What each part's population statistics add to the loss: its own are exchanged for those "
        "of the passes, where all others are as they were, and where all others are exchanged, "
        "too; the mean of both.",
        "It says where to look: a backbone from another domain, or a head that levels share.",
        "Parts that act together: what they add need not sum up to the whole. At one false alarm "
        "in a hundred examinations over all parts; those that add less than a tenth are not named.",
        "facebookresearch/maskrcnn-benchmark 1006, open-mmlab/mmdetection 3674, 6991",
    ),
    "BN303": Rule(
        "batches that do better than precise statistics",
        "the model does better by the statistics of its batch than by precise ones",
        "of loss",
        "The loss by the statistics of the passes less the loss by those of each batch.",
        "Weights that were trained with batch statistics may use them: as a hint of what else is "
        "in the batch (leakage, Wu & Johnson, Sec. 6), or because small batches differ from the "
        "population. No statistics in a file mend that.",
        "Which of the two it is; a gap that is small is usual. Where levels share statistics "
        "(BN202) it is not looked for, as each level's own may be what the batch gives.",
        "rwightman/efficientdet-pytorch 675, dbolya/yolact 325, open-mmlab/mmdetection 3621",
    ),
    "BN304": Rule(
        "frozen statistics that do not fit the images",
        "frozen statistics do not fit these images",
        "of loss",
        "The loss with frozen layers less the loss with the same layers normalizing by their "
        "batch.",
        "A frozen layer keeps the statistics of the images of its pre-training. Where others "
        "train after it, they learn around that; where the images are of another kind, it costs.",
        "Whether there are enough images to train with batch statistics instead.",
        "open-mmlab/mmdetection 3621, facebookresearch/detectron2 2022",
    ),
    "BN401": Rule(
        "a frozen affine, and statistics that move",
        "layers are frozen by half",
        "layers",
        "Weight and bias that need no gradient in a layer whose statistics training moves; or, of "
        "a layer that has none, the weights of the part that it is in.",
        "A part that was frozen by requires_grad alone drifts: its outputs change with every "
        "batch, and its statistics become those of the new data.",
        "That somebody wants just this, as when statistics are adapted.",
        "ultralytics/ultralytics 9391, open-mmlab/mmcv 964, pytorch/pytorch 66073, 9046",
    ),
    "BN402": Rule(
        "evaluation mode that train() undoes",
        "layers are frozen until the next train()",
        "layers",
        "Layers in evaluation mode, alone or with the part that they are in, inside of a module in "
        "training mode, which are not frozen: the weights around them train, and their statistics "
        "stay.",
        "One eval() of a part is undone by the train() of the whole, at the start of an epoch or "
        "after an evaluation; or an evaluation has left the mode so.",
        "A train() of the model's own that keeps them so (norm_eval) is tried on a copy, and they "
        "are taken for frozen; where it cannot be tried, they are named.",
        "open-mmlab/mmcv 964, 2199, open-mmlab/mmaction2 1781",
    ),
    "BN403": Rule(
        "the momentum of another framework",
        "momentum is not torch's",
        "layers",
        "A momentum of 0.5 and more, of 0, or below, in layers that training updates.",
        "PyTorch's momentum is the weight of a new batch, 1 - that of Keras and TensorFlow: with "
        "0.9 the statistics are nearly those of the last batch, with 0 they never move.",
        "That somebody wants just this.",
        "huggingface/transformers 19454, google/automl 126",
    ),
    "BN404": Rule(
        "mixed eps",
        "layers do not have the same eps",
        "layers",
        "Layers whose eps is another than that of most.",
        "Parts of two frameworks, or a layer that was converted without its arguments.",
        "Many models are made so on purpose: it is an error where one usual eps in all layers "
        "helps on images with labels, and more than recomputed statistics do.",
        "pytorch/vision 2599, 2169",
    ),
    "BN405": Rule(
        "mixed momentum",
        "layers do not have the same momentum",
        "layers",
        "Layers whose momentum is another than that of most.",
        "Parts of two frameworks, or a layer that was converted without its arguments.",
        "Many models are made so on purpose.",
        "",
    ),
    "BN501": Rule(
        "weight decay on norms",
        "weight decay pulls weight and bias of BatchNorm towards 0",
        "of weight decay",
        "Weight or bias of a BatchNorm in a parameter group whose weight decay is above 0.",
        "Recipes leave them out (Goyal et al., Accurate, Large Minibatch SGD, 2017, Sec. 5.1; "
        "Detectron2 by SOLVER.WEIGHT_DECAY_NORM 0.0): their size is what the layer gives, while "
        "that of the convolution before it does not matter. torch's optimizers decay all that "
        "they are given.",
        "Whether it hurts: Summers & Dinneen, Four Things Everyone Should Know to Improve Batch "
        "Normalization, 2020, are about when it helps. It is a note for that reason.",
        "pytorch/pytorch 1402, ultralytics/yolov3 469, ultralytics/yolov5 4104",
    ),
    "BN502": Rule(
        "a normalization batch of one or two samples",
        "normalization batches are of one or two samples",
        "samples",
        "Layers that normalize by 2 samples or fewer (images; RoIs in a RoI head) at a time, by "
        "the batches seen, in the number of processes that the training has. Not ghost batches, "
        "which are as small as somebody wants, batch renormalization, and what normalizes by its "
        "population.",
        "The batch that normalizes is that of one forward pass of one process (of all, with "
        "SyncBN), however large the step of the optimizer is: neither more processes nor "
        "accumulated gradients enlarge it. With 2 images BatchNorm had an error of 34.7 % on "
        "ImageNet, with 32 of 23.6 % (Wu & He, Group Normalization, 2018, Table 2; Wu & Johnson, "
        "Rethinking Batch in BatchNorm, Sec. 3).",
        "What it costs here: a large map of an image has many values. With larger batches in the "
        "examination than in training (and no word of that) it is not found.",
        "open-mmlab/mmcv 1869, 2074, ultralytics/yolov5 1630, rwightman/efficientdet-pytorch 675, "
        "dbolya/yolact 325, open-mmlab/mmdetection 3621",
    ),
    "BN503": Rule(
        "an EMA that moves several times a step",
        "the EMA moves more often than the optimizer steps",
        "updates",
        "Counters of batches that rise by more than one a step, and by what: recomputation in the "
        "backward pass, a pass in training mode without gradients, several passes with gradients; "
        "and those that rise between steps. Layers that one pass calls several times are BN202's. "
        "Only the monitor of a training sees steps; in a file, BN112 compares counters.",
        "A batch that counts twice gives an EMA of more noise, and other data (of validation, of "
        "a probe) are in statistics that test time normalizes by. Several batches whose gradients "
        "are accumulated do no harm to the EMA, and that is a note.",
        "Layers that keep no counter, and models that are compiled. Passes that recompute "
        "statistics in training mode on purpose, by other code than ours, look like an evaluation "
        "that moves them.",
        "pytorch/pytorch 96136, 62471, facebookresearch/fairscale 1035, jakc4103/DFQ 19, "
        "ultralytics/ultralytics 17469, princeton-vl/pytorch_stacked_hourglass 44, "
        "weecology/DeepForest 477",
    ),
    "BN504": Rule(
        "an affine that the optimizer does not step once",
        "the optimizer does not have the weight and bias of BatchNorm once",
        "layers",
        "Weight or bias of a BatchNorm that needs a gradient and is in no parameter group, or "
        "stands in one several times.",
        "What is in no group never learns; what stands there twice is stepped twice, with another "
        "learning rate than the rest. Layers that were thawed or exchanged after the optimizer "
        "was made have parameters that it does not know.",
        "Another optimizer may have it. A teacher that is an average of weights is to be in none: "
        "then its statistics are to be averaged, too, and not to move by themselves.",
        "pytorch/pytorch 40967, qinenergy/corda 13, Eric-mingjie/network-slimming 18",
    ),
    "BN505": Rule(
        "a mode that is left wrong",
        "layers are in a mode that was left wrong",
        "layers",
        "Layers that are not frozen, in evaluation mode, and stand still in the steps of a "
        "training: where they had moved before, or where the whole model is in evaluation mode. "
        "And those that had stood still so, and move again. Only the monitor of a training sees "
        "this; BN402 finds in a model what the next train() will undo.",
        "An evaluation that does not call train() at its end leaves statistics as they are while "
        "weights move on; a train() at the start of an epoch thaws what one eval() had frozen.",
        "That somebody changes modes on purpose, in the midst of a training.",
        "open-mmlab/mmcv 964, 2199, open-mmlab/mmaction2 1781, ultralytics/ultralytics 9391, "
        "jfzhang95/pytorch-deeplab-xception 140",
    ),
}
