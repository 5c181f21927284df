"""What judging a case gave, as it travels from the process that judged it to the one that reports."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import Loaded
from kbitcheck.core.result import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The results, figures and environment of one case. ``usage`` says in one line why it could not be run at all."""

    spec: CaseSpec
    results: tuple[Result, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    loaded: Loaded = field(default_factory=Loaded)
    usage: str = ""

    def of(self, rule: str) -> Self:
        """The outcome with the result of this rule alone."""
        return replace(self, results=tuple(result for result in self.results if result.rule == rule))

    def to_text(self) -> str:
        """JSON; ``from_text`` reads it back."""
        return json.dumps(
            {
                "spec": self.spec.as_json(),
                "results": [result.as_json() for result in self.results],
                "facts": self.facts,
                "implementation": self.loaded.implementation,
                "environment": self.loaded.environment,
                "usage": self.usage,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Inverse of ``to_text``."""
        data = json.loads(text)
        return cls(
            spec=CaseSpec.from_json(data["spec"]),
            results=tuple(map(Result.from_json, data["results"])),
            facts=data["facts"],
            loaded=Loaded(implementation=data["implementation"], environment=data["environment"]),
            usage=data["usage"],
        )
