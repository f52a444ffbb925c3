"""The table of our keys, made of their descriptions."""

from __future__ import annotations

from collections.abc import Sequence

from .ours import KEYS, Key

_INTRO = """\
## Keys

Ours, beside those of Detectron2. Lists can be written as tuples, integers for floats. What is wrong
only together with other keys is told before anything is built, as are many keys that nothing reads.
Our hooks are in any trainer with `BNHooks`, our trainers are those of `bn-det train`. The
names that a `NORM` can have are in [docs/components.md](../docs/components.md).

| key | default | values | meaning | read by |
| --- | --- | --- | --- | --- |
"""


def key_table() -> str:
    """A section of a Markdown document; a key that several parts have alike is one row."""
    groups: dict[Key, list[str]] = {}
    for name, key in KEYS.items():
        hashable = key._replace(default=repr(key.default))
        groups.setdefault(hashable, []).append(name)
    rows = [_row(names, key) for key, names in groups.items()]
    return _INTRO + "".join(rows)


def _row(names: Sequence[str], key: Key) -> str:
    cells = f"`{_joined(names)}`", f"`{key.default}`", key.rule.words, key.meaning, key.reader
    return f"| {' | '.join(cells)} |\n"


def _joined(names: Sequence[str]) -> str:
    """MODEL.A.B and MODEL.C.B as MODEL.{A,C}.B; they differ in one place."""
    steps = list(zip(*[name.split(".") for name in names], strict=True))
    return ".".join(
        of_step[0] if len(set(of_step)) == 1 else f"{{{','.join(of_step)}}}" for of_step in steps
    )
