"""What a rule observes, and the result of one rule on one case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Self

from kbitcheck.core.errors import Raised


class Level(StrEnum):
    """How binding a requirement is: breaking a MUST is non-conformance, a SHOULD counts under ``--strict``, INFO is reported."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    INFO = "INFO"


class Status(StrEnum):
    """The outcome of one rule on one case."""

    PASS = "PASS"  # noqa: S105  (no password)
    FAIL = "FAIL"
    SKIP = "SKIP"
    ERROR = "ERROR"


class Party(StrEnum):
    """Who a deviation is attributed to."""

    IMPLEMENTATION = "implementation"
    MODEL = "model"
    STACK = "stack"


@dataclass(frozen=True, slots=True)
class Observation:
    """One thing that a rule examined: ``ok`` says whether the actual is as expected.

    ``where`` names a parameter, layer or fact. A deviation is attributed to ``party``; for any party but the
    implementation ``witness`` says what shows it. ``note`` is a fact to report once, whatever ``ok`` is. ``traits``
    describe what deviates (``columns``, ``dtype``, ``raised``), where the condition of a finding asks for them.
    """

    where: str
    expected: str
    actual: str
    _: KW_ONLY
    ok: bool
    party: Party = Party.IMPLEMENTATION
    witness: str = ""
    note: str = ""
    traits: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.ok and self.party is not Party.IMPLEMENTATION and not self.witness:
            raise ValueError(f"{self.where}: a deviation of the {self.party.value} needs a witness")

    @classmethod
    def either(cls, where: str, expected: str, otherwise: str, *, ok: bool) -> Self:
        """An observation whose actual is the expected where it is ok, and ``otherwise`` where it is not."""
        return cls(where, expected, expected if ok else otherwise, ok=ok)

    def of(self, raised: Raised | None) -> Observation:
        """The same observation, of an exception if there was one: no finding excuses it that does not name that."""
        return replace(self, traits={**(self.traits or {}), "raised": str(raised)}) if raised else self

    def attributed(self, party: Party, witness: str) -> Observation:
        """The same observation, attributed to another party."""
        return replace(self, party=party, witness=witness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One rule on one case. ``examined`` counts observations; ``failures`` holds those that are not ok.

    ``finding`` says which committed finding excuses the failure: it is reported and not counted. ``raised`` is the
    exception of the model or of its preparation that kept the rule from being judged. ``cut`` says which part of a large model
    facts about code paths ran on, if the rule read any: ``2 of 30 blocks``, or ``the whole model`` if no cut could be made.
    """

    rule: str
    case: str
    level: Level
    status: Status
    attributed_to: Party | None = None
    examined: int = 0
    reason: str = ""
    raised: str = ""
    failures: tuple[Observation, ...] = ()
    notes: tuple[str, ...] = ()
    finding: str = ""
    seconds: float = 0.0
    cut: str = ""

    @property
    def own(self) -> bool:
        """Whether any failure is the implementation's own."""
        return any(f.party is Party.IMPLEMENTATION for f in self.failures)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back.

        What is at its default is left out, and neighbouring failures that differ in their places alone share an entry:
        of hundreds of rules most passed, and a failure tends to be one of many.
        """
        return {**_not_default(self, "failures"), **({"failures": _shared(self.failures)} if self.failures else {})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        party = data.get("attributed_to")
        return cls(
            **{
                **data,
                "level": Level(data["level"]),
                "status": Status(data["status"]),
                "attributed_to": None if party is None else Party(party),
                "notes": tuple(data.get("notes", ())),
                "failures": tuple(one for entry in data.get("failures", ()) for one in _spread(entry)),
            }
        )


def _not_default(record: Result | Observation, *without: str) -> dict[str, Any]:
    """The fields that are not at their default."""
    values = ((f.name, getattr(record, f.name), f.default) for f in fields(record) if f.name not in without)
    return {name: list(value) if isinstance(value, tuple) else value for name, value, usual in values if value != usual}


def _shared(failures: Iterable[Observation]) -> list[dict[str, Any]]:
    """Entries with a list of places each: neighbours that differ in their places alone share one."""
    entries: list[dict[str, Any]] = []
    for failure in failures:
        rest = _not_default(failure, "where", *(() if failure.ok else ("ok",)))
        if entries and {k: v for k, v in entries[-1].items() if k != "where"} == rest:
            entries[-1]["where"].append(failure.where)
        else:
            entries.append({"where": [failure.where], **rest})
    return entries


def _spread(entry: Mapping[str, Any]) -> list[Observation]:
    """The observations of one entry."""
    places = [entry["where"]] if isinstance(entry["where"], str) else entry["where"]
    party = Party(entry.get("party", Party.IMPLEMENTATION))
    return [Observation(**{"ok": False, **entry, "where": where, "party": party}) for where in places]
