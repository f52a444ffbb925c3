"""The doctor's report as one HTML page: no script, and nothing that is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import chain

from .findings import (
    SEVERITIES,
    Finding,
    Report,
    Tried,
    count,
    gained,
    how_much,
    signed,
    value_of,
)
from .pictures import pictures
from .rules import RULES

_NAMES_SHOWN = 3

_STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1d2329; --dim: #5b6570; --rule: #d9dee3; --code: #f3f5f7;
  --error: #b3261e; --warning: #8a5a00; --note: #1f5f99; --none: #1d6b3a;
  --bar: #8fa3b5; --bad: #d0342c; --chance: #dfe7ee; --bound: #5b6570; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181c; --ink: #e4e8ec; --dim: #9aa5b0; --rule: #343b43; --code: #1f252b;
  --error: #ff8a80; --warning: #f2bd57; --note: #82bbf0; --none: #7fd09a;
  --bar: #6d8296; --bad: #ff6a5e; --chance: #2b343d; --bound: #9aa5b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem; color: var(--ink);
  background: var(--paper); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
header { border-left: .6rem solid; padding: .7rem 1rem; border-radius: .3rem;
  background: color-mix(in srgb, currentColor 9%, var(--paper)); }
header p { margin: 0; color: var(--dim); } header pre { background: var(--paper); }
h1::first-letter { text-transform: uppercase; }
h1 { margin: .2rem 0 .5rem; font-size: 1.6rem; line-height: 1.25; color: var(--ink); }
h2 { margin: 2rem 0 .6rem; font-size: 1.2rem; }
.error { color: var(--error); } .warning { color: var(--warning); }
.note { color: var(--note); } .none { color: var(--none); }
b.error, b.warning, b.note, b.none { white-space: nowrap; }
code { font: .88em/1.4 ui-monospace, monospace; unicode-bidi: isolate; }
pre { margin: .4rem 0; padding: .5rem .7rem; background: var(--code); border-radius: .3rem;
  color: var(--ink); white-space: pre-wrap; }
pre code { user-select: all; }
table { width: 100%; border-collapse: collapse; }
th { text-align: left; color: var(--dim); font-weight: normal; }
th:nth-child(1) { width: 13%; } th:nth-child(2) { width: 23%; } th:nth-child(3) { width: 13%; }
.gain { white-space: nowrap; }
th, td { padding: .6rem 1rem .6rem 0; border-top: 1px solid var(--rule); vertical-align: top; }
td p { margin: 0 0 .4rem; }
.small { color: var(--dim); font-size: .9rem; }
summary { color: var(--dim); font-size: .9rem; cursor: pointer; }
dt { margin-top: .5rem; font-weight: 600; font-size: .9rem; } dd { margin: 0; font-size: .9rem; }
.pictures { display: grid; gap: 1.5rem 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { min-height: 4.5rem; } figcaption strong { display: block; }
.plot { display: flex; } .plot .axis { flex: none; width: 2.6rem; }
.plot .bars { flex: 1; min-width: 0; overflow: visible; }
svg { display: block; height: 10rem; font: 11px system-ui, sans-serif; }
svg text { fill: var(--dim); text-anchor: end; }
svg .rank { fill: var(--bad); font-weight: 700; text-anchor: middle; }
.bar { fill: var(--bar); } .bad { fill: var(--bad); } .chance { fill: var(--chance); }
.bound { stroke: var(--bound); stroke-width: 1.5; } .grid { stroke: var(--rule); }
.mark { stroke: var(--bad); stroke-width: 2.5; } .cut { stroke: var(--paper); stroke-width: 3; }
.depth { display: flex; justify-content: space-between; gap: 1rem; margin-left: 2.6rem; }
.depth code { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
ol { margin: .4rem 0 0; padding-left: 2.6rem; font-size: .9rem; }
ol ::marker { color: var(--bad); font-weight: 700; }
@media (max-width: 44rem) {
  body { padding: .8rem; } h1 { font-size: 1.25rem; } thead { display: none; }
  table, tbody, tr, td { display: block; } td { border: 0; padding: .2rem 0; }
  .gain::before { content: "Gain "; }
  tr { border-top: 1px solid var(--rule); padding: .6rem 0; } figcaption { min-height: 0; } }
@media print {
  body { max-width: none; padding: 0; font-size: 12px; print-color-adjust: exact; }
  tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def html_page(report: Report, subject: str) -> str:
    """A whole page, in ASCII alone, for any encoding of a terminal or a file.

    Args:
        subject: what was examined, such as the path of a checkpoint.
    """
    parts = _findings(report.findings), _treatments(report.tried), pictures(report)
    body = "\n".join([_verdict(report, subject), *chain(*parts)])
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(subject)}: {escape(report.verdict)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    # NUL is the one character that HTML cannot hold; half a surrogate pair is read as unknown.
    return page.replace("\0", "\ufffd").encode("ascii", "xmlcharrefreplace").decode()


def _verdict(report: Report, subject: str) -> str:
    """The headline; the treatment that the verdict names stands below it, to be copied."""
    first = next(iter(report.findings), None)
    worst = first.severity if first else "none"
    line, mend = report.verdict, ""
    if first and f"; {first.prescription}" in line:
        line = line.replace(f"; {first.prescription}", "", 1)
        mend = _mend(first)
    numbers = [
        count(sum(of.severity == severity for of in report.findings), severity)
        for severity in SEVERITIES
    ]
    said = ", ".join(of for of in numbers if not of.startswith("0 ")) or "nothing found"
    mark = {"error": "&#10007;", "warning": "&#9888;&#65038;", "note": "&#8505;&#65038;"}
    return (
        f'<header class="{worst}"><p><b class="{worst}">{mark.get(worst, "&#10003;")} {said}</b> '
        f"in <code>{escape(subject)}</code></p><h1>{escape(line)}</h1>{mend}</header>"
    )


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _mend(of: Finding) -> str:
    """What mends it, to be copied; and why that may harm, where it was not tried."""
    words = f"<p>Untried: {escape(of.untried)}.</p>" if of.untried else ""
    return words + _code(of.treatment)


def _findings(findings: list[Finding]) -> Iterator[str]:
    if findings:
        gain = '<th class="gain">Gain</th>' if any(of.gain is not None for of in findings) else ""
        yield "<h2>Findings</h2>\n<table>\n<thead><tr><th>Rule</th><th>Where</th>"
        yield f"<th>How much</th>{gain}<th>Why, and what mends it</th></tr></thead>\n<tbody>"
        known: set[str] = set()
        for of in findings:
            mend = "<p>Mended as above.</p>" if of.treatment in known else _mend(of)
            known.add(of.treatment)
            yield _row(of, mend, bool(gain))
        yield "</tbody>\n</table>"


def _treatments(tried: Sequence[Tried]) -> Iterator[str]:
    if tried:
        measure = tried[0].measure
        yield "<h2>Treatments that were tried, on images apart</h2>\n<table>\n<thead><tr>"
        yield f"<th>Treatment</th><th>{measure} before</th><th>After</th><th>Gain</th><th></th>"
        yield "</tr></thead>\n<tbody>"
        for of in tried:
            kept = f"<b>Kept.</b> {escape(of.needs)}" if of.kept else escape(of.needs)
            cells = escape(of.name), value_of(of.before), value_of(of.after), gained(of), kept
            yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        yield "</tbody>\n</table>"


def _row(of: Finding, mend: str, has_gain: bool) -> str:
    rule = RULES[of.rule]
    gain = "" if of.gain is None else signed(of.gain, of.measure)
    explained = "".join(
        f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in rule.parts.items()
    )
    cells = [
        f'<b class="{of.severity}">{of.severity} {of.rule}</b><br>{escape(rule.name)}',
        _names(of),
        escape(how_much(of)),
        *([f'<span class="gain">{gain}</span>'] if has_gain else []),
        f"<p>{escape(of.why)}</p>{mend}"
        f"<details><summary>{of.rule} explained</summary><dl>{explained}</dl></details>",
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _names(of: Finding) -> str:
    """All of them; many are folded."""
    codes = [_name(name) for name in of.where] or [of.place]
    shown, more = codes[:_NAMES_SHOWN], codes[_NAMES_SHOWN:]
    folded = f"<details><summary>and {len(more)} more</summary>{'<br>'.join(more)}</details>"
    return "<br>".join(shown) + (folded if more else "")


def _name(name: str) -> str:
    """A long one is broken at its dots."""
    return f"<code>{escape(name or 'the module').replace('.', '.<wbr>')}</code>"
