"""Config files in YAML, with their bases, loaded safely.

What Detectron2's files have is accepted: ``_BASE_``, and ``!!python/object/apply:eval`` of
arithmetic (:mod:`.arithmetic`). Any other Python tag is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import InputError
from .arithmetic import evaluate

MAX_VALUES = 100_000
"""In a file, with what its aliases repeat."""

BASE = "_BASE_"
"""The key of a file, or a list of files, that a file changes."""

_YAML = "tag:yaml.org,2002:"
_EVAL = f"{_YAML}python/object/apply:eval"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, and arithmetic."""


_Loader.add_constructor(_EVAL, lambda loader, node: evaluate(_expression(node)))
_TAGS = {*_Loader.yaml_constructors, f"{_YAML}merge", f"{_YAML}value"} - {None}

_BROKEN = (yaml.YAMLError, AttributeError, LookupError, RecursionError, ValueError)
"""What PyYAML raises for a text that is no YAML, or a scalar that is not of its tag."""


def load_yaml(path: str, open_file: Callable[[str], IO[str]] = open) -> dict[str, Any]:
    """The content of a config file, over that of its bases.

    As ``CfgNode.load_yaml_with_base`` of fvcore has it: a base is relative to the file that names
    it, absolute, below ``~``, or a URL that ``open_file`` knows.

    Raises:
        InputError: a file cannot be read or is no config file, it has a tag that is not accepted,
            or bases go in a circle. The message begins with the path of the file.
    """
    return _load(path, open_file, ())


def _load(path: str, open_file: Callable[[str], IO[str]], above: tuple[str, ...]) -> dict[str, Any]:
    """As load_yaml; ``above`` are the files that have led here by their bases."""
    content = _read(path, open_file, above)
    bases = content.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(_is_path(base) for base in bases):
        raise InputError(
            f"{path}: {BASE}: {repr(bases)[:100]} is not accepted; use a path, or a list of them"
        )
    merged: dict[str, Any] = {}
    for base in bases:
        found = _base_path(base, path)
        way = (*above, path)
        if os.path.realpath(found) in map(os.path.realpath, way):
            raise InputError(f"{path}: {BASE} goes in a circle: {' -> '.join([*way, found])}")
        merged = _merged(_load(found, open_file, way), merged, path)
    return _merged(content, merged, path)


def _base_path(base: str, path: str) -> str:
    base = os.path.expanduser(base)
    is_url = base.startswith(("http://", "https://"))
    return base if is_url else os.path.join(os.path.dirname(path), base)


def _is_path(base: Any) -> bool:
    """Whether it can be one: the system's functions raise for anything else."""
    if not isinstance(base, str) or "\0" in base:
        return False
    try:
        os.fsencode(base)
    except UnicodeEncodeError:
        return False
    return True


def _merged(
    over: Mapping[str, Any], under: Mapping[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Nodes key by key, other values as they are in ``over``."""
    ret = dict(under)
    for name, value in over.items():
        if isinstance(value, dict) and name in under:
            key = f"{prefix}{name}"
            if not isinstance(under[name], dict):
                raise InputError(
                    f"{path}: {key}: a node is not accepted in place of {under[name]!r}, which "
                    f"{BASE} has; use a value"
                )
            value = _merged(value, under[name], path, f"{key}.")
        ret[name] = value
    return ret


def _read(path: str, open_file: Callable[[str], IO[str]], above: tuple[str, ...]) -> dict[str, Any]:
    """The content of one file."""
    text = ""
    try:
        with open_file(path) as f:
            text = f.read()
        loader = _Loader(text)
        loader.name = path
        node = loader.get_single_node()
        if not isinstance(node, MappingNode):
            raise InputError(f"{path} is not a config file: it has no keys")
        check = _Check(path, text)
        check.node(node)
        check.size(node)
        return loader.construct_document(node)
    except InputError:
        raise
    except OSError as e:
        of = f" ({BASE} of {above[-1]})" if above else ""
        raise InputError(f"{path} cannot be read: {e.strerror or e}{of}") from e
    except _BROKEN as e:
        reason = " ".join(str(e).split()) + _hint(e, text)
        raise InputError(f"{path} is not a config file: {reason}") from e


class _Check:
    """The nodes of a file, each with its key, before anything is made of them.

    Args:
        path, text: of the file.
    """

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.done: set[Node] = set()
        self.sizes: dict[Node, int] = {}

    def node(self, node: Node, key: str = "", above: tuple[Node, ...] = ()) -> None:
        """Raise InputError for what is not accepted in a node, and in those below it."""
        if node in above:
            raise self._error(key, "what contains itself is not accepted")
        if node in self.done:
            return
        self.done.add(node)
        self._tag(node, key)
        prefix, above = f"{key}." if key else "", (*above, node)
        if isinstance(node, MappingNode):
            if node.flow_style:
                self._cut_values(node, prefix)
            for name, value in node.value:
                self._tag(name, key)
                self.node(value, f"{prefix}{name.value}", above)
        elif isinstance(node, SequenceNode):
            if node.flow_style:
                self._cut_elements(node, key)
            for element in node.value:
                self.node(element, key, above)

    def size(self, node: Node) -> int:
        """How many values a node stands for, with what aliases repeat; InputError for too many."""
        if node not in self.sizes:
            parts = node.value if isinstance(node.value, list) else []
            below = [
                part for pair in parts for part in (pair if isinstance(pair, tuple) else [pair])
            ]
            self.sizes[node] = 1 + sum(self.size(part) for part in below)
            if self.sizes[node] > MAX_VALUES:
                raise self._error(
                    "", f"more than {MAX_VALUES} values, by aliases, are not accepted"
                )
        return self.sizes[node]

    def _tag(self, node: Node, key: str) -> None:
        tag = node.tag.replace(_YAML, "!!")
        if node.tag not in _TAGS:
            raise self._error(
                key,
                f"the tag {tag} is not accepted; use YAML's own, or !!python/object/apply:eval "
                "for arithmetic",
            )
        if node.tag == _EVAL:
            try:
                evaluate(_expression(node))
            except InputError as e:
                raise self._error(key, f"{tag}: {e}") from e

    def _cut_values(self, node: MappingNode, prefix: str) -> None:
        """Raise InputError where YAML has cut a value, and made keys of what comes after it."""
        runs: list[tuple[str, list[Node]]] = []
        for name, value in node.value:
            if runs and _is_absent(value):
                runs[-1][1].append(name)
            else:
                runs.append((name.value, [value]))
        for name, run in runs:
            if whole := self._whole(run):
                raise self._error(
                    f"{prefix}{name}",
                    f"{run[0].value!r} is what is left of {whole} in braces, which YAML cuts at "
                    f'each comma; write {_in_brackets(whole)} or "{whole}", or put the key on a '
                    "line of its own, without braces",
                )

    def _cut_elements(self, node: SequenceNode, key: str) -> None:
        """The same of the elements of a list."""
        for k, element in enumerate(node.value):
            if _parentheses(element) > 0 and (whole := self._whole(node.value[k:])):
                raise self._error(
                    key,
                    f"{element.value!r} is what is left of {whole} in a list, which YAML cuts at "
                    f"each comma; write {_in_brackets(whole)}",
                )

    def _whole(self, run: Sequence[Node]) -> str:
        """The text in parentheses that begins with a node, if nodes that follow it end it."""
        first, depth = run[0], 0
        for node in run:
            depth += _parentheses(node)
            if depth <= 0:
                break
        else:
            return ""
        text = self.text[first.start_mark.index : node.end_mark.index]
        return " ".join(text.split()) if node is not first and text.startswith("(") else ""

    def _error(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.path}: {f'{key}: ' if key else ''}{reason}")


def _hint(error: Exception, text: str) -> str:
    """What may have broken a text: a tuple of quoted strings, which YAML cannot even cut."""
    mark = getattr(error, "problem_mark", None)
    if mark is None or not isinstance(error, yaml.parser.ParserError):
        return ""
    line = text[text.rfind("\n", 0, mark.index) + 1 : mark.index]
    is_open = line.rfind("(") > line.rfind(")")
    return "; in braces or a list write [...] in place of a tuple (...)" if is_open else ""


def _expression(node: Node) -> str:
    """The argument of !!python/object/apply:eval."""
    arguments = node.value if isinstance(node, SequenceNode) else []
    if len(arguments) != 1 or arguments[0].tag != f"{_YAML}str":
        raise InputError('it takes a list of one expression in quotes: ["2 * 3"]')
    return arguments[0].value


def _is_absent(node: Node) -> bool:
    """Whether a value is not written: that of "b" in {a: 1, b}."""
    return isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index


def _parentheses(node: Node) -> int:
    """How many parentheses a node opens without quotes, less those that it closes."""
    is_plain = isinstance(node, ScalarNode) and node.style is None
    return node.value.count("(") - node.value.count(")") if is_plain else 0


def _in_brackets(whole: str) -> str:
    return whole.replace("(", "[").replace(")", "]")
