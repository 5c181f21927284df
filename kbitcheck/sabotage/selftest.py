"""Run every fault on the machine at hand and show that its rule catches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kbitcheck.case import Base, Case
from kbitcheck.core import Status, judge, rules
from kbitcheck.models import resolve
from kbitcheck.quantization import Quantization
from kbitcheck.sabotage.fault import Fault, faults
from kbitcheck.suite import CaseSpec


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a rule caught a fault. ``caught`` is None where this machine cannot tell, with the reason in ``told``."""

    code: str
    fault: str
    case: str
    caught: bool | None
    told: str

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"code": self.code, "fault": self.fault, "case": self.case, "caught": self.caught, "told": self.told}


def run(codes: Sequence[str] = ()) -> Iterator[Verdict]:
    """Try every fault of the rules whose codes start with any of ``codes`` (all by default)."""
    bases: dict[tuple[str, str], Base] = {}
    for fault in faults():
        if not codes or fault.code.startswith(tuple(c.upper() for c in codes)):
            yield try_fault(fault, bases)


def case_of(fault: Fault, bases: dict[tuple[str, str], Base]) -> Case:
    """The fault's case, with the broken implementation or the spoiled base."""
    spec = CaseSpec(model=fault.model, quant=fault.quant, implementation=fault.name, checkpointing=fault.checkpointing)  # type: ignore[arg-type]
    key = (fault.model, fault.quant)
    if fault.spoil is not None:
        base = Base(resolve(fault.model), Quantization.parse(fault.quant), spec, spoil=fault.spoil)
    else:
        if key not in bases:
            bases[key] = Base(resolve(fault.model), Quantization.parse(fault.quant), spec)
        base = bases[key]
    return Case(spec, fault.prepare, base)


def try_fault(fault: Fault, bases: dict[tuple[str, str], Base]) -> Verdict:
    """Judge one fault by its own rule."""
    if fault.accelerator and not torch.cuda.is_available():
        return Verdict(fault.code, fault.name, "", None, "needs an accelerator")
    case = case_of(fault, bases)
    result = judge(rules()[fault.code], case)
    told = result.reason or (
        f"{result.failures[0].where}: {result.failures[0].actual}" if result.failures else "passed"
    )
    return Verdict(fault.code, fault.name, case.case, result.status is Status.FAIL, told)
