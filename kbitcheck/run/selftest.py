"""Run every fault on the machine at hand and show that its rule catches it."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kbitcheck.core.cases import CaseSpec
from kbitcheck.core.events import FaultTried
from kbitcheck.core.facts.case import OpenCase
from kbitcheck.core.result import Status
from kbitcheck.core.rule import judge, rules
from kbitcheck.core.training import Training
from kbitcheck.models.sources.resolve import resolve
from kbitcheck.observe.adapter.case import AdapterCase
from kbitcheck.observe.case import Case
from kbitcheck.observe.composition.case import CompositionCase
from kbitcheck.observe.loaded import Loaded
from kbitcheck.observe.probes import files_written
from kbitcheck.observe.watch.built import Built
from kbitcheck.observe.watch.case import WatchedCase
from kbitcheck.observe.watch.observer import Observer
from kbitcheck.observe.watch.replicas import Place
from kbitcheck.sabotage.adapter import Files
from kbitcheck.sabotage.fault import Fault, faults
from kbitcheck.sabotage.watched import Script


def run(codes: Collection[str], *, matrix: bool = False) -> Iterator[FaultTried]:
    """Try the faults of the rules with these codes, with ``matrix`` by all rules."""
    bases: dict[tuple[str, str, str], Loaded] = {}
    for fault in faults():
        if fault.code in codes:
            yield try_fault(fault, bases, matrix=matrix)


def case_of(fault: Fault, bases: dict[tuple[str, str, str], Loaded]) -> OpenCase:
    """The fault's case, with the broken implementation, the spoiled base or the script that is watched."""
    files_written.watch()
    spec = CaseSpec(
        model=fault.model,
        quant=fault.quant,
        adapters=fault.adapters,
        implementation=fault.name,
        checkpointing=fault.checkpointing,  # type: ignore[arg-type]
        profile=fault.profile,  # type: ignore[arg-type]
        device="cuda" if fault.accelerator else "cpu",
        conditions=fault.conditions,
    )
    source = resolve(fault.model)
    source = replace(source, config={**source.config, **fault.config})
    if fault.spoil is not None:
        return Case(spec, fault.prepare, Loaded.from_source(source, spec, spoil=fault.spoil))
    if fault.compose is not None:
        spec = replace(spec, composition=fault.composition, conditions="")
        return CompositionCase(spec, fault.prepare, Loaded.from_source(source, spec), fault.compose)
    if fault.save is not None or fault.merge is not None:
        return _saved(fault)
    key = (fault.model + str(fault.config or ""), fault.quant, spec.device)
    if key not in bases:
        bases[key] = Loaded.from_source(source, spec)
    return Case(spec, fault.prepare, bases[key]) if fault.train is None else _watched(fault, bases[key])


def _saved(fault: Fault) -> AdapterCase:
    files = Files(fault.model)
    if fault.save is not None:
        fault.save(files)
    with TemporaryDirectory() as name:
        folder = Path(name)
        files.save(folder)
        case = AdapterCase(folder, base=fault.model if fault.beside else "", merging=fault.merge)
        if fault.beside:
            _ = case.merge, case.replaced  # read the files, which are gone afterwards
        return case


def _watched(fault: Fault, base: Loaded) -> WatchedCase:
    """The script's case; of several ranks, which run one after another, the last one's, with what all of them hold."""
    peers = tuple(range(fault.ranks))
    cases = [_on_rank(fault, base, (rank, peers) if fault.ranks > 1 else None) for rank in peers]
    case = cases[-1]
    case.watched = replace(case.watched, replicas=tuple(each for one in cases for each in one.watched.replicas))
    return case


def _on_rank(fault: Fault, base: Loaded, place: Place | None) -> WatchedCase:
    built = Built()  # as the command notes what a script builds
    observer = Observer(base.copy(), Training(), built=built, place=lambda wrap: place)
    observer.start()
    try:
        assert fault.train is not None
        with built:
            fault.train(Script(observer.model, base.batch, 0 if place is None else place[0]))
    finally:
        observer.stop()
    if observer.failed:
        raise RuntimeError(observer.failed)
    return WatchedCase(observer, profile="auto")


def try_fault(fault: Fault, bases: dict[tuple[str, str, str], Loaded], *, matrix: bool = False) -> FaultTried:
    """Judge one fault by its own rule, with ``matrix`` by all others too."""
    if fault.accelerator and not torch.cuda.is_available():
        return _tried(fault)
    case = case_of(fault, bases)
    tried = judge_fault(fault, case, matrix=matrix)
    case.close()
    return tried


def judge_fault(fault: Fault, case: OpenCase, *, matrix: bool = False) -> FaultTried:
    """Judge a fault's case by the fault's own rule, with ``matrix`` by all others too; the case stays open."""
    result = judge(rules()[fault.code], case)
    first = next((f"{failure.where}: {failure.actual}" for failure in result.failures), "passed")
    # A fault that is attributed to the stack or the model does not count against the implementation: it escaped.
    caught = result.status is Status.FAIL and (result.own or fault.spoil is not None)
    kills = None
    if matrix:
        own = rules()[fault.code]
        others = (judge(rule, case) for rule in rules().values() if rule is not own and rule.about == own.about)
        broken = {r.rule for r in others if r.status is Status.FAIL and r.own} | ({fault.code} if caught else set())
        kills = tuple(sorted(broken))
        caught = caught and (not fault.alone or kills == (fault.code,))
    return replace(_tried(fault), case=case.case, caught=caught, reason=result.reason or first, kills=kills)


def _tried(fault: Fault) -> FaultTried:
    """The fault before it is judged, as if no device of its own were there."""
    return FaultTried(
        code=fault.code, fault=fault.name, case="", caught=None, reason="needs an accelerator", level=fault.level,
        alone=fault.alone, kills=None,
    )  # fmt: skip
