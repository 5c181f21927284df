"""For the authors of rules, and for readers of reports in Python: the types that a report and a rule consist of.

Importing this imports no torch.
"""

from __future__ import annotations

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import rule

__all__ = ["CaseSpec", "Facts", "Level", "NotApplicable", "Observation", "Party", "Result", "Status", "rule"]
