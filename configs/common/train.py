"""What tools/lazyconfig_train_net.py asks for beside model, data, optimizer and schedule.

The values are the defaults of our YAML files.
"""

train = dict(
    output_dir="output",
    init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    max_iter=90000,
    eval_period=0,  # at the end only
    checkpointer=dict(period=5000, max_to_keep=None),
    log_period=20,
    device="cuda",
    seed=-1,  # any
    amp=dict(enabled=False, dtype="float16"),  # the type for bn-det train alone
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
)
