"""Run every fault on the machine at hand and show that its rule catches it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kbitcheck.backends.quantization import Quantization
from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.case import Case
from kbitcheck.observe.loaded import Base
from kbitcheck.sabotage.fault import Fault, faults


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a rule caught a fault. ``caught`` is None where this machine cannot tell, with the reason in ``told``.

    ``kills`` are all the rules that the fault broke, where all were asked.
    """

    code: str
    fault: str
    case: str
    caught: bool | None
    told: str
    level: str = "implementation"
    alone: bool = False
    kills: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return asdict(self)


def run(codes: Sequence[str] = (), *, matrix: bool = False) -> Iterator[Verdict]:
    """Try every fault of the rules whose codes start with any of ``codes`` (all by default), ``matrix``: by all rules."""
    bases: dict[tuple[str, str, str], Base] = {}
    for fault in faults():
        if not codes or fault.code.startswith(tuple(c.upper() for c in codes)):
            yield try_fault(fault, bases, matrix=matrix)


def case_of(fault: Fault, bases: dict[tuple[str, str, str], Base]) -> Case:
    """The fault's case, with the broken implementation or the spoiled base."""
    spec = CaseSpec(
        model=fault.model,
        quant=fault.quant,
        implementation=fault.name,
        checkpointing=fault.checkpointing,  # type: ignore[arg-type]
        device="cuda" if fault.accelerator else "cpu",
    )
    key = (fault.model, fault.quant, spec.device)
    if fault.spoil is not None:
        base = Base(resolve(fault.model), Quantization.parse(fault.quant), spec, spoil=fault.spoil)
    else:
        if key not in bases:
            bases[key] = Base(resolve(fault.model), Quantization.parse(fault.quant), spec)
        base = bases[key]
    return Case(spec, fault.prepare, base)


def try_fault(fault: Fault, bases: dict[tuple[str, str, str], Base], *, matrix: bool = False) -> Verdict:
    """Judge one fault by its own rule, with ``matrix`` by all others too."""
    if fault.accelerator and not torch.cuda.is_available():
        return Verdict(fault.code, fault.name, "", None, "needs an accelerator", fault.level, fault.alone)
    case = case_of(fault, bases)
    result = judge(rules()[fault.code], case)
    told = result.reason or (
        f"{result.failures[0].where}: {result.failures[0].actual}" if result.failures else "passed"
    )
    # A fault that is blamed on the stack or the model is not counted against whoever made it: it got away.
    caught, kills = result.status is Status.FAIL and (result.own or fault.spoil is not None), None
    if matrix:
        others = (judge(rule, case) for rule in rules().values() if rule.code != fault.code)
        broken = {r.rule for r in others if r.status is Status.FAIL and r.own} | ({fault.code} if caught else set())
        kills = tuple(sorted(broken))
        caught = caught and (not fault.alone or kills == (fault.code,))
    case.close()
    return Verdict(fault.code, fault.name, case.case, caught, told, fault.level, fault.alone, kills)
