"""Small LazyConfig trainings, and what Detectron2's tools/lazyconfig_train_net.py does with one."""

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer, default_writers, hooks
from detectron2.evaluation import inference_on_dataset

SIZE = 128
"""Of images, in pixels."""


def shrink(cfg):
    """A config for COCO made small: data, backbone and heads, in place."""
    data = cfg.dataloader
    for split in ("train", "val"):
        node = data.train if split == "train" else data.test
        node.dataset.names = f"tiny_{split}"
        node.mapper.augmentations[0].short_edge_length = [SIZE]
        node.mapper.augmentations[0].max_size = SIZE
        node.num_workers = 0
    data.train.total_batch_size = 2
    nodes = cfg.optimizer.hook_nodes
    nodes.virtual_batch.data_loader.total_batch_size = 2
    nodes.precise_bn.num_iter = 2
    model = cfg.model
    bottom_up = model.backbone.bottom_up
    model.backbone.out_channels = 32
    if "pretrained" in bottom_up:
        bottom_up.update(name="test_nfnet", pretrained="")
        channels = 192
    else:
        bottom_up.stages.depth = 18
        del bottom_up.stages["stride_in_1x1"]
        channels = 512
    if "head" in model:
        model.num_classes = 4
        if model.backbone.top_block.in_channels == 2048:
            model.backbone.top_block.in_channels = channels
    else:
        _shrink_roi_heads(model.roi_heads)
    cfg.train.update(device="cpu", init_checkpoint="", log_period=1)
    return cfg


def _shrink_roi_heads(roi_heads):
    roi_heads.update(num_classes=4, batch_size_per_image=16)
    is_cascade = "box_heads" in roi_heads
    for head in roi_heads.box_heads if is_cascade else [roi_heads.box_head]:
        head.conv_dims = [32 for _ in head.conv_dims]
        head.fc_dims = [32 for _ in head.fc_dims]
    for predictor in roi_heads.box_predictors if is_cascade else [roi_heads.box_predictor]:
        predictor.input_shape.channels = 32
    if "mask_head" in roi_heads:
        roi_heads.mask_head.conv_dims = [32] * 5


def run_as_the_tool_does(cfg, *, resume=False, batches=None, evaluate=True):
    """What stock ``do_train`` makes of a config, in its order: its hooks, and nothing of ours.

    Args:
        batches: in place of those of dataloader.train.
        evaluate: whether to run dataloader.test; its evaluator is run in any case.

    Returns:
        the trainer, and the state of the model at each evaluation.
    """
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = batches or instantiate(cfg.dataloader.train)
    trainer = SimpleTrainer(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    evaluated = []

    def test():
        evaluated.append({k: v.clone() for k, v in model.state_dict().items()})
        if not evaluate:
            model.eval()
            model.train()
            return None
        loader, evaluator = (instantiate(cfg.dataloader[k]) for k in ("test", "evaluator"))
        return inference_on_dataset(model, loader, evaluator)

    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)
    return trainer, evaluated
