"""The pages docs/with/*.md, and what is held of them: their code runs, their output is real."""

import re

from here import ROOT


def blocks(page, kind):
    """The fenced blocks of a kind ("python", or "" for output) of a page, by its name."""
    text = (ROOT / "docs" / "with" / f"{page}.md").read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in fences if found == kind]


def run(page, **names):
    """Run the Python blocks of a page, one after the other; the names that they leave."""
    for k, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"docs/with/{page}.md, block {k + 1}", "exec"), names)
    return names


def shown_rules(page):
    """Of each output of the doctor that a page shows, the rules of its table with severities."""
    pattern = re.compile(r"^\| (\w+) +\| (BN\d+) ", re.MULTILINE)
    return [pattern.findall(output) for output in blocks(page, "")]


def rules(report):
    return [(of.severity, of.rule) for of in report.findings]
