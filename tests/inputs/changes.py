"""Trees of plain data with small changes, as hypothesis draws them."""

import copy
import math

from hypothesis import strategies as st

ODD = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 0.0, -0.5, 1e-320, 1e30, 1e308, math.nan,
    math.inf, -math.inf, "", "0", "1", "nan", "a b", "\n", "\x1b[31m", "\ud800", "é" * 300, [], {},
    [[]], [None], [0] * 5, {"a": 1}, [[[[1]]]], ["a", 1],
]  # fmt: skip
"""Values that somebody's file had, or may have, where another one was meant."""


def places(tree, path=()):
    """Every place in a tree below its top, as the keys that lead there."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _change(draw, tree):
    found = list(places(tree))
    if not found:
        return
    *path, key = draw(st.sampled_from(found))
    parent = _at(tree, path)
    how = draw(st.sampled_from(["put", "put", "put", "remove", "twice", "scale", "rename"]))
    value = parent[key]
    if how == "remove":
        del parent[key]
    elif how == "twice" and isinstance(parent, list):
        parent.append(copy.deepcopy(value))
    elif how == "scale" and isinstance(value, (int, float)):
        parent[key] = draw(st.sampled_from([-1, 1.5, 100, 10**9])) * value
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["x", str(key).lower(), f"{key}_"]))] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))


@st.composite
def changed(draw, tree, max_changes=3):
    """The tree with one change or a few."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, max_changes))):
        _change(draw, tree)
    return tree
