"""The text of a config file in YAML, checked before anything is made of it.

What is accepted is what YAML itself has, and ``!!python/object/apply:eval`` of arithmetic
(:mod:`.arithmetic`), which Detectron2's files have. Any other Python tag is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import InputError, shown
from .arithmetic import MAX_BITS, MAX_LENGTH, Value, evaluate

MAX_VALUES = 100_000
"""In a file, with what its aliases repeat."""

MAX_DEPTH = 50
"""Of nodes and lists in each other, with what aliases repeat."""

MAX_KEY, MAX_PIECE = 200, 60
"""Characters of a key in a message, and of one of its parts."""

_YAML = "tag:yaml.org,2002:"
_EVAL = f"{_YAML}python/object/apply:eval"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, and arithmetic."""


_Loader.add_constructor(_EVAL, lambda loader, node: evaluate(_expression(node)))

_KINDS: Mapping[type[Node], str] = {
    MappingNode: "keys with values",
    SequenceNode: "a list",
    ScalarNode: "a single value",
}
_TAGS: Mapping[type[Node], set[str]] = {
    kind: {_EVAL, *(f"{_YAML}{name}" for name in names.split())}
    for kind, names in (
        (MappingNode, "map set"),
        (SequenceNode, "seq omap pairs"),
        (ScalarNode, "null bool int float binary timestamp str merge value"),
    )
}
"""What is accepted; for _EVAL see _expression."""

_NUMBERS = (f"{_YAML}int", f"{_YAML}float")

BROKEN = (
    *(yaml.YAMLError, ArithmeticError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
"""What PyYAML raises for a text that is no YAML, or a scalar that is not of its tag."""


def parse(path: str, text: str) -> dict[str, Any]:
    """The content of a file.

    Args:
        path: for messages.

    Raises:
        InputError: it is no config file, has a tag that is not accepted, or is beyond the limits of
            this module.
    """
    try:
        loader = _Loader(text)
        loader.name = path
        node = loader.get_single_node()
        if not isinstance(node, MappingNode):
            raise InputError(f"{shown(path)} is not a config file: it has no keys")
        check = _Check(path, text, loader)
        check.node(node)
        check.size(node)
        content = loader.construct_document(node)
        check.names(content)
        return content
    except InputError:
        raise
    except RecursionError as e:
        reason = f"use {MAX_DEPTH} nodes and lists in each other at most"
        raise InputError(f"{shown(path)} is not a config file: {reason}") from e
    except BROKEN as e:
        reason = " ".join(str(e).split()) + _hint(e, text)
        raise InputError(f"{shown(path)} is not a config file: {reason}") from e


class _Check:
    """The nodes of a file, each with its key, before anything is made of them.

    Args:
        path, text: of the file.
        loader: makes the scalars.
    """

    def __init__(self, path: str, text: str, loader: _Loader) -> None:
        self.path, self.text, self.loader = path, text, loader
        self.done: set[Node] = set()
        self.sizes: dict[Node, tuple[int, int]] = {}

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
            names = [self._name(name, prefix) for name, _ in node.value]
            if len(above) == 1 and node.tag != f"{_YAML}map":
                raise self._error("", f"the tag {_tag_of(node)} is not accepted for a whole file")
            self._refuse_twice(node, prefix)
            if node.flow_style:
                self._cut_values(node, prefix)
            for name, (_, value) in zip(names, node.value, strict=True):
                self.node(value, f"{prefix}{name}", above)
        elif isinstance(node, SequenceNode):
            if node.flow_style:
                self._cut_elements(node, key)
            for element in node.value:
                self.node(element, key, above)
        elif isinstance(node, ScalarNode):
            self._scalar(node, key)

    def size(self, node: Node) -> tuple[int, int]:
        """How many values a node stands for, with what aliases repeat, and in how many levels.

        InputError for too many.
        """
        if node not in self.sizes:
            parts = node.value if isinstance(node.value, list) else []
            below = [
                self.size(part)
                for pair in parts
                for part in (pair if isinstance(pair, tuple) else [pair])
            ]
            number = 1 + sum(number for number, _ in below)
            depth = 1 + max((depth for _, depth in below), default=0)
            for what, found, limit in (
                ("values", number, MAX_VALUES),
                ("nodes and lists in each other", depth - 1, MAX_DEPTH),
            ):
                if found > limit:
                    reason = f"more than {limit} {what}, with what aliases repeat"
                    raise self._error("", f"{reason}, are not accepted")
            self.sizes[node] = (number, depth)
        return self.sizes[node]

    def names(self, content: Mapping[Any, Any], prefix: str = "") -> None:
        """Raise InputError for a key that is no text: yacs joins them."""
        for name, value in content.items():
            if not isinstance(name, str):
                raise self._error(
                    f"{prefix}{piece(name)}",
                    f"a key of type {type(name).__name__} is not accepted: keys are texts; write "
                    "it in quotes",
                )
            if isinstance(value, dict):  # what is in a list is none of yacs' keys
                self.names(value, f"{prefix}{piece(name)}.")

    def _refuse_twice(self, node: MappingNode, prefix: str) -> None:
        """Raise InputError for a key that is there twice, of which the last would be taken."""
        lines: dict[tuple[str, str], int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if (first := lines.setdefault((name.tag, name.value), line)) != line:
                raise self._error(
                    f"{prefix}{piece(name.value)}",
                    f"is there twice, in lines {first} and {line}; use one",
                )

    def _name(self, node: Node, prefix: str) -> str:
        """A key, for messages."""
        key = prefix.removesuffix(".")
        self._tag(node, key)
        if not isinstance(node, ScalarNode):  # whose text may be long beyond measure, by aliases
            raise self._error(
                key,
                f"{_KINDS[type(node)]}, from line {node.start_mark.line + 1}, in place of a key is "
                "not accepted; use a text",
            )
        name = piece(node.value)
        if node.tag not in (f"{_YAML}merge", f"{_YAML}value"):
            self._scalar(node, f"{prefix}{name}")
        return name

    def _scalar(self, node: ScalarNode, key: str) -> None:
        """Raise InputError for a text that is not of its tag, or too long a number."""
        reason = ""
        if node.tag in _NUMBERS and len(node.value) > MAX_LENGTH:
            reason = f"it has more than {MAX_LENGTH} characters"
        else:
            try:
                value = self.loader.construct_object(node)
            except BROKEN as e:
                # PyYAML's own reasons are for who reads its source.
                reason = "it is not one" if not isinstance(e, OverflowError) else "it is too large"
            else:
                if isinstance(value, int) and value.bit_length() > MAX_BITS:
                    reason = f"it has more than {MAX_BITS} bits"
        if reason:
            raise self._error(
                key,
                f"{_short(node.value)!r} is not accepted as {_tag_of(node)}: {reason}; write it in "
                "quotes if it is a text",
            )

    def _tag(self, node: Node, key: str) -> None:
        tag = _tag_of(node)
        if not any(node.tag in tags for tags in _TAGS.values()):
            raise self._error(
                key,
                f"the tag {tag} is not accepted; use YAML's own, or !!python/object/apply:eval "
                "for arithmetic",
            )
        if node.tag not in _TAGS[type(node)]:
            raise self._error(key, f"the tag {tag} is not accepted for {_KINDS[type(node)]}")
        if node.tag == _EVAL:
            try:
                self.sizes[node] = (_count(evaluate(_expression(node))), 1)
            except InputError as e:
                raise self._error(key, f"{tag}: {e}") from e

    def _cut_values(self, node: MappingNode, prefix: str) -> None:
        """Raise InputError where YAML has cut a value, and made keys of what comes after it."""
        runs: list[tuple[str, list[Node]]] = []
        for name, value in node.value:
            if runs and _is_absent(value):
                runs[-1][1].append(name)
            else:
                runs.append((piece(name.value), [value]))
        for name, run in runs:
            if whole := self._whole(run):
                raise self._error(
                    f"{prefix}{name}",
                    f"{_short(run[0].value)!r} is what is left of {whole} in braces, which YAML "
                    f'cuts at each comma; write {_in_brackets(whole)} or "{whole}", or put the key '
                    "on a line of its own, without braces",
                )
            self._open(run, f"{prefix}{name}", "braces")

    def _cut_elements(self, node: SequenceNode, key: str) -> None:
        """The same of the elements of a list."""
        for k, element in enumerate(node.value):
            if _parentheses(element) <= 0:
                continue
            run = node.value[k:]
            if whole := self._whole(run):
                raise self._error(
                    key,
                    f"{_short(element.value)!r} is what is left of {whole} in a list, which YAML "
                    f"cuts at each comma; write {_in_brackets(whole)}",
                )
            self._open(run, key, "a list")

    def _open(self, run: Sequence[Node], key: str, where: str) -> None:
        """Raise InputError where a node opens a parenthesis that those after it do not close."""
        if _parentheses(run[0]) > 0 and _length(run) is None:
            raise self._error(
                key,
                f"{_short(run[0].value)!r} has a parenthesis that is not closed, in {where}, where "
                "YAML cuts a value at each comma; write [...] in place of a tuple (...), or quotes "
                "around a text",
            )

    def _whole(self, run: Sequence[Node]) -> str:
        """The text in parentheses that begins with a node, if nodes that follow it end it."""
        length = _length(run)
        if length is None or length == 1:
            return ""
        text = self.text[run[0].start_mark.index : run[length - 1].end_mark.index]
        return _short(" ".join(text.split()), MAX_KEY) if text.startswith("(") else ""

    def _error(self, key: str, reason: str) -> InputError:
        key = _short(key, MAX_KEY)
        return InputError(f"{shown(self.path)}: {f'{key}: ' if key else ''}{reason}")


def piece(name: Any) -> str:
    """A part of a key, or a text, for messages: in one line, and not too long for it."""
    return shown(_short(str(name)))


def _short(text: str, length: int = MAX_PIECE) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _tag_of(node: Node) -> str:
    """A tag, for messages."""
    return piece(node.tag.replace(_YAML, "!!"))


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
    is_one = len(arguments) == 1 and isinstance(arguments[0], ScalarNode)
    if not is_one or arguments[0].tag != f"{_YAML}str":
        raise InputError('it takes a list of one expression in quotes: ["2 * 3"]')
    return arguments[0].value


def _count(value: Value) -> int:
    """How many values there are in a value, with itself."""
    return 1 + sum(map(_count, value)) if isinstance(value, (list, tuple)) else 1


def _is_absent(node: Node) -> bool:
    """Whether a value is not written: that of "b" in {a: 1, b}."""
    return isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index


def _parentheses(node: Node) -> int:
    """How many parentheses a node opens without quotes, less those that it closes."""
    is_plain = isinstance(node, ScalarNode) and node.style is None
    return node.value.count("(") - node.value.count(")") if is_plain else 0


def _length(run: Sequence[Node]) -> int | None:
    """How many nodes it takes until no parenthesis is open; None if one remains."""
    depth = 0
    for k, node in enumerate(run):
        depth += _parentheses(node)
        if depth <= 0:
            return k + 1
    return None


def _in_brackets(whole: str) -> str:
    return whole.replace("(", "[").replace(")", "]")
