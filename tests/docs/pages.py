"""What a Markdown page has in it: links, headings, blocks of code, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(
    r"(?:(?<=\n\n)|\A)(?:    \S[^\n]*\n|    +[^\n]*\n|\n(?=    ))+", re.MULTILINE
)
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_VARIABLE = re.compile(r'^\s*(\w+)=("[^"]*"|\S+)\s*$|^for (\w+) in ([^\s;]+)', re.MULTILINE)

WHERE = {
    **{
        "C": "configs/quick_start.yaml",
        "CONFIG": "configs/quick_start.yaml",
        "HOST": "torchvision",
    },
    **{"NAME": "shapes_val", "DATASET": "shapes_val", "EXPERIMENT": "population", "WAY": "BN"},
    **{"MODULE:FUNCTION": "module:function"},
}
"""What a page leaves for its readers to fill in, filled in."""


class Block(NamedTuple):
    """Attributes:
    language: "" where none is named, and of a block that is indented.
    title: what is over it: "with ..." says what it lacks to be run.
    """

    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for head, body in _FENCE.findall(text):
        title = re.search(r'title="([^"]*)"', head)
        yield Block(head.split(" ")[0], title[1] if title else "", body)
    for body in _INDENTED.findall(_FENCE.sub("", text)):
        yield Block("", "", "\n".join(line[4:] for line in body.splitlines()))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return _INDENTED.sub("\n", _FENCE.sub("\n", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = next(k for k in range(len(found) + 1) if f"{slug}{f'-{k}' * bool(k)}" not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of ours that a page shows, in a block or within a line."""
    for block in blocks(page):
        if block.language in ("", "bash"):
            yield from _commands(block.text)
    for span in _INLINE.findall(prose(page)):
        if span.startswith(("python tools/", "bn-det ")):
            yield from _commands(" ".join(span.split()))


def _commands(text: str) -> Iterator[list[str]]:
    text = text.replace("\\\n", " ")
    values = {a or c: (b or d).strip('"') for a, b, c, d in _VARIABLE.findall(text)}
    for line in text.splitlines():
        for part in re.split(r"\s(?:&&|;)\s|^\s+", line):
            if "python tools/" not in part[:13] and not part.startswith("bn-det "):
                continue
            part = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), part)
            yield [_filled_in(word) for word in shlex.split(part, comments=True)]


def _filled_in(word: str) -> str:
    if word in WHERE:
        return WHERE[word]
    return word.replace("/WAY.", "/BN.")
