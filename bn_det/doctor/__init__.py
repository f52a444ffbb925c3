"""What is wrong with a model's BatchNorm, and what mends it."""

from .examination import examine
from .findings import SEVERITIES, Finding, Report
from .from_file import examine_file
from .rules import RULES, Rule

__all__ = ["RULES", "SEVERITIES", "Finding", "Report", "Rule", "examine", "examine_file"]
