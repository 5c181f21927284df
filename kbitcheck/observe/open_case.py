"""Opens cases: loads what they need, and plans what they compute and what of it fits time and memory."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from kbitcheck.core import machine
from kbitcheck.core.adapters import fields
from kbitcheck.core.cases import CaseSpec, Implementation
from kbitcheck.core.errors import UsageError
from kbitcheck.core.facts import Cost, Fact, ModelFacts
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.plan import MARGIN, Budget, Item, Plan, Planner, display_name
from kbitcheck.core.profile import kept_by
from kbitcheck.core.rule import Rule
from kbitcheck.core.training import Training
from kbitcheck.models.sources.live import LiveModel
from kbitcheck.models.sources.resolve import source_of
from kbitcheck.observe.case import STAGES, Case, attribute_of, facts_of
from kbitcheck.observe.composition.case import CompositionCase
from kbitcheck.observe.device import free_bytes
from kbitcheck.observe.forecast import fitting
from kbitcheck.observe.lent import Lent
from kbitcheck.observe.loaded import Loaded, loaded_model
from kbitcheck.observe.meant_to_train import require_declared
from kbitcheck.observe.planning import forecast_alone, planned
from kbitcheck.observe.preparation import Preparation
from kbitcheck.observe.probes.adapters import let_peft_import
from kbitcheck.observe.probes.snapshot import snapshot
from kbitcheck.observe.recipe import promises_upcast, recipe_of_call, settled, takes_one_dtype
from kbitcheck.observe.stages import Called
from kbitcheck.observe.static import StaticCase


@cache
def costs(*, large: bool = False) -> Mapping[str, Cost]:
    """The declared cost of each fact and stage; what a stage has needs the stage. ``large`` are those of a large model."""
    by_name = _declared(Case, large=large)
    for stage in STAGES:
        declared = {**dict.fromkeys(facts_of(stage), Cost()), **_declared(stage, large=large)}
        for name, cost in declared.items():
            by_name[name] = dataclasses.replace(cost, needs=(attribute_of(stage), *cost.needs))
    return by_name


def _declared(owner: type, *, large: bool) -> dict[str, Cost]:
    facts = {name: member for name, member in vars(owner).items() if isinstance(member, Fact)}
    return {name: (large and member.cost.large) or member.cost for name, member in facts.items()}


def planner_of(spec: CaseSpec, base: ModelFacts, rules: Sequence[Rule]) -> Planner:
    """Plans the case of a base that these rules judge."""
    declared = costs(large=base.nbytes > machine.LARGE_BYTES)
    of_spec = {"forecast": fitting.cost(spec), **({} if fields(spec.adapters) else {"start": Cost()})}
    return planned({**declared, **of_spec}, spec, base, rules)


def open_case(
    spec: CaseSpec, implementation: Implementation, *, rules: Sequence[Rule] = (), seconds: float = math.inf
) -> OpenCase:
    """The case of a spec; nothing is prepared or run before a fact is read.

    Facts that ``rules`` need and for which there is no room or not enough ``seconds`` are left out. The case reads no
    weights where the spec says so, or where not even one prepared model fits.
    """
    if spec.composition:  # whose processes are on a CPU
        spec = dataclasses.replace(spec, device="cpu")
        return CompositionCase(spec, implementation.function, loaded_model(spec))
    if spec.static == "never":
        return _within(_opened(spec, implementation, loaded_model(spec)), rules)
    assumed = _assumed(spec)
    start = time.monotonic()
    static = StaticCase(assumed, source_of(spec, static=spec.static))
    if spec.static == "always":
        return _forecast_within(static, rules, seconds, time.monotonic() - start)
    planner, free = planner_of(assumed, static.base, rules), free_bytes(spec.device)
    least = planner.plan(static.case).of(display_name("_called"))
    if least is not None and (least.nbytes > free or planner.opening + least.seconds > seconds):
        static.why = _too_little(least, planner.opening, free, spec.device)
        return _forecast_within(static, rules, seconds, time.monotonic() - start)
    case = _opened(spec, implementation, loaded_model(spec))
    took = time.monotonic() - start
    return _within(case, rules, seconds=seconds - took, nbytes=free, before=took)


def plans_of(specs: Sequence[CaseSpec], rules: Sequence[Rule], *, seconds: float = math.inf) -> Iterator[Plan]:
    """What each case will compute in its ``seconds``, from its configuration: nothing is loaded.

    What cases of one base share is in the plan of the first of them.
    """
    shared: dict[tuple[str, str], set[str]] = {}
    for spec in specs:
        assumed = _assumed(spec)
        planner = planner_of(assumed, StaticCase(assumed, source_of(spec, static="if-too-large")).base, rules)
        finished = shared.setdefault((spec.model, spec.quant), set())
        opening = 0.0 if finished else planner.opening
        left_out = planner.left_out(
            seconds=(seconds - opening) / MARGIN, nbytes=free_bytes(spec.device), finished=finished, spent=opening
        )
        plan = planner.plan(spec.id, left_out, finished=finished)
        yield dataclasses.replace(plan, opening=opening)
        finished |= {name for name, cost in costs().items() if cost.shared and name not in left_out}


def _assumed(spec: CaseSpec) -> CaseSpec:
    """The spec under the profile that is assumed while nothing is prepared."""
    return dataclasses.replace(spec, profile=kept_by(spec.implementation).profile) if spec.profile == "auto" else spec


def _within(case: Case, rules: Sequence[Rule], **limits: float) -> Case:
    """The case, whose facts keep to limits of ``Budget``."""
    case.budget = Budget(planner_of(case.spec, case.base, rules), case.computed, **limits)
    return case


def _forecast_within(case: StaticCase, rules: Sequence[Rule], seconds: float, took: float) -> StaticCase:
    """The case, whose forecast is left out where it does not fit the seconds that are left once those it took are over."""
    planner = forecast_alone(case.spec, case.base, rules)
    case.budget = Budget(planner, case.computed, seconds=seconds - took, before=took)
    return case


def _too_little(least: Item, opening: float, free: int, device: str) -> str:
    """Why the audit is static."""
    if least.nbytes > free:
        where = "memory" if device == "cpu" else device
        return (
            f"to prepare the model takes about {least.nbytes / 1e9:.3g} GB and {free / 1e9:.3g} GB of {where} are free"
        )
    needed = opening + least.seconds
    return f"to load and prepare the model takes about {needed:.0f} s, which `--timeout {10 * math.ceil(MARGIN * needed / 10)}` allows for"


def open_live(
    model: Any,
    training: Training,
    *,
    implementation: Implementation,
    restore: Callable[[], None],
    no_step: str = "",
    **options: Any,
) -> Case:
    """The case of a quantized model that the caller has: the model itself is prepared and run.

    ``training`` is how the caller trains it; ``restore`` puts the model back to what it was; ``no_step`` is why the model may
    not run.
    """
    require_declared(model, training)
    source = LiveModel.of(model)
    device = str(next(model.parameters()).device)
    try:
        spec = CaseSpec(
            model=source.name, quant=source.quant, implementation=implementation.name, **{"device": device, **options}
        )
    except TypeError as error:
        raise UsageError(f"unknown option: {error}") from None
    return _opened(spec, implementation, Lent(model, spec, restore, no_step=no_step, training=training))


def _opened(spec: CaseSpec, implementation: Implementation, loaded: Loaded) -> Case:
    function, imported = implementation.function, implementation.imported
    _ = loaded.adapters.configured(spec)  # raises where PEFT has no such adapters
    if loaded.copies:
        let_peft_import(loaded.pristine, loaded.targets)
    if spec.profile != "auto" and not takes_one_dtype(loaded.facts) and promises_upcast(loaded.facts):
        return Case(spec, function, loaded, imported=imported)
    called = Called(Preparation(spec, function, loaded))
    prepared = snapshot(called.left)
    recipe = recipe_of_call(called.left, prepared, loaded.facts)
    if spec.profile != "auto":
        recipe = dataclasses.replace(recipe, freezes=spec.freezes)
    case = Case(settled(spec, recipe), function, loaded, imported=imported, recipe=recipe)
    case.begin(called, prepared)
    return case
