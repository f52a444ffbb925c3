"""What a value of a config has to be, and how messages and docs say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value has to be.

    Attributes:
        accepts: whether a value is so; its type is the default's.
        words: for the end of a message, after "use".
    """

    accepts: Callable[[Any], bool]
    words: str


def at_least(low: float, meaning: str = "") -> Rule:
    """A number, and perhaps what the lowest one stands for."""
    lowest = f"{low} ({meaning})" if meaning else str(low)
    return Rule(lambda value: value >= low, f"{lowest} or more")


def above(low: float) -> Rule:
    return Rule(lambda value: value > low, f"more than {low}")


def between(low: float, high: float, meaning: str = "") -> Rule:
    """A number, and perhaps what the lowest one stands for."""
    lowest = f"{low} ({meaning})" if meaning else str(low)
    return Rule(lambda value: low <= value <= high, f"{lowest} to {high}")


def within(low: float, high: float) -> Rule:
    return Rule(lambda value: low < value < high, f"more than {low}, and less than {high}")


def below(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value < high, f"{low} or more, and less than {high}")


def one_of(*values: Any) -> Rule:
    return Rule(lambda value: value in values, f"one of {list(values)}")


def some_of(values: Iterable[str]) -> Rule:
    """A list of names of these."""
    known = list(values)
    return Rule(each(one_of(*known), str).accepts, f"a list, each one of {known}")


def optional(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.accepts(value), f"None, or {rule.words}")


def each(rule: Rule, of: type | tuple[type, ...] = (int, float), may_be_empty: bool = True) -> Rule:
    """A list or tuple, of values of a type."""

    def is_one(value: Any) -> bool:
        return isinstance(value, of) and not isinstance(value, bool) and rule.accepts(value)

    def accepts(values: Any) -> bool:
        is_long_enough = may_be_empty or len(values) > 0
        return isinstance(values, (list, tuple)) and is_long_enough and all(map(is_one, values))

    length = "a list" if may_be_empty else "a list of one or more values"
    return Rule(accepts, f"{length}, each {rule.words}" if rule.words else length)


ANY = Rule(lambda value: True, "")
COUNT, NUMBER = at_least(1), at_least(0)

# Where more would end without a line, for lack of memory or in a number's overflow, or never.
ITERATIONS = between(1, 10**9)
IMAGES = between(1, 2**16)
CLASSES = between(1, 10**5)
CHANNELS = between(1, 2**14)
LAYERS = between(0, 1000)
NAMES = Rule(each(ANY, str).accepts, "a list of names")
