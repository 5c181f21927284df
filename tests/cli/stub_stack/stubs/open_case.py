"""Cases whose only fact is what the subject returned."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from kbitcheck.core.cases import CaseSpec, Implementation
from kbitcheck.core.errors import UsageError


class Case:
    budget = None
    computed = None
    in_a_row = ()

    def __init__(self, spec: CaseSpec, implementation: Implementation) -> None:
        self.spec = spec
        self.case = spec.id
        self.function = implementation.function
        self.base = SimpleNamespace(nbytes=2_000)

    @cached_property
    def returned(self) -> Any:
        return self.function(object())

    def cut_behind(self, reads: object) -> str:
        return ""

    def summary(self) -> dict[str, Any]:
        return {
            "model_class": "Stub",
            "parameters": 123_456,
            "quantized": 61_728,
            "bytes_loaded": 2_000,
            "bytes_prepared": 3_000_000,
        }

    def close(self) -> None:
        pass


def open_case(spec: CaseSpec, implementation: Implementation, *, rules: object = (), seconds: float = 0) -> Case:
    if spec.model.rpartition("/")[2] == "late":
        raise UsageError("late: the weights are truncated")
    if "experts=parametrize" in spec.quant and spec.model.rpartition("/")[2] != "opt":
        raise UsageError("experts=parametrize: Stub has no stacked experts")
    return Case(spec, implementation)


def open_live(
    model: Any,
    training: object,
    *,
    implementation: Implementation,
    restore: Callable[[], None],
    no_step: str,
    **options: Any,
) -> Case:
    spec = CaseSpec(model=type(model).__name__, quant="int8", implementation=implementation.name, **options)
    return Case(spec, implementation)
