"""Config files and KEY VALUE pairs, merged into a config."""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml
from yacs.config import CfgNode

from ..errors import InputError
from .check import check_values


def load_config(cfg: CfgNode, config_file: str, opts: Sequence[str], host: str) -> None:
    """Merge a config file, then KEY VALUE pairs, into a config, in place. YAML is loaded safely.

    Raises:
        InputError: a file is missing or not a config, or a key or value is not accepted.
    """
    if config_file.endswith(".py"):
        raise InputError(
            f"--config-file: {config_file} is not accepted: LazyConfig files are for "
            "tools/train_net.py on Detectron2; use the .yaml twin"
        )
    if config_file and not os.path.isfile(config_file):
        raise InputError(f"--config-file: there is no file {config_file}")
    try:
        if config_file:
            # Detectron2 allows python tags unless told otherwise; other hosts do not know of them.
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as e:
        raise InputError(f"--config-file: {config_file}: there is no file {e.filename}") from e
    except (yaml.YAMLError, TypeError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise InputError(f"--config-file: {config_file} is not a config file: {reason}") from e
    except (KeyError, ValueError, AssertionError) as e:
        raise InputError(f"--config-file: {config_file}: {_reason(e, host)}") from e
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
    check_values(cfg)


def _reason(error: Exception, host: str) -> str:
    reason = str(error.args[0] if error.args else error).removesuffix(".")
    if "Non-existent" in reason:
        reason += f" (the {host} host does not know it)"
    return reason
