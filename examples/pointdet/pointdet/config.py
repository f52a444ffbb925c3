from detectron2.config import CfgNode


def add_pointdet_config(cfg: CfgNode) -> None:
    """Add PointDet's keys to Detectron2's defaults."""
    # A folder with annotations/instances_{train,val}.json and the images in train/ and val/.
    cfg.DATASETS.ROOT = "datasets/coco"

    cfg.MODEL.POINTDET = node = CfgNode()
    node.NUM_CLASSES = 80
    node.IN_FEATURES = ["p3", "p4", "p5"]
    # A level is responsible for objects whose farther side is at most so many pixels away.
    node.MAX_DISTANCES = [64.0, 128.0, float("inf")]
    node.CENTER_RADIUS = 1.5  # in strides
    node.NUM_CONVS = 4
    node.PRE_NMS_TOPK = 300
    node.PROPOSAL_NMS_THRESH = 0.7
    node.NMS_THRESH = 0.5
    node.SCORE_THRESH = 0.02
    node.ROIS_PER_IMAGE = 32
    node.CANONICAL_BOX_SIZE = 112
