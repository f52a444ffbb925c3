"""What mkdocs makes of this repository when it builds the site: pages that are made of code, of the
READMEs, and links that work on GitHub as well as there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from bn_det.config.key_table import key_table
from bn_det.doctor import RULES, Rule

ROOT = Path(__file__).resolve().parents[1]

READMES = {
    "README.md": "index.md",
    "configs/README.md": "config_files.md",
    "examples/pointdet/README.md": "extending/pointdet.md",
}
"""Files outside of docs/ that are pages of the site, and their places there."""

KEYS = "configs/README.md#keys"
"""A part of one of them that is a page by itself, ``keys.md``."""

_LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```[^\S\n]*$|^    [^\n]*$", re.DOTALL | re.MULTILINE)


def rules_page() -> str:
    """Every rule of the doctor, with a heading that is its id."""
    rows = "".join(f"| [{id}](#{id.lower()}) | {rule.name} |\n" for id, rule in RULES.items())
    rules = "\n".join(_rule(id, rule) for id, rule in RULES.items())
    return f"| rule | what it finds |\n| --- | --- |\n{rows}\n{rules}"


def _rule(id: str, rule: Rule) -> str:
    parts = "".join(f"{head}\n:   {text}\n\n" for head, text in rule.parts.items() if text)
    return f"## {id}\n\n*{rule.name}*; a finding's number: {rule.unit}.\n\n{parts}"


def keys_page() -> str:
    """The table of our keys, without its heading, which the page has."""
    return key_table().partition("\n")[2]


GENERATED: dict[str, Callable[[], str]] = {"rules": rules_page, "keys": keys_page}
"""What stands in place of ``<!-- NAME -->`` in a page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs."""
    for source, name in READMES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        if source == "configs/README.md":  # its keys are a page by themselves
            content = content.partition("\n## Keys\n")[0].replace("(#keys)", "(README.md#keys)")
            content = f"---\nhide: [toc]\n---\n{content}"
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Leave Sphinx's roles out of docstrings, such as ``:class:``."""
    return re.sub(r":(?:class|func|meth|mod):(?=<code>)", "", html)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in what is generated, and have links lead to pages."""
    for name, generate in GENERATED.items():
        marker = f"<!-- {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    place = page.file.src_uri
    source = next((s for s, name in READMES.items() if name == place), f"docs/{place}")
    # Code stays as it is.
    code = list(_CODE.finditer(markdown))

    def in_site(link: re.Match[str]) -> str:
        if any(of.start() <= link.start() < of.end() for of in code):
            return link[0]
        return _in_site(link, source, place)

    return _LINK.sub(in_site, markdown)


def _in_site(link: re.Match[str], source: str, place: str) -> str:
    """A link of a file of the repository, as one of a page; to what is no page, its text alone."""
    mark, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if ":" in target or not path:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if f"{path}#{anchor}" == KEYS:
        path, anchor = "docs/keys.md", ""
    if f"{path}/README.md" in READMES:
        path = f"{path}/README.md"
    if path in READMES:
        path = f"docs/{READMES[path]}"
    if not path.startswith("docs/"):
        return text
    relative = posixpath.relpath(path, f"docs/{posixpath.dirname(place)}")
    return f"{mark}[{text}]({relative}{'#' if anchor else ''}{anchor})"
