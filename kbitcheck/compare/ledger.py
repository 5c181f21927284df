"""The ledger: the results that a maintainer has accepted, as a TOML file to commit and review.

Every rule under ``judged`` was judged on every case there; a cell that is neither skipped nor accepted passed.
"""

import contextlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.compositions import COMPOSITIONS
from kbitcheck.core.errors import UsageError
from kbitcheck.core.result import Party, Status
from kbitcheck.core.rule import CODE, rules

SCHEMA = 1
ENVIRONMENT = ("python", "torch", "transformers", "bitsandbytes", "peft", "device")
# Options that change results without showing in a case's id; a ledger has those that are not at their default.
OPTIONS = ("profile", "adapters", "freezes", "targets", "rank", "batch", "seq_len", "seed", "dtype", "random_weights")
KEYS = ("schema", "implementation", "environment", "options", "judged", "skipped", "accepted")
FIELDS = ("rule", "status", "attributed_to", "reason", "issue", "expires", "cases")
OLD_NAMES = {"whose": "attributed_to"}  # of 0.1.0
HEAD = re.compile(r"^[ \t]*\[\[ *accepted *\]\]", re.MULTILINE)

Cell = tuple[str, str]  # rule and case


def judges(rule: str, case: str) -> bool:
    """Whether a rule is about what a case is of: a composition, which ends the case's id, or the model alone."""
    about = "composition" if case.rpartition("-")[2] in COMPOSITIONS else "model"
    return rule not in rules() or rules()[rule].about == about


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Cells that are accepted though they did not pass, and why. ``line`` is where the entry starts (from 1).

    ``attributed_to`` is the party of a failure (None for an ERROR); the entry holds through the day of ``expires``.
    """

    rule: str
    status: Status
    cases: tuple[str, ...]
    reason: str = ""
    attributed_to: Party | None = None
    issue: str = ""
    expires: date | None = None
    line: int = 1


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A ledger as read. ``skipped`` maps cases to the rules that did not apply."""

    name: str
    implementation: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    accepted: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The ledger in a file.

        Raises:
            UsageError: there is no such file, or it is no ledger; the message says where.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(f"no ledger {path}; `kbitcheck gate IMPL --ledger {path} --accept` makes it") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the ledger {path}: {getattr(error, 'strerror', error)}") from None
        return cls.parse(text, name=str(path))

    @classmethod
    def parse(cls, text: str, *, name: str = "ledger") -> Self:
        """The ledger in a text.

        Raises:
            UsageError: it is no ledger; the message says where.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            message, _, at = str(error).partition(" (at ")
            position = re.match(r"line (\d+)", at)
            line = int(position[1]) if position else text.count("\n") + 1
            raise UsageError(f"{name}:{line}: not TOML: {message}") from None
        return cls(name=name, **_Reader(name, text).read(data))

    @cached_property
    def expected(self) -> dict[Cell, Status]:
        """The accepted status of each cell."""
        cells = {(rule, case): Status.PASS for case in self.cases for rule in self.rules if judges(rule, case)}
        cells |= {(rule, case): Status.SKIP for case, rules in self.skipped.items() for rule in rules}
        return cells | {(e.rule, case): e.status for e in self.accepted for case in e.cases}

    def part(self, cell: Cell) -> Self:
        """What it says about one cell."""
        rule, case = cell
        listed = cell in self.expected
        entries = (e for e in self.accepted if e.rule == rule and case in e.cases)
        return replace(
            self,
            rules=(rule,) if listed else (),
            cases=(case,) if listed else (),
            skipped={case: (rule,)} if rule in self.skipped.get(case, ()) else {},
            accepted=tuple(replace(entry, cases=(case,)) for entry in entries),
        )


class _Reader:
    """Checks the parts of a ledger; every complaint names the line."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._heads = [text.count("\n", 0, m.start()) + 1 for m in HEAD.finditer(text)]

    def read(self, data: Mapping[str, Any]) -> dict[str, Any]:
        for key in data:
            self._check(key in KEYS, key, f"unknown key {key!r}; use {', '.join(KEYS)}")
        hint = f"not a kbitcheck ledger of schema {SCHEMA}; `kbitcheck gate IMPL --ledger FILE --accept` writes one"
        self._check(data.get("schema") == SCHEMA, "schema", hint)
        tables = {key: data.get(key, {}) for key in ("environment", "options", "judged", "skipped")}
        for key, table in tables.items():
            self._check(isinstance(table, dict), key, f"{key} must be a table")
        judged, skipped = tables.pop("judged"), tables.pop("skipped")
        return {
            **tables,
            "implementation": self._str(data, "implementation", "implementation"),
            "rules": self._strings(judged.get("rules", []), "rules"),
            "cases": self._strings(judged.get("cases", []), "cases"),
            "skipped": {case: self._strings(rules, case) for case, rules in skipped.items()},
            "accepted": self._entries(data.get("accepted", [])),
        }

    def _entries(self, tables: Any) -> tuple[Entry, ...]:
        fits = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
        self._check(fits, "accepted", "accepted must be tables headed [[accepted]]")
        lines = self._heads if len(self._heads) == len(tables) else [1] * len(tables)
        entries = tuple(self._entry(table, line) for table, line in zip(tables, lines, strict=True))
        seen: dict[Cell, int] = {}
        for entry in entries:
            for case in entry.cases:
                first = seen.setdefault((entry.rule, case), entry.line)
                self._check(first == entry.line, entry.line, f"{entry.rule} on {case} stands in line {first} already")
        return entries

    def _entry(self, data: Mapping[str, Any], line: int) -> Entry:
        data = {OLD_NAMES.get(key, key): value for key, value in data.items()}
        for key in data:
            self._check(key in FIELDS, line, f"unknown field {key!r}; use {', '.join(FIELDS)}")
        rule, status, party = (data.get(key) for key in ("rule", "status", "attributed_to"))
        is_code = isinstance(rule, str) and CODE.fullmatch(rule)
        self._check(is_code, line, f"rule must be a code such as KB101: {rule!r}")
        self._check(status in ("FAIL", "ERROR"), line, f"status must be FAIL or ERROR, not {status!r}")
        self._check(data.get("cases"), line, "an entry needs its cases")
        is_party = party is None or party in tuple(Party)
        self._check(is_party, line, f"attributed_to must be {', '.join(Party)}, not {party!r}")
        return Entry(
            rule=str(rule),
            status=Status(str(status)),
            cases=self._strings(data["cases"], line),
            reason=self._str(data, "reason", line).strip(),
            attributed_to=None if party is None else Party(party),
            issue=self._str(data, "issue", line),
            expires=self._date(data.get("expires"), line),
            line=line,
        )

    def _date(self, value: Any, line: int) -> date | None:
        if isinstance(value, str) and value:
            with contextlib.suppress(ValueError):
                value = date.fromisoformat(value)
        fits = value in (None, "") or type(value) is date  # a datetime is a date too
        self._check(fits, line, "expires must be a date such as 2030-12-31")
        return value or None

    def _strings(self, value: Any, where: str | int) -> tuple[str, ...]:
        fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
        self._check(fits, where, "must be a list of strings")
        return tuple(value)

    def _str(self, data: Mapping[str, Any], key: str, where: str | int) -> str:
        value = data.get(key, "")
        self._check(isinstance(value, str), where, f"must be a string, not {value!r}")
        return str(value)

    def _check(self, fits: object, where: str | int, complaint: str) -> None:
        """``where`` is a line, or a key to find the line of."""
        if fits:
            return
        if isinstance(where, str):
            place = re.search(rf"^[ \t]*\[*\"?{re.escape(where)}\"?\b", self._text, re.MULTILINE)
            where = self._text.count("\n", 0, place.start()) + 1 if place else 1
        raise UsageError(f"{self._name}:{where}: {complaint}")


def options_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a case (``CaseSpec.as_json``) that a ledger records: those that are not at their default."""
    defaults = CaseSpec(model="", quant="", implementation="").as_json()
    return {name: spec[name] for name in OPTIONS if name in spec and spec[name] != defaults[name]}
