"""For the authors of rules and backends, and for readers of reports in Python: the types that these consist of.

Importing this imports no torch; what handles models is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kbitcheck.backends.laid_out import LaidOut, RunByPackage
from kbitcheck.backends.protocol import Arithmetic, Backend, Kernels, Packing, Recognition
from kbitcheck.backends.registry import added
from kbitcheck.backends.schemes import Choice, Option, Scheme, dtype_option
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import NotApplicable
from kbitcheck.core.facts import Facts
from kbitcheck.core.finding import Condition, Finding, read_findings
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.rule import rule

if TYPE_CHECKING:
    from kbitcheck.backends.internals import kept_wide, mark, replace_linear
    from kbitcheck.backends.packed import groups, pack_all, skipped

__all__ = [
    "Arithmetic", "Backend", "CaseSpec", "Choice", "Condition", "Facts", "Finding", "Kernels", "LaidOut", "Level", "NotApplicable",
    "Observation", "Option", "Packing", "Party", "Recognition", "Result", "RunByPackage", "Scheme", "Status", "added", "dtype_option",
    "groups", "kept_wide", "mark", "pack_all", "read_findings", "replace_linear", "rule", "skipped",
]  # fmt: skip

_OF_MODELS = {
    **dict.fromkeys(("kept_wide", "mark", "replace_linear"), "kbitcheck.backends.internals"),
    **dict.fromkeys(("groups", "pack_all", "skipped"), "kbitcheck.backends.packed"),
}


def __getattr__(name: str) -> Any:
    if name not in _OF_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OF_MODELS[name]), name)
