"""Rules and their registry, and the judgement of one rule on one case."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import getdoc
from typing import TYPE_CHECKING, Literal

from kbitcheck.core.errors import NotApplicable, Unavailable, UsageError, cause
from kbitcheck.core.reads import facts_read
from kbitcheck.core.result import Level, Observation, Party, Result, Status
from kbitcheck.core.suggest import did_you_mean

if TYPE_CHECKING:
    from kbitcheck.core.facts import Facts


log = logging.getLogger("kbitcheck")
CODE = re.compile(r"KB\d{3}")
Check = Callable[["Facts"], Iterable[Observation]]
About = Literal["model", "adapter", "composition"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A requirement of the specification and the pure function that judges facts by it.

    The first paragraph of the function's docstring is the requirement; the sections headed ``Why``, ``Symptom``, ``Fix``
    and ``Sources`` are the rest of its page. ``about`` is what the rule judges: a model that trains, an
    adapter that was saved, or a model in several processes, in a trainer, compiled, copied or resumed.
    """

    code: str
    name: str
    level: Level
    check: Check
    about: About = "model"

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
            if start := re.fullmatch(r"(Why|Symptom|Fix|Sources): *(.*)", line):
                heading, line = start[1], start[2]
                page[heading] = ""
            page[heading] += line.replace("``", "`") + "\n"
        return page

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the facts that the rule may read, in order, but for those that explain a failure."""
        return facts_read(self.check)

    @property
    def family(self) -> str:
        """The module the rule lives in: freezing, precision, recipe, gradients, checkpointing, contract, cost or audit."""
        return self.check.__module__.rpartition(".")[2]


class Registry(Mapping[str, Rule]):
    """Rules by code, sorted. ``module`` is imported when a rule is first looked up: importing it registers the rules."""

    def __init__(self) -> None:
        self._rules: dict[str, Rule] = {}
        self._module = ""

    def load_on_demand(self, module: str) -> None:
        """Name the module whose import registers the rules."""
        self._module = module

    def add(self, new: Rule) -> None:
        """Register a rule; a ``ValueError`` where its code is malformed, or another rule's."""
        if not CODE.fullmatch(new.code) or new.code in self._rules:
            raise ValueError(f"{new.code!r} is not a fresh rule code")
        self._rules[new.code] = new

    def select(
        self,
        codes: Sequence[str] = (),
        ignore: Mapping[str, str] | None = None,
        *,
        about: About | Collection[About] | None = "model",
    ) -> list[Rule]:
        """The rules whose codes start with any of ``codes`` (all by default), less the ignored prefixes.

        ``about`` None means rules about anything.
        """
        ignored = ignore or {}
        topics = (about,) if isinstance(about, str) else about
        ours = [code for code, rule in self.items() if topics is None or rule.about in topics]
        for prefix in (*codes, *ignored):
            if not any(code.startswith(prefix.upper()) for code in ours):
                if topics is not None and any(code.startswith(prefix.upper()) for code in self):
                    raise UsageError(f"{prefix} is not about {' or '.join(map(_a, topics))}; see `kbitcheck rules`")
                family = [code for code in ours if code.startswith(prefix.upper()[:3])]
                hint = did_you_mean(prefix.upper(), family or ours)
                hint = hint or did_you_mean(prefix.lower(), map(self.title, ours))
                raise UsageError(f"no rule matches {prefix!r}{hint}; see `kbitcheck rules`")
        wanted, unwanted = (tuple(prefix.upper() for prefix in prefixes) for prefixes in (codes or [""], ignored))
        return [self[code] for code in ours if code.startswith(wanted) and not code.startswith(unwanted)]

    def title(self, code: str) -> str:
        """Code and name of a rule, ``KB101 base-frozen``; the code alone of a rule that is not registered."""
        return f"{code} {self[code].name}" if code in self else code

    def __getitem__(self, code: str) -> Rule:
        return self._loaded()[code]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Rule]:
        if module := self._module:
            self._module = ""
            import_module(module)
        return self._rules


REGISTRY = Registry()
select = REGISTRY.select


def _a(about: About) -> str:
    return f"{'an' if about[0] in 'aeiou' else 'a'} {about}"


def rule(code: str, name: str, level: Level, *, about: About = "model") -> Callable[[Check], Check]:
    """Register a check under its code."""

    def register(check: Check) -> Check:
        REGISTRY.add(Rule(code=code, name=name, level=level, check=check, about=about))
        return check

    return register


def rules() -> Registry:
    """Every rule by code, sorted."""
    return REGISTRY


def judge(rule: Rule, facts: Facts, *, on_error: Callable[[Exception], None] = lambda error: None) -> Result:
    """The result of one rule on one case. What the rule raises becomes a SKIP or an ERROR, wrong usage passes through.

    No observation at all is an ERROR: there is no way to pass by accident. ``on_error`` gets an exception that made the
    result an ERROR.
    """
    start = time.perf_counter()
    reason, raised, examined = "", "", 0
    failures: list[Observation] = []
    notes: dict[str, None] = {}
    try:
        for observation in rule.check(facts):
            examined += 1
            if observation.note:
                notes[observation.note] = None
            if not observation.ok:
                failures.append(observation)
        status = Status.FAIL if failures else Status.PASS
        if not examined:
            status, reason = Status.ERROR, "vacuous: the rule examined nothing"
    except (NotApplicable, Unavailable) as gap:
        if isinstance(gap, Unavailable):
            raised = str(gap.raised or "")
        if isinstance(gap, Unavailable) and gap.failed:
            status, reason = Status.ERROR, str(gap)
            on_error(gap)
        else:
            # What was seen broken before stays broken.
            status, reason = (Status.FAIL, "") if failures else (Status.SKIP, str(gap))
    except UsageError:
        raise
    except Exception as error:
        log.debug("%s on %s", rule.code, facts.case, exc_info=True)
        status, reason = Status.ERROR, cause(error)
        on_error(error)
    parties = {f.party for f in failures}
    return Result(
        rule=rule.code,
        case=facts.case,
        level=rule.level,
        status=status,
        attributed_to=next((party for party in Party if party in parties), None),
        examined=examined,
        reason=reason,
        raised=raised,
        failures=tuple(failures),
        notes=tuple(notes),
        seconds=round(time.perf_counter() - start, 6),
        cut=facts.cut_behind(frozenset(rule.reads)),
    )
