"""What an audit computes, in which order, at which price, and what of it fits time and memory. No torch here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.errors import NotApplicable, Unavailable
from kbitcheck.core.facts import Cost, Facts, ModelFacts, Passes
from kbitcheck.core.facts.case import Computed, OpenCase
from kbitcheck.core.facts.cost import NO_PASSES, RunsOn
from kbitcheck.core.rule import Rule

MARGIN = 1.3  # a prediction may be this much too low
LONG = 5.0  # seconds after which a comparison with the prediction says something
NOTHING: Mapping[str, LeftOut] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One fact that takes passes: what it runs on, its predicted seconds and bytes at its peak, and the rules that need it.

    ``left_out`` is why it is not computed; "" where it is.
    """

    fact: str
    on: RunsOn
    passes: Passes
    seconds: float
    nbytes: int
    rules: tuple[str, ...]
    shared: bool = False
    left_out: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The facts of one case in the order in which they are computed, after ``opening`` seconds of loading."""

    case: str
    opening: float
    items: tuple[Item, ...]

    @property
    def kept(self) -> tuple[Item, ...]:
        """The items that are computed."""
        return tuple(item for item in self.items if not item.left_out)

    def of(self, fact: str) -> Item | None:
        """The item of a fact by its display name; None where no rule needs the fact."""
        return next((item for item in self.items if item.fact == fact), None)

    @property
    def seconds(self) -> float:
        """Predicted seconds of the whole case."""
        return self.opening + sum(item.seconds for item in self.kept)

    @property
    def nbytes(self) -> int:
        """Predicted bytes at the highest peak."""
        return max((item.nbytes for item in self.kept), default=0)

    @property
    def passes(self) -> Passes:
        """The passes of all facts together."""
        return sum((item.passes for item in self.kept), NO_PASSES)

    def as_json(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_json`` reads it back."""
        totals = {"seconds": round(self.seconds, 3), "bytes": self.nbytes, "passes": asdict(self.passes)}
        return {**asdict(self), "total": totals}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``as_json``."""
        items = [{**i, "passes": Passes(**i["passes"]), "rules": tuple(i["rules"])} for i in data["items"]]
        return cls(case=data["case"], opening=data["opening"], items=tuple(Item(**item) for item in items))


def display_name(fact: str) -> str:
    """A fact as a report names it."""
    return fact.lstrip("_")


class _Settings(OpenCase):
    """A case that has its settings and its base, and no fact that takes a pass."""

    def __init__(self, spec: CaseSpec, base: ModelFacts) -> None:
        super().__init__(spec)
        self.base = base

    def compute(self, name: str) -> Any:
        raise Unavailable(name)


def facts_by_rule(rules: Sequence[Rule], spec: CaseSpec, base: ModelFacts) -> dict[str, Sequence[str]]:
    """The facts that each rule may read in a case, by code; none where its settings alone make the rule not applicable."""

    def applies(rule: Rule) -> bool:
        with suppress(Unavailable):
            try:
                any(True for _ in rule.check(_Settings(spec, base)))
            except NotApplicable:
                return False
        return True

    return {rule.code: [n for n in rule.reads if n in Facts.__annotations__] for rule in rules if applies(rule)}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A fact that does not fit, and why; the text is the reason of the rules that need it."""

    fact: str
    why: str

    def __str__(self) -> str:
        return f"not judged: needs `{self.fact}`, {self.why}"


class Planner:
    """Orders the facts that rules need, and leaves out the dearest ones where not all fit.

    ``costs`` are by fact, ``reads`` the facts by rule; ``seconds`` and ``nbytes`` predict them of a cost.
    """

    def __init__(
        self,
        costs: Mapping[str, Cost],
        reads: Mapping[str, Sequence[str]],
        *,
        seconds: Callable[[Cost], float],
        nbytes: Callable[[Cost], int],
        opening: float = 0.0,
    ) -> None:
        self._costs = costs
        self._needs = {code: self._closure(facts) for code, facts in reads.items()}
        self._seconds = {name: seconds(cost) for name, cost in costs.items()}
        self._nbytes = {name: nbytes(cost) for name, cost in costs.items()}
        self.opening = opening
        self._wanted_without: dict[frozenset[str], dict[str, list[str]]] = {}

    def _closure(self, facts: Sequence[str]) -> dict[str, None]:
        """The facts and all that they need, each after what it needs itself."""
        names: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in names or name not in self._costs or self._costs[name].witness:
                return
            for need in self._costs[name].needs:
                visit(need)
            names[name] = None

        for fact in facts:
            visit(fact)
        return names

    def _wanted(self, without: Collection[str] = ()) -> dict[str, list[str]]:
        """The rules that need each fact, in the order of computation; rules that need a fact in ``without`` are not judged."""
        key = frozenset(without)
        if key in self._wanted_without:  # as at each fact of a case
            return self._wanted_without[key]
        wanted = self._wanted_without[key] = {}
        for code, facts in self._needs.items():
            if not any(name in facts for name in without):
                for name in facts:
                    wanted.setdefault(name, []).append(code)
        return wanted

    def left_out(
        self,
        *,
        seconds: float = math.inf,
        nbytes: float = math.inf,
        finished: Collection[str] = (),
        before: Mapping[str, LeftOut] = NOTHING,
        spent: float = 0.0,
        pace: float = 1.0,
    ) -> dict[str, LeftOut]:
        """Why facts are left out, the dearest first, so that those that remain take at most ``seconds``.

        Those in ``before`` are left out already. ``spent`` seconds are over, and a predicted second takes ``pace`` of them. A
        fact that only rules need which cannot be judged any more is left out with them.
        """
        everything = self._wanted()
        reasons = dict(before)
        for name in everything.keys() - reasons.keys() - set(finished):
            if self._nbytes[name] > nbytes:
                take, free = self._nbytes[name] / 1e9, nbytes / 1e9
                why = f"about {take:.3g} GB of memory, and {free:.3g} GB are free"
                reasons[name] = LeftOut(display_name(name), why)
        while (total := self.remaining(finished, reasons)) > seconds and (dearest := self._dearest(finished, reasons)):
            saved = total - self.remaining(finished, {*reasons, dearest})
            enough = 10 * math.ceil((spent + MARGIN * pace * total) / 10)
            why = f"about {pace * saved:.0f} s; --timeout {enough} allows it"
            reasons[dearest] = LeftOut(display_name(dearest), why)
        for name in everything.keys() - self._wanted(reasons).keys() - set(finished):
            facts = next(facts for facts in self._needs.values() if name in facts)
            reasons.setdefault(name, next(why for left, why in reasons.items() if left in facts))
        return reasons

    def seconds(self, names: Collection[str]) -> float:
        """Predicted seconds of these facts."""
        return sum(self._seconds.get(name, 0.0) for name in names)

    def remaining(self, finished: Collection[str], left_out: Collection[str]) -> float:
        """Predicted seconds of all that is still to be computed for the rules that need nothing that is left out."""
        return self.seconds([name for name in self._wanted(left_out) if name not in finished])

    def _dearest(self, finished: Collection[str], left_out: Collection[str]) -> str:
        """The fact without which most seconds are saved for each rule that is then not judged; "" where none takes any."""

        def price(name: str) -> tuple[float, float]:
            without = {*left_out, name}
            saved = total - self.remaining(finished, without)
            return round(saved / (judged - self._judged(without)), 6), self._seconds[name]

        total, judged = self.remaining(finished, left_out), self._judged(left_out)
        todo = [name for name in self._wanted(left_out) if name not in finished and self._seconds[name] > 0]
        return max(todo, key=price, default="")

    def _judged(self, without: Collection[str]) -> int:
        return sum(not any(name in facts for name in without) for facts in self._needs.values())

    def wants(self, name: str) -> bool:
        """Whether a rule needs a fact."""
        return any(name in facts for facts in self._needs.values())

    def takes_passes(self, name: str) -> bool:
        """Whether a fact takes a pass itself."""
        return name in self._costs and self._costs[name].passes != NO_PASSES

    def plan(self, case: str, left_out: Mapping[str, LeftOut] = NOTHING, *, finished: Collection[str] = ()) -> Plan:
        """The facts that take passes, in order."""
        items = [
            Item(
                fact=display_name(name),
                on=self._costs[name].on,
                passes=self._costs[name].passes,
                seconds=round(self._seconds[name], 3),
                nbytes=self._nbytes[name],
                rules=tuple(codes),
                shared=self._costs[name].shared,
                left_out=str(left_out.get(name, "")),
            )
            for name, codes in self._wanted().items()
            if self.takes_passes(name) and name not in finished
        ]
        return Plan(case=case, opening=round(self.opening, 3), items=tuple(items))


class Budget:
    """Keeps a case within ``seconds`` from now and ``nbytes`` of memory: leaves out by name what does not fit.

    Where facts take longer than predicted, so will the others. ``before`` are the seconds that loading took.
    """

    def __init__(
        self,
        planner: Planner,
        computed: Computed,
        *,
        seconds: float = math.inf,
        nbytes: float = math.inf,
        before: float = 0.0,
    ) -> None:
        self.planner = planner
        self._computed = computed
        self._seconds, self._nbytes, self._before = seconds, nbytes, before
        self._start = time.monotonic()
        self._pace = 1.0
        self.left_out: dict[str, LeftOut] = {}
        computed.guard = self._guard

    def _guard(self, name: str) -> None:
        if not self._computed.at_hand:  # what has begun is finished
            self._fit()
        if name in self.left_out:
            raise Unavailable(str(self.left_out[name]))

    def _fit(self) -> None:
        spent, finished = time.monotonic() - self._start, self._computed.finished
        predicted = self.planner.seconds(finished)
        if min(spent, predicted) > LONG:
            self._pace = spent / predicted
        pace = max(self._pace, 1.0)
        left = (self._seconds - spent) / (MARGIN * pace)
        self.left_out |= self.planner.left_out(
            seconds=left,
            nbytes=self._nbytes,
            finished=finished,
            before=self.left_out,
            spent=self._before + spent,
            pace=pace,
        )

    def as_json(self) -> dict[str, str]:
        """Why each fact that does not fit was left out, by its display name; JSON-able."""
        return {left.fact: left.why for left in self.left_out.values()}

    @property
    def left(self) -> float:
        """Predicted seconds until all facts are computed."""
        return self._pace * self.planner.remaining(self._computed.finished, self.left_out)
