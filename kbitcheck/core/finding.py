"""A finding: a known deviation of the stack or of a model, with the condition under which it shows and its script."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.result import Observation, Party


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """When a finding shows; an empty field sets no condition.

    ``schemes`` are of quantization (``nf4``), ``devices`` kinds (``cpu``), ``where`` is a pattern that is searched in the
    place of the observation, ``adapters`` one that is searched in the text of the case's adapters. ``raised`` is a pattern of the
    exception that is excused, by type, message and file; without it, none is. It, ``dtypes`` and ``columns_not_multiple_of`` (in a
    layer's weight) read the observation's traits: one without them does not meet the condition.
    """

    schemes: tuple[str, ...] = ()
    checkpointing: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    cpu_capabilities: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    columns_not_multiple_of: int = 0
    where: str = ""
    adapters: str = ""
    raised: str = ""

    def holds(self, observation: Observation, spec: CaseSpec, environment: Mapping[str, Any]) -> bool:
        """Whether an observation of a case meets every condition."""
        traits = observation.traits or {}
        choices = (
            (self.schemes, spec.quant.partition(",")[0]),
            (self.checkpointing, spec.checkpointing),
            (self.devices, str(environment.get("device", "")).partition(":")[0]),
            (self.cpu_capabilities, environment.get("cpu_capability")),
            (self.dtypes, traits.get("dtype")),
        )
        if any(choice and value not in choice for choice, value in choices):
            return False
        if (block := self.columns_not_multiple_of) and not traits.get("columns", 0) % block:
            return False
        if bool(raised := str(traits.get("raised", ""))) != bool(self.raised):
            return False
        places = ((self.raised, raised), (self.where, observation.where), (self.adapters, spec.adapters))
        return all(re.search(pattern, text) for pattern, text in places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a rule fails by the fault of ``party``, whoever prepares the model.

    ``script`` shows it without kbitcheck, ``thread`` is where it is discussed upstream. A finding excuses the reference;
    one that does not decide ``kbitcheck model`` excuses every implementation. It is reported all the same.
    """

    rule: str
    party: Party
    reason: str
    script: str
    thread: str = ""
    decides_model: bool = True
    condition: Condition = field(default_factory=Condition)

    @property
    def line(self) -> str:
        """The finding on one line."""
        thread = f", {self.thread}" if self.thread else ""
        return f"{self.reason} ({self.script}{thread})"

    def explains(self, rule: str, observation: Observation, spec: CaseSpec, environment: Mapping[str, Any]) -> bool:
        """Whether this is the finding behind a failed observation."""
        same = (self.rule, self.party) == (rule, observation.party)
        return same and self.condition.holds(observation, spec, environment)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """The finding of a ``[[finding]]`` table of TOML."""
        values: Mapping[str, Any] = table.get("condition", {})
        condition: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**table, "party": Party(table["party"]), "condition": Condition(**condition)})


def read_findings(path: Path) -> tuple[Finding, ...]:
    """The findings of a TOML file."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["finding"]
    return tuple(map(Finding.from_table, tables))
