"""The pages docs/with/*.md, and what is held of them: their code runs, their output is real."""

import re

from here import ROOT

PAGES = sorted((ROOT / "docs" / "with").glob("*.md"))


def blocks(page, kind):
    """The fenced blocks of a kind ("python", or "" for output) of a page, by its name."""
    text = (ROOT / "docs" / "with" / f"{page}.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(page, **names):
    """Run the Python blocks of a page, one after the other; the names that they leave."""
    for k, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"docs/with/{page}.md, block {k + 1}", "exec"), names)
    return names


def shown_rules(page):
    """Of each output of the doctor that a page shows, the rules of its table with severities."""
    tables = [re.findall(r"^\| (\w+) +\| (BN\d+) ", of, re.MULTILINE) for of in blocks(page, "")]
    return [table for table in tables if table]


def rules(report):
    return [(of.severity, of.rule) for of in report.findings]
