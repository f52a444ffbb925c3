"""What is wrong with a model's BatchNorm, and what mends it."""

from .examination import examine
from .findings import SEVERITIES, Finding, Report
from .from_file import examine_file
from .from_training import Step
from .page import html_page
from .rules import RULES, Rule
from .sarif import sarif_log

__all__ = [
    "RULES",
    "SEVERITIES",
    "Finding",
    "Report",
    "Rule",
    "Step",
    "examine",
    "examine_file",
    "html_page",
    "sarif_log",
]
