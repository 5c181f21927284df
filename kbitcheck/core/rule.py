"""Rules and their registry, and the judgement of one rule on one case."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import getdoc
from typing import TYPE_CHECKING

from kbitcheck.core.errors import NotApplicable, Unavailable, UsageError, cause
from kbitcheck.core.result import Level, Observation, Party, Result, Status

if TYPE_CHECKING:
    from kbitcheck.core.facts import Facts


log = logging.getLogger("kbitcheck")


CODE = re.compile(r"KB\d{3}")


Check = Callable[["Facts"], Iterable[Observation]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A requirement of the specification and the pure function that judges facts by it.

    The first paragraph of the function's docstring is the requirement; the sections headed ``Why``, ``Symptom``, ``Fix``
    and ``Sources`` are the rest of its page.
    """

    code: str
    name: str
    level: Level
    check: Check
    level_of: Callable[[Facts], Level] | None = None

    @property
    def requirement(self) -> str:
        """The first paragraph of the page, on one line."""
        return " ".join(self._page[""].split())

    def section(self, heading: str) -> str:
        """The text under ``heading`` on one line, or an empty string."""
        return " ".join(self._page.get(heading, "").split())

    @property
    def _page(self) -> dict[str, str]:
        page: dict[str, str] = {"": ""}
        heading = ""
        for line in (getdoc(self.check) or "").splitlines():
            found = re.fullmatch(r"(Why|Symptom|Fix|Sources): *(.*)", line)
            if found:
                heading, line = found[1], found[2]
                page[heading] = ""
            page[heading] += line.replace("``", "`") + "\n"
        return page

    @property
    def family(self) -> str:
        """The module the rule lives in: freezing, precision, gradients, checkpointing, contract, cost or audit."""
        return self.check.__module__.rpartition(".")[2]


_registry: dict[str, Rule] = {}


def rule(
    code: str, name: str, level: Level, *, level_of: Callable[[Facts], Level] | None = None
) -> Callable[[Check], Check]:
    """Register a check under its code. ``level_of`` overrides the level by facts (a MUST only when reentrant, say)."""

    def register(check: Check) -> Check:
        if not CODE.fullmatch(code) or code in _registry:
            raise ValueError(f"{code!r} is not a fresh rule code")
        _registry[code] = Rule(code=code, name=name, level=level, check=check, level_of=level_of)
        return check

    return register


def rules() -> dict[str, Rule]:
    """Every registered rule by code, sorted."""
    import kbitcheck.judge  # noqa: F401  (registers them)

    return dict(sorted(_registry.items()))


def select(codes: Sequence[str] = (), ignore: Mapping[str, str] | None = None) -> list[Rule]:
    """The rules whose codes start with any of ``codes`` (all by default), less the ignored prefixes.

    Raises:
        UsageError: a code or prefix that matches no rule.
    """
    known = rules()
    ignored = ignore or {}
    for prefix in (*codes, *ignored):
        if not any(code.startswith(prefix.upper()) for code in known):
            raise UsageError(f"no rule matches {prefix!r}; see `kbitcheck rules`")
    return [
        found
        for code, found in known.items()
        if (not codes or code.startswith(tuple(c.upper() for c in codes)))
        and not (ignored and code.startswith(tuple(c.upper() for c in ignored)))
    ]


def judge(subject: Rule, facts: Facts, *, on_error: Callable[[Exception], None] = lambda error: None) -> Result:
    """The result of one rule on one case. What the rule raises becomes a SKIP or an ERROR, wrong usage passes through.

    No observation at all is an ERROR: there is no way to pass by accident. ``on_error`` gets an exception that made the
    result an ERROR.
    """
    start = time.perf_counter()
    level, reason, examined = subject.level, "", 0
    failures: list[Observation] = []
    notes: dict[str, None] = {}
    try:
        if subject.level_of is not None:
            level = subject.level_of(facts)
        for seen in subject.check(facts):
            examined += 1
            if seen.note:
                notes[seen.note] = None
            if not seen.ok:
                failures.append(seen)
        status = Status.FAIL if failures else Status.PASS
        if not examined:
            status, reason = Status.ERROR, "vacuous: the rule examined nothing"
    except (NotApplicable, Unavailable) as gap:
        if isinstance(gap, Unavailable) and gap.failed:
            status, reason = Status.ERROR, str(gap)
        else:
            # What was seen broken before stays broken.
            status, reason = (Status.FAIL, "") if failures else (Status.SKIP, str(gap))
    except UsageError:
        raise
    except Exception as error:
        log.debug("%s on %s", subject.code, facts.case, exc_info=True)
        status, reason = Status.ERROR, cause(error)
        on_error(error)
    parties = {f.party for f in failures}
    blamed = next((p for p in Party if p in parties), None)
    return Result(
        rule=subject.code,
        case=facts.case,
        level=level,
        status=status,
        attributed_to=blamed,
        examined=examined,
        reason=reason,
        failures=tuple(failures),
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 6),
    )
