"""The conformance matrix: several implementations on the same cases, a row each, a column for each rule."""

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from kbitcheck.compare.gate import evidence
from kbitcheck.core.errors import UsageError
from kbitcheck.core.report import Report, exit_code
from kbitcheck.core.result import Level, Result, Status


class Mark(StrEnum):
    """The outcome of a rule over all cases of an implementation: the worst of them, which is the last in this order."""

    SKIPPED = "skipped"
    KEPT = "kept"
    SHOULD = "broken SHOULD"
    ERROR = "error"
    MUST = "broken MUST"


@dataclass(frozen=True, slots=True)
class Subject:
    """The name of a row, and its implementation or why it is left out."""

    name: str
    implementation: str
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The results of an implementation: ``marks`` by rule, or ``error`` in one line where it could not be run at all.

    ``versions`` are those of the stack it ran on; ``broken`` is, by rule, the evidence of each case that has the mark.
    """

    subject: Subject
    marks: Mapping[str, Mark]
    broken: Mapping[str, Mapping[str, str]]
    versions: Mapping[str, str]
    error: str = ""
    complete: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``asdict``, through JSON."""
        marks = {code: Mark(mark) for code, mark in data["marks"].items()}
        return cls(**{**data, "subject": Subject(**data["subject"]), "marks": marks})


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """The whole table; ``cases`` are the ids that every row was judged on."""

    tool: str
    command: str
    cases: Sequence[str]
    rows: Sequence[Row]

    @property
    def rules(self) -> list[str]:
        """The columns: every rule that was judged, in the order of their codes."""
        return sorted({code for row in self.rows for code in row.marks})

    @property
    def exit_code(self) -> int:
        """2 where the run was cut short, 1 where a MUST is broken, 3 where a row could not be run or judged, else 0."""
        marks = {mark for row in self.rows for mark in row.marks.values()}
        return exit_code(
            interrupted=not all(row.complete for row in self.rows),
            broken=Mark.MUST in marks,
            not_judged=Mark.ERROR in marks or any(row.error and not row.subject.left_out for row in self.rows),
            nothing=not marks - {Mark.SKIPPED},
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"schema": 1, **asdict(self), "rules": self.rules, "exit_code": self.exit_code}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        return cls(
            **{k: data[k] for k in ("tool", "command", "cases")}, rows=[Row.from_json(row) for row in data["rows"]]
        )


def subjects(names: Iterable[str], validate: Callable[[str], None]) -> list[Subject]:
    """The subjects that a command line names; a name that ends in ``.toml`` is a file that lists them.

    A file has ``[[subject]]`` tables with an ``implementation`` and, to call it otherwise, a ``name``; a subject that is
    only mentioned has a ``name`` and ``left_out``, the reason why. ``validate`` raises where an implementation cannot
    be one.

    Raises:
        UsageError: a file or an implementation is wrong.
    """
    listed = [one for name in names for one in (_read(name) if name.endswith(".toml") else [Subject(name, name)])]
    for subject in listed:
        if not subject.left_out:
            validate(subject.implementation)
    if not listed:
        raise UsageError("a matrix wants at least one implementation, or a TOML file that lists them")
    if len({subject.name for subject in listed}) < len(listed):
        raise UsageError("a matrix wants each subject once: give one of the same name another")
    return listed


def row(subject: Subject, judge: Callable[[Subject], Report]) -> Row:
    """The row of a subject, from the report that ``judge`` returns; an error where it raises ``UsageError``."""
    if subject.left_out:
        return Row(subject, {}, {}, {}, error=f"left out: {subject.left_out}")
    try:
        report = judge(subject)
    except UsageError as error:
        return Row(subject, {}, {}, {}, error=str(error))
    by_rule: dict[str, list[Result]] = {}
    for result in report.results:
        by_rule.setdefault(result.rule, []).append(result)
    marks = {code: max(map(_mark, results), key=list(Mark).index) for code, results in by_rule.items()}
    broken = {
        code: {r.case: evidence(r) for r in results if _mark(r) is marks[code]}
        for code, results in by_rule.items()
        if marks[code] not in (Mark.KEPT, Mark.SKIPPED)
    }
    return Row(subject, marks, broken, dict(report.environment), complete=report.complete)


def _mark(result: Result) -> Mark:
    """The mark of a result. Only the implementation's failures count: the stack's and the models' are in every row."""
    if result.status is Status.ERROR:
        return Mark.ERROR
    if result.status is Status.SKIP:
        return Mark.SKIPPED
    if result.status is Status.PASS or not result.own or result.finding:
        return Mark.KEPT
    return {Level.MUST: Mark.MUST, Level.SHOULD: Mark.SHOULD}.get(result.level, Mark.KEPT)


def _read(name: str) -> list[Subject]:
    try:
        data = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} is not TOML: {str(error).splitlines()[0]}") from error
    tables = data.pop("subject", [])
    if data or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name} wants [[subject]] tables and nothing else")
    return [_subject(table, name) for table in tables]


def _subject(table: Mapping[str, Any], name: str) -> Subject:
    if set(table) - {"name", "implementation", "left_out"} or not all(isinstance(v, str) for v in table.values()):
        raise UsageError(f"{name}: a [[subject]] has an implementation and a name, both texts")
    implementation, why = table.get("implementation", ""), table.get("left_out", "")
    if bool(implementation) == bool(why) or not (implementation or table.get("name")):
        raise UsageError(f"{name}: a [[subject]] has an implementation, or a name and why it is left_out")
    return Subject(table.get("name") or implementation, implementation, why)
