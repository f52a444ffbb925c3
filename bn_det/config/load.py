"""Config files and KEY VALUE pairs, merged into a config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from yacs.config import CfgNode

from ..errors import InputError, shown
from .arithmetic import MAX_BITS
from .check import check_values
from .keys import check_keys, leaves
from .packaged import find_config, no_config
from .ranges import RANGES
from .rules import ANY
from .unread import check_read
from .yaml_file import load_yaml

_BROKEN = (AttributeError, MemoryError, RecursionError, TypeError)
"""What yacs raises for what is no config, and Python for a text of a value too deep to read."""

_REFUSED = (KeyError, ValueError, AssertionError)
"""What yacs raises for a key or a value."""


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
    check_read(merged, opts[::2])
    cfg.clear()
    cfg.update(merged)


def _merge_file(cfg: CfgNode, config_file: str, host: str) -> None:
    if config_file.endswith(".py"):
        raise InputError(
            f"--config-file: {shown(config_file)} is not accepted: LazyConfig files are for "
            "bn-det train on Detectron2; use the .yaml twin"
        )
    config_file = find_config(config_file)
    if not os.path.isfile(config_file):
        raise InputError(f"--config-file: {no_config(config_file)}")
    try:
        content = load_yaml(config_file, type(cfg)._open_cfg)
    except InputError as e:
        raise InputError(f"--config-file: {e}") from e
    before, name = cfg.clone(), shown(config_file)
    # merge_from_file asks the config for the content; Detectron2's also upgrades old versions.
    vars(cfg)["load_yaml_with_base"] = lambda *args, **kwargs: _with_floats(content, before)
    try:
        cfg.merge_from_file(config_file, allow_unsafe=False)
        _check_merged(before, cfg)
    except InputError as e:
        raise InputError(f"--config-file: {name}: {e}") from e
    except _BROKEN as e:
        raise InputError(
            f"--config-file: {name} is not a config file: {_reason(e, host, before)}"
        ) from e
    except _REFUSED as e:
        raise InputError(f"--config-file: {name}: {_reason(e, host, before, content)}") from e
    finally:
        del vars(cfg)["load_yaml_with_base"]


def _merge_opts(cfg: CfgNode, opts: Sequence[str], host: str) -> None:
    for key in opts[::2]:
        if "=" in key:
            raise InputError(
                f"{shown(key)}: KEY=VALUE is for LazyConfig files; here it is KEY VALUE"
            )
    if len(opts) % 2:
        raise InputError(
            f"{shown(opts[-1])}: has no value; the end of the command is KEY VALUE pairs"
        )
    before = cfg.clone()
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        parent = _value(cfg, above) if (above := key.rpartition(".")[0]) else cfg
        if parent is not None and not isinstance(parent, Mapping):
            raise InputError(
                f"{shown(key)}: {_short(value)} is not accepted: {above} has no keys below it"
            )
        try:
            cfg.merge_from_list([key, _with_floats(value, _value(cfg, key))])
        except (*_BROKEN, *_REFUSED) as e:
            reason = _reason(e, host, before)
            raise InputError(f"{shown(key)}: {_short(value)} is not accepted: {reason}") from e
        _check_merged(before, cfg)


def _value(cfg: Mapping[str, Any], key: str) -> Any:
    """What a config has under a key; None for nothing."""
    value: Any = cfg
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _with_floats(value: Any, default: Any) -> Any:
    """A value with a float for each integer that is to replace one, which yacs refuses."""
    if isinstance(value, dict) and isinstance(default, CfgNode):
        return {name: _with_floats(v, default.get(name)) for name, v in value.items()}
    if not isinstance(default, float):
        return value
    number = CfgNode._decode_cfg_value(value)
    is_short = type(number) is int and number.bit_length() <= MAX_BITS
    return float(number) if is_short else value


def _check_merged(before: CfgNode, cfg: CfgNode, prefix: str = "") -> None:
    """Raise InputError for values that yacs lets in and nothing else is made for.

    None in place of another value (where it means something, it is the default), and integers
    that are too long to be written.
    """
    for name, value in cfg.items():
        key, default = f"{prefix}{name}", before.get(name)
        if isinstance(value, CfgNode):
            _check_merged(default if isinstance(default, CfgNode) else CfgNode(), value, f"{key}.")
        elif value is None and default is not None:
            raise InputError(
                f"{shown(key)}: None is not accepted; use a value of type {type(default).__name__}"
            )
        elif any(number.bit_length() > MAX_BITS for number in _integers(value)):
            raise InputError(
                f"{shown(key)}: an integer of more than {MAX_BITS} bits is not accepted"
            )


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _integers(element)


_NUMBERS = {int: "an integer", float: "a number"}


def _accepted(key: str, default: Any) -> str:
    """What a key takes, whose default is of the type that a value has to be of."""
    words = RANGES.get(key, ANY).words
    if type(default) in _NUMBERS:
        return f"{_NUMBERS[type(default)]}{', ' if words else ''}{words}"
    if isinstance(default, (list, tuple)):
        return f"{words or 'a list'}{f', such as {list(default[:1])}' if default else ''}"
    if isinstance(default, CfgNode):
        return f"a node, with keys such as {next(iter(default), '')!r}"
    kinds = {bool: "True or False", str: "text"}
    return words or kinds.get(type(default), f"a value of type {type(default).__name__}")


def _short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


def _reason(
    error: Exception, host: str, cfg: CfgNode, content: Mapping[str, Any] | None = None
) -> str:
    """What yacs refused, and why, in words of ours where those of types say nothing to a user.

    Args:
        content: of the file; None where the message begins with key and value.
    """
    if isinstance(error, (MemoryError, RecursionError)):
        return "a value has too many parts in each other"
    reason = " ".join(str(error.args[0] if error.args else error).split()).removesuffix(".")
    if len(reason) > 300:  # with all the keys of a node
        reason = f"{reason[:150]} ... {reason[-150:]}"
    if reason.startswith("Type mismatch"):
        key = reason.rpartition(" ")[2]
        accepted = f"use {_accepted(key, _value(cfg, key))}"
        if content is None:
            return accepted
        return f"{shown(key)}: {_short(_value(content, key))} is not accepted: {accepted}"
    if "Non-existent" in reason:
        close = get_close_matches(reason.rpartition(" ")[2], dict(leaves(cfg)), n=3)
        reason += f" (the {host} host does not know it{f'; nearest: {close}' if close else ''})"
        if "MODEL.FCOS" in reason:  # as ours was called
            reason += "; the FCOS of bn_det is MODEL.BN_FCOS"
    return reason
