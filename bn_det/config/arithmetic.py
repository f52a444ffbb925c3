"""The arithmetic of config files, computed as Python's ``eval`` does, and nothing beyond it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from ..errors import InputError

Number = int | float
_Loop = tuple[str, ast.expr]
Value = Number | list | tuple

ACCEPTED = (
    "numbers, + - * / // % **, lists, tuples, and list comprehensions over a list of numbers or "
    "over range(...)"
)

MAX_LENGTH = 1000
"""Characters of an expression."""

MAX_DEPTH = 50
"""Of expressions in expressions."""

MAX_STEPS = 10_000
"""Parts that are computed, each as often as it is: so many elements at most, too."""

MAX_BITS = 64
"""Of an integer."""

_TOO_LARGE = f"it has more than {MAX_BITS} bits"

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate(text: str) -> Value:
    """The value of an arithmetic expression, equal to that of Python's ``eval``.

    Raises:
        InputError: it has something else than ACCEPTED, cannot be computed, or is too large.
    """
    if len(text) > MAX_LENGTH:
        raise InputError(
            f"an expression of {len(text)} characters is not accepted; use {MAX_LENGTH} at most"
        )
    text = text.lstrip(" \t")  # as eval does
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        reason = e.msg if isinstance(e, SyntaxError) else str(e)
        raise _refused(text, reason) from e
    return _Evaluation(text).value(tree.body, {})


class _Evaluation:
    """One expression on its way, which counts its steps.

    The methods get the part that they are about, and the names that the comprehensions around it
    have bound. A name stands for a number, so that no value holds another one many times.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps = 0
        self.depth = 0

    def value(self, node: ast.expr, names: Mapping[str, Number]) -> Value:
        self._step()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise InputError(f"more than {MAX_DEPTH} expressions in each other are not accepted")
        ret = self._value(node, names)
        self.depth -= 1
        return ret

    def _value(self, node: ast.expr, names: Mapping[str, Number]) -> Value:
        if isinstance(node, ast.Constant) and _is_number(node.value):
            return self._checked(node, node.value)
        if isinstance(node, ast.Name) and node.id in names:
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self._number(node.operand, names)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self._number(node.left, names), self._number(node.right, names)
            return self._computed(node, left, right)
        if isinstance(node, ast.List):
            return [self.value(element, names) for element in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(self.value(element, names) for element in node.elts)
        if isinstance(node, ast.ListComp):
            return self._comprehension(node, names)
        raise self._refused(node)

    def _number(self, node: ast.expr, names: Mapping[str, Number]) -> Number:
        value = self.value(node, names)
        if not isinstance(value, (int, float)):
            raise self._refused(node, "it has to be a number here")
        return value

    def _computed(self, node: ast.BinOp, left: Number, right: Number) -> Number:
        bits = left.bit_length() - 1 if isinstance(left, int) and isinstance(right, int) else 0
        # 2 ** (this product) is less than the power, and its square is more.
        if isinstance(node.op, ast.Pow) and bits * right > MAX_BITS:
            raise self._refused(node, _TOO_LARGE)
        try:
            value = _OPERATORS[type(node.op)](left, right)
        except ArithmeticError as e:
            raise self._refused(node, e.args[-1]) from e
        return self._checked(node, value)

    def _checked(self, node: ast.expr, value: Number | complex) -> Number:
        if isinstance(value, complex):
            raise self._refused(node, "it is a complex number")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise self._refused(node, _TOO_LARGE)
        return value

    def _comprehension(self, node: ast.ListComp, names: Mapping[str, Number]) -> list[Value]:
        loops: list[_Loop] = []
        for loop in node.generators:
            target = loop.target
            if loop.ifs or loop.is_async:
                raise self._refused(node, "a comprehension is without if and async here")
            if not isinstance(target, ast.Name) or target.id == "range":
                raise self._refused(target, "a comprehension has a name for each number here")
            loops.append((target.id, loop.iter))
        # What its first list is made of is outside; for the rest its own names are others.
        own = {name for name, _ in loops}
        inside = {name: value for name, value in names.items() if name not in own}
        (name, numbers), *inner = loops
        return [
            element
            for number in self._numbers(numbers, names)
            for element in self._elements(node.elt, inner, {**inside, name: number})
        ]

    def _elements(
        self, node: ast.expr, loops: Sequence[_Loop], names: Mapping[str, Number]
    ) -> Iterator[Value]:
        if not loops:
            yield self.value(node, names)
            return
        (name, numbers), *inner = loops
        for number in self._numbers(numbers, names):
            yield from self._elements(node, inner, {**names, name: number})

    def _numbers(self, node: ast.expr, names: Mapping[str, Number]) -> Iterator[Number]:
        """What a comprehension runs over."""
        if isinstance(node, (ast.List, ast.Tuple)):
            for element in node.elts:
                yield self._number(element, names)
        elif _is_range(node):
            arguments: list[Any] = [self._number(argument, names) for argument in node.args]
            try:
                numbers = range(*arguments)
            except (TypeError, ValueError) as e:
                raise self._refused(node, str(e)) from e
            for number in numbers:
                self._step()
                yield number
        else:
            raise self._refused(node)

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise InputError(f"more than {MAX_STEPS} steps to a value are not accepted")

    def _refused(self, node: ast.expr, reason: str = "") -> InputError:
        return _refused(ast.get_source_segment(self.text, node) or ast.unparse(node), reason)


def _refused(part: str, reason: str) -> InputError:
    part = part if len(part) <= 60 else f"{part[:60]}..."
    return InputError(f"{part!r} is not accepted{f': {reason}' if reason else ''}; use {ACCEPTED}")


def _is_number(value: object) -> TypeGuard[Number]:
    return type(value) in (int, float)  # and no truth value


def _is_range(node: ast.expr) -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or node.keywords:
        return False
    return isinstance(node.func, ast.Name) and node.func.id == "range"
