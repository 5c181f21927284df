"""For the authors of rules and backends, and for readers of reports in Python: the types that these consist of.

Importing this imports no torch.
"""

from kbitcheck.backends.protocol import Arithmetic, Backend, Kernels, Packing, Recognition
from kbitcheck.backends.schemes import Choice, Option, Scheme, dtype_option
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.finding import Condition, Finding
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import rule

__all__ = [
    "Arithmetic", "Backend", "CaseSpec", "Choice", "Condition", "Facts", "Finding", "Kernels", "Level",
    "NotApplicable", "Observation", "Option", "Packing", "Party", "Recognition", "Result", "Scheme", "Status",
    "dtype_option", "rule",
]  # fmt: skip
