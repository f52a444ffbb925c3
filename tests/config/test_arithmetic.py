"""Arithmetic of config files against Python's eval."""

import ast
import random

import pytest

from bn_det.config import arithmetic
from bn_det.config.arithmetic import evaluate
from bn_det.errors import InputError

ACCEPTED = [
    "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
    "  \t-7 // 2",
    "(-7) % 3, -7 % 3.0, 7 / -2, 2 ** -1, -2 ** 2, 0 ** 0, --1",
    "(1,), (), [], [(1, [2.5])]",
    "[x / 10 for x in range(5)]",
    "[x for x in range(7, -3, -4)]",
    "[(x, y) for x in (1, 2) for y in [x, 2 * x] for z in range(y)]",
    "[[y * x for y in range(x)] for x in range(4)]",
    "[[x for x in [x, 2 * x]] for x in [1, 2]]",
    "[x for x in [1, 2] for x in [x, 10]]",
    "[x for x in [1] for y in [x] for x in [y, 3]]",
    "[x for x in range(0)]",
    "[\n 1,\n 2]",
    "2 ** 63, -2 ** 63, 1e999, 1_000, 0x10, 1 ** 10 ** 18, (-1) ** (10 ** 18)",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_equal_to_eval(text):
    assert repr(evaluate(text)) == repr(eval(text))


def random_expression(rng, names, depth):
    """Any of what is accepted; some of them cannot be computed."""
    kind = rng.choice(["leaf", "leaf", "binary", "power", "minus"] if depth else ["leaf"])
    if kind == "leaf":
        return rng.choice([*names, str(rng.randint(0, 9)), str(rng.random() * 10)])
    left, right = (random_expression(rng, names, depth - 1) for _ in range(2))
    if kind == "minus":
        return f"-{left}"
    if kind == "power":
        exponent = rng.randint(-3, 9)  # a fraction may give a complex number
        return rng.choice([f"({left}) ** {exponent}", f"{rng.random()} ** {rng.random()}"])
    operator = rng.choice(["+", "-", "*", "/", "//", "%"])
    return rng.choice([f"{left} {operator} {right}", f"({left}) {operator} ({right})"])


def random_list(rng, names, depth):
    element = random_expression(rng, names, 3)
    if depth and rng.random() < 0.5:
        name = rng.choice("xyz")
        source = rng.choice([f"range({rng.randint(0, 4)})", f"[{element}, 2, 3.5]"])
        return f"[{random_list(rng, [*names, name], depth - 1)} for {name} in {source}]"
    return rng.choice([f"[{element}, 1]", f"({element}, 1)", element])


def outcome(function, text):
    try:
        return repr(function(text))
    except (ArithmeticError, InputError, TypeError):
        return "none"


def test_random_expressions(monkeypatch):
    """What eval cannot compute is refused."""
    monkeypatch.setattr(arithmetic, "MAX_BITS", 100_000)
    rng = random.Random(0)
    texts = [random_list(rng, [], 2) for _ in range(2000)]
    computed = 0
    for text in texts:
        found, expected = outcome(evaluate, text), outcome(eval, text)
        assert found == expected, text
        computed += found != "none"
    assert computed > 1200


REFUSED = {
    "[int(x * 0.1) for x in range(5)]": "'int(x * 0.1)'",
    "__import__('os').system('x')": "\"__import__('os').system('x')\"",
    "x": "'x'",
    "[y for x in [1]]": "'y'",
    "[[0 for a in [1] for b in [x] for x in [2]] for x in [5]]": "'x'",
    "[x.real for x in [1]]": "'x.real'",
    "[1, 2][0]": "'[1, 2][0]'",
    "'a'": "\"'a'\"",
    "1 + True": "'True'",
    "None": "'None'",
    "2j": "'2j'",
    "{1: 2}": "'{1: 2}'",
    "lambda: 0": "'lambda: 0'",
    "1 if 1 else 2": "'1 if 1 else 2'",
    "1 < 2": "'1 < 2'",
    "1 | 2": "'1 | 2'",
    "+1": "'+1'",
    "[*[1]]": "'*[1]'",
    "(x for x in [1])": "'(x for x in [1])'",
    "[x := 1]": "'x := 1'",
    "[1] + [2]": "'[1]' is not accepted: it has to be a number",
    "[1] * 9999999": "'[1]' is not accepted: it has to be a number",
    "range(3)": "'range(3)'",
    "[range(3) for x in [1]]": "'range(3)'",
    "[x for x in range(2.5)]": "'range(2.5)' is not accepted: 'float' object cannot be",
    "[x for x in range(1, 2, 0)]": "'range(1, 2, 0)' is not accepted: range() arg 3 must not be",
    "[x for x in range(*[1])]": "'*[1]'",
    "[x for x in range(3, step=1)]": "'range(3, step=1)'",
    "[x for x in sorted([1])]": "'sorted([1])'",
    "[x for x in [[1], [2]]]": "'[1]' is not accepted: it has to be a number",
    "[x for x in [1] if x]": "without if and async",
    "[x async for x in [1]]": "without if and async",
    "[x for x, y in [(1, 2)]]": "'x, y' is not accepted: a comprehension has a name for each",
    "[range(1) for range in [1]]": "'range' is not accepted: a comprehension has a name",
    "1 / 0": "'1 / 0' is not accepted: division by zero",
    "10.0 ** 400": "'10.0 ** 400' is not accepted: Numerical result out of range",
    "(-8) ** (1 / 3)": "'(-8) ** (1 / 3)' is not accepted: it is a complex number",
    "1 +": "'1 +' is not accepted: invalid syntax",
    "": "'' is not accepted: invalid syntax",
    "1\x00": "'1\\x00' is not accepted: source code",
    f"f({'1 + ' * 100}1)": f"'f({'1 + ' * 14}1 ...'",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda t: t[:20])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError) as e:
        evaluate(text)
    message = str(e.value)
    assert message.startswith(REFUSED[text]) or REFUSED[text] in message
    assert "\n" not in message and message.endswith(f"; use {arithmetic.ACCEPTED}")


LARGE = {
    "2 ** 64": "it has more than 64 bits",
    "(2 ** 63) * 2": "more than 64 bits",
    "99999999999999999999": "'99999999999999999999' is not accepted: it has more than 64 bits",
    f"{'1 + ' * 60}1": "more than 50 expressions in each other",
    f"{'-' * 900}1": "more than 50 expressions in each other",
    f"{'[' * 51}{']' * 51}": "more than 50 expressions in each other",
    "[0 for x in range(10001)]": "more than 10000 steps",
    "[0 for x in range(101) for y in range(100)]": "more than 10000 steps",
    "[0 for x in range(10001) for y in []]": "more than 10000 steps",
    "[x for x in range(0) for y in range(1)] + 0 * 1" + " " * 1000: "an expression of 1047 char",
}


@pytest.mark.parametrize("text", LARGE, ids=lambda t: t[:20])
def test_what_is_too_large_is_refused(text):
    with pytest.raises(InputError, match=LARGE[text]):
        evaluate(text)


@pytest.mark.parametrize("text", ["9 ** 9 ** 9", "(-3) ** 10 ** 10", "2 ** 2 ** 10 ** 9"])
def test_a_large_power_is_not_computed(text, monkeypatch):
    power = arithmetic._OPERATORS[ast.Pow]

    def small(a, b):
        assert abs(a) ** min(b, 100) < 2**128, "this would take memory"
        return power(a, b)

    monkeypatch.setitem(arithmetic._OPERATORS, ast.Pow, small)
    with pytest.raises(InputError, match="more than 64 bits"):
        evaluate(text)
