"""What a function is found guilty of, in one case."""

from __future__ import annotations

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Level, Status
from kbitcheck.core.rule import judge, select
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Loaded
from tests.shallow import shallow

# What reads flags, dtypes and bytes alone, and takes no step.
STRUCTURE = ("KB101", "KB102", "KB201", "KB202", "KB203", "KB204", "KB205", "KB206", "KB207", "KB208")


def broken(prepare, bases, *, model, quant, checkpointing, codes=None, levels=(Level.MUST, Level.SHOULD), **options):
    """Codes of the rules of these levels that the function itself breaks, or that could not be judged."""
    spec = CaseSpec(model=model, quant=quant, implementation="given", checkpointing=checkpointing, **options)
    key = (shallow, model, quant)
    if key not in bases:
        bases[key] = Loaded.from_source(shallow(model), spec)
    case = Case(spec, prepare, bases[key])
    results = [judge(rule, case) for rule in select() if codes is None or rule.code in codes]
    case.close()
    return {
        r.rule for r in results if r.status is Status.ERROR or (r.status is Status.FAIL and r.own and r.level in levels)
    }
