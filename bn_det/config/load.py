"""Config files and KEY VALUE pairs, merged into a config."""

from __future__ import annotations

import os
from collections.abc import Sequence

from yacs.config import CfgNode

from ..errors import InputError
from .check import check_values
from .keys import check_keys
from .yaml_file import load_yaml


def load_config(cfg: CfgNode, config_file: str, opts: Sequence[str], host: str) -> None:
    """Merge a config file, then KEY VALUE pairs, into a config, in place. YAML is loaded safely.

    Args:
        cfg: of fvcore or Detectron2, with our keys.

    Raises:
        InputError: a file is missing or not a config, or a key or value is not accepted; the
            config is as it was.
    """
    check_keys(cfg)
    merged = cfg.clone()
    if config_file:
        _merge_file(merged, config_file, host)
    _merge_opts(merged, opts, host)
    check_values(merged)
    cfg.clear()
    cfg.update(merged)


def _merge_file(cfg: CfgNode, config_file: str, host: str) -> None:
    if config_file.endswith(".py"):
        raise InputError(
            f"--config-file: {config_file} is not accepted: LazyConfig files are for "
            "tools/train_net.py on Detectron2; use the .yaml twin"
        )
    if not os.path.isfile(config_file):
        raise InputError(f"--config-file: there is no file {config_file}")
    try:
        content = load_yaml(config_file, type(cfg)._open_cfg)
    except InputError as e:
        raise InputError(f"--config-file: {e}") from e
    # merge_from_file asks the config for the content; Detectron2's also upgrades old versions.
    vars(cfg)["load_yaml_with_base"] = lambda *args, **kwargs: content
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except (TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"--config-file: {config_file} is not a config file: {reason}") from e
    except (KeyError, ValueError, AssertionError) as e:
        raise InputError(f"--config-file: {config_file}: {_reason(e, host)}") from e
    finally:
        del vars(cfg)["load_yaml_with_base"]


def _merge_opts(cfg: CfgNode, opts: Sequence[str], host: str) -> None:
    for key in opts[::2]:
        if "=" in key:
            raise InputError(f"{key}: KEY=VALUE is for LazyConfig files; here it is KEY VALUE")
    if len(opts) % 2:
        raise InputError(f"{opts[-1]}: has no value; the end of the command is KEY VALUE pairs")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, TypeError, AttributeError) as e:
            raise InputError(f"{key}: {value!r} is not accepted: {_reason(e, host)}") from e


def _reason(error: Exception, host: str) -> str:
    reason = " ".join(str(error.args[0] if error.args else error).split()).removesuffix(".")
    if len(reason) > 300:  # with all the keys of a node
        reason = f"{reason[:150]} ... {reason[-150:]}"
    if "Non-existent" in reason:
        reason += f" (the {host} host does not know it)"
        if "MODEL.FCOS" in reason:  # as ours was called
            reason += "; the FCOS of bn_det is MODEL.BN_FCOS"
    return reason
