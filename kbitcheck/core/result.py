"""What a rule observes, and the result of one rule on one case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self


class Level(StrEnum):
    """How binding a requirement is: breaking a MUST is non-conformance, a SHOULD counts under ``--strict``, INFO is told."""

    MUST = "MUST"
    SHOULD = "SHOULD"
    INFO = "INFO"


class Status(StrEnum):
    """What came of one rule on one case."""

    PASS = "PASS"  # noqa: S105  (no password)
    FAIL = "FAIL"
    SKIP = "SKIP"
    ERROR = "ERROR"


class Party(StrEnum):
    """Who a deviation belongs to."""

    IMPLEMENTATION = "implementation"
    MODEL = "model"
    STACK = "stack"


@dataclass(frozen=True, slots=True)
class Observation:
    """One thing a rule examined.

    ``where`` names a parameter, layer or fact; ``party`` says whose a deviation is, and ``witness`` what shows that it
    is not the implementation's (required for any other party). ``note`` is a fact worth telling once, whatever ``ok`` is.
    """

    where: str
    ok: bool
    expected: str
    actual: str
    party: Party = Party.IMPLEMENTATION
    witness: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.ok and self.party is not Party.IMPLEMENTATION and not self.witness:
            raise ValueError(f"{self.where}: a deviation of the {self.party.value} needs a witness")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One rule on one case. ``examined`` counts observations; ``failures`` holds those that are not ok.

    ``finding`` says which committed finding excuses the failure: it is reported and not counted. ``raised`` is the
    exception of the model or of its preparation that kept the rule from being judged.
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

    @property
    def own(self) -> bool:
        """Whether any failure is the implementation's own."""
        return any(f.party is Party.IMPLEMENTATION for f in self.failures)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back.

        What is at its default is left out, and neighbouring failures that differ in their places alone share an entry:
        of hundreds of rules most passed, and a failure tends to be one of many.
        """
        return {**_told(self, "failures"), **({"failures": _shared(self.failures)} if self.failures else {})}

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
                "failures": tuple(seen for entry in data.get("failures", ()) for seen in _spread(entry)),
            }
        )


def _told(thing: Result | Observation, *without: str) -> dict[str, Any]:
    """The fields that are not at their default."""
    found = ((f.name, getattr(thing, f.name), f.default) for f in fields(thing) if f.name not in without)
    return {name: list(value) if isinstance(value, tuple) else value for name, value, usual in found if value != usual}


def _shared(failures: Iterable[Observation]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for seen in failures:
        told = _told(seen, "where", *(() if seen.ok else ("ok",)))
        if entries and {k: v for k, v in entries[-1].items() if k != "where"} == told:
            entries[-1]["where"].append(seen.where)
        else:
            entries.append({"where": [seen.where], **told})
    return entries


def _spread(entry: Mapping[str, Any]) -> Iterator[Observation]:
    places = [entry["where"]] if isinstance(entry["where"], str) else entry["where"]
    party = Party(entry.get("party", Party.IMPLEMENTATION))
    for where in places:
        yield Observation(**{"ok": False, **entry, "where": where, "party": party})
