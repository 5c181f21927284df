"""The cost of every fact of a case, as each is declared where it is computed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

from kbitcheck.core.facts import Cost, Fact
from kbitcheck.observe.case import STAGES, Case, facts_of


@cache
def costs(*, large: bool = False) -> Mapping[str, Cost]:
    """By the name of a fact or stage; what a stage has needs the stage. ``large`` are those of a large model."""
    return {
        **_declared(Case, large=large),
        **{name: cost for stage in STAGES for name, cost in _of_stage(stage, large=large)},
    }


def _declared(owner: type, *, large: bool) -> dict[str, Cost]:
    facts = {name: member for name, member in vars(owner).items() if isinstance(member, Fact)}
    return {name: (large and member.cost.large) or member.cost for name, member in facts.items()}


def _of_stage(stage: type, *, large: bool) -> Iterator[tuple[str, Cost]]:
    needs = f"_{stage.__name__.lower()}"
    for name, cost in {**dict.fromkeys(facts_of(stage), Cost()), **_declared(stage, large=large)}.items():
        yield name, replace(cost, needs=(needs, *cost.needs))
