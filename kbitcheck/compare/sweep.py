"""What comes of a sweep: a row for each architecture, and the table of all rows. No torch here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from kbitcheck.core.report import exit_code
from kbitcheck.core.result import Level, Party, Result, Status

RETURNS, RUNS, LEARNS, CHANGED = "KB502", "KB210", "KB309", "KB105"
SUPPORTED, SWITCHED_ON, RECOMPUTES = "KB903", "KB401", "KB403"
# Where KB502 and KB210 report an exception of preparation and of a training step.
CALL, STEP = "prepare(model, ...)", "training step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that a row breaks: its first failure, how many there are, and whose they are."""

    rule: str
    level: Level
    party: Party
    where: str
    actual: str
    failures: int

    @classmethod
    def of(cls, result: Result) -> Self:
        """The worst failure of a result: the implementation's own before others'."""
        first = next((f for f in result.failures if f.party is result.attributed_to), result.failures[0])
        return cls(
            rule=result.rule,
            level=result.level,
            party=first.party,
            where=first.where,
            actual=first.actual,
            failures=len(result.failures),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "level": Level(data["level"]), "party": Party(data["party"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one architecture; None stands for what was not come to.

    ``quantized`` is the share of parameters (embeddings and head included) in quantized layers, ``growth`` bytes after
    preparing over bytes in half precision, ``inputs`` what it was fed. ``reason`` says why a row is not audited, or not
    wholly; ``seconds`` is time inside rules. ``applies`` is false where an option of the quantization has no object in the model.
    """

    architecture: str
    cls: str
    model: str
    loads: bool
    prepares: bool | None = None
    trains: bool | None = None
    checkpointing: str = ""
    quantized: float | None = None
    growth: float | None = None
    inputs: str = ""
    parameters: int | None = None
    adapters: int | None = None
    dead_adapters: int | None = None
    findings: tuple[Finding, ...] = ()
    errors: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    applies: bool = True

    @property
    def broken(self) -> bool:
        """Whether the model or the harness, and not what is under test, kept rules from being judged."""
        return not self.loads or bool(self.errors)

    @property
    def nonconforming(self) -> bool:
        """Whether the implementation itself breaks a MUST."""
        return any(f.level is Level.MUST and f.party is Party.IMPLEMENTATION for f in self.findings)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``asdict``, through JSON."""
        findings = tuple(Finding.from_json(f) for f in data["findings"])
        return cls(**{**data, "findings": findings, "errors": tuple(data["errors"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All rows of a sweep, sorted by architecture, with what was run and on what.

    ``left_out`` is the number of those selected that an option of the quantization does not apply to.
    """

    task: str
    selected: int
    options: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    complete: bool = True
    left_out: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``, through JSON."""
        rows = tuple(Row.from_json(row) for row in data["rows"])
        return cls(**{k: v for k, v in data.items() if k not in ("rows", "exit_code")}, rows=rows)

    @property
    def exit_code(self) -> int:
        """0 where every row was audited and the implementation broke no MUST; see ``kbitcheck.core.report.exit_code``."""
        return exit_code(
            interrupted=not self.complete,
            broken=any(row.nonconforming for row in self.rows),
            not_judged=any(row.broken for row in self.rows),
            nothing=not self.rows,
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {**asdict(self), "exit_code": self.exit_code}


def row(architecture: str, cls: str, model: str, results: Sequence[Result], facts: Mapping[str, Any]) -> Row:
    """The row of an architecture that was loaded."""
    by_rule = {r.rule: r for r in results}
    unprepared = any(f.where == CALL for f in _failures(by_rule, RETURNS))
    total = facts.get("parameters")
    prepared = facts.get("bytes_prepared")
    # Where preparation or a training step raised, rules about later steps have nothing to judge: one reason is enough.
    raised = next((r.raised for r in results if r.raised), "")
    if not unprepared:
        raised = next((f.actual for f in _failures(by_rule, RUNS) if f.where == STEP), raised)
    errors = [r for r in results if r.status is Status.ERROR and not (raised or unprepared)]
    return Row(
        architecture=architecture,
        cls=cls,
        model=model,
        loads=True,
        prepares=None if RETURNS not in by_rule else not unprepared,
        trains=False if raised and not unprepared else _trains(by_rule),
        checkpointing=_checkpointing(by_rule),
        quantized=facts["quantized"] / total if total else None,
        growth=prepared / (2 * total) if prepared and total else None,
        inputs=facts.get("inputs", ""),
        parameters=total,
        adapters=facts.get("adapters"),
        dead_adapters=facts.get("dead_adapters"),
        findings=tuple(Finding.of(r) for r in results if r.status is Status.FAIL),
        errors=tuple(f"{r.rule}: {r.reason}" for r in errors),
        reason=raised or next((r.reason for r in errors), ""),
        seconds=round(sum(r.seconds for r in results), 2),
    )


def _failures(by_rule: Mapping[str, Result], rule: str) -> Iterable[Any]:
    return by_rule[rule].failures if rule in by_rule else ()


def _kept(by_rule: Mapping[str, Result], rule: str) -> bool | None:
    """Whether a rule holds; None where it was not judged."""
    result = by_rule.get(rule)
    return None if result is None or result.status in (Status.SKIP, Status.ERROR) else result.status is Status.PASS


def _trains(by_rule: Mapping[str, Result]) -> bool | None:
    """Whether the loss falls; where the float twin's does not either, whether every live adapter is changed."""
    learns = by_rule.get(LEARNS)
    return _kept(by_rule, CHANGED if learns is not None and learns.status is Status.SKIP else LEARNS)


def _checkpointing(by_rule: Mapping[str, Result]) -> str:
    if _kept(by_rule, SUPPORTED) is False:
        return "unsupported"
    judged = [kept for rule in (SWITCHED_ON, RECOMPUTES) if (kept := _kept(by_rule, rule)) is not None]
    return "" if not judged else "works" if all(judged) else "broken"
